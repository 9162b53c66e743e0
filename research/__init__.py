"""Scripts that prune and train timm models with recipes; run from a clone, not installed."""
