"""What the scores are trained on: one objective a file."""
