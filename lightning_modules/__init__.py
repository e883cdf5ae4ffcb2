"""What is trained."""

from .decomposition import DecompositionModule
from .grpo import GRPOModule
from .sft import SFTModule
from .transcoder import TranscoderModule

__all__ = ["DecompositionModule", "GRPOModule", "SFTModule", "TranscoderModule"]
