"""Correlation-aware second-order pruning (CAP, FastCAP) for PyTorch vision models."""
