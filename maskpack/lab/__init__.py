"""Research: compare and its baselines, analysis, plots."""
