"""Parameter decomposition: component models, causal importances and the module that trains them."""

from .module import DecompositionModule
from .spd_import import SPDRunModule

__all__ = ["DecompositionModule", "SPDRunModule"]
