"""What a model consists of: which weights to prune, masks that hold, multiply-adds."""
