"""Runs untrusted programs on inputs and returns their outputs."""
