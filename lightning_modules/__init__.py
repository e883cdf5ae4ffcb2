"""What is trained."""

from .decomposition import DecompositionModule
from .grpo import GRPOModule
from .sft import SFTModule

__all__ = ["DecompositionModule", "GRPOModule", "SFTModule"]
