"""Pure tensor functions: no Lightning, no I/O, no global state."""
