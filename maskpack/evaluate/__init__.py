"""Was it worth it? Accuracy, and the probe to compare with."""
