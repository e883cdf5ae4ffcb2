"""Transcoders and sparse autoencoders: their module, export and evaluation."""
