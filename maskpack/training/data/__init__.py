"""What the scores learn from: one data source a file."""
