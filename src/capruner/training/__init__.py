"""Pruning inside a training loop: your own (``gradual``), Lightning's (``lightning``), or the one of Hugging Face's ``Trainer`` (``transformers``)."""
