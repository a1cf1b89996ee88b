"""Learning the scores of a mask while the weights stay frozen."""
