"""What is trained."""

from .grpo import GRPOModule
from .sft import SFTModule

__all__ = ["GRPOModule", "SFTModule"]
