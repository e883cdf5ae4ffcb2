"""Synthetic features and sequences with a known ground truth."""
