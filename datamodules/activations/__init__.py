"""Activations of a producer model, computed on the fly or read from disk."""
