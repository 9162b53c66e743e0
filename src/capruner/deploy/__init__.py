"""Pruned models for runtimes: export to their formats, small files, and benchmarks."""
