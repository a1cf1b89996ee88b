"""The command line of maskpack."""
