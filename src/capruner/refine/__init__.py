"""What a network that has been pruned can win back without labels."""
