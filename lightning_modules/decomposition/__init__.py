"""Parameter decomposition: component models, causal importances and the module that trains them."""

from .module import DecompositionModule

__all__ = ["DecompositionModule"]
