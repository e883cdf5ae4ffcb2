"""Parameter decomposition: component models, causal importances and the module that trains them."""
