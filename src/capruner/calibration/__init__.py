"""Calibration: from data to a method that is ready to solve for any sparsity."""
