"""What is transferred: criticality, barriers, similarity, common mistakes, feature reuse, checkpoints."""
