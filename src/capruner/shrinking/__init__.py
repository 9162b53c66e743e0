"""Smaller dense networks: whole neurons, heads and channels are removed, and the weights that remain are re-fitted."""
