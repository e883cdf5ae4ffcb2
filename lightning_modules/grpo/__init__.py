"""Group-relative policy optimisation with manual optimisation and hooks."""
