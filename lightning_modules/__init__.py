"""What is trained."""

from .decomposition import DecompositionModule, SPDRunModule
from .grpo import GRPOModule
from .sft import SFTModule
from .transcoder import TranscoderModule

__all__ = ["DecompositionModule", "GRPOModule", "SFTModule", "SPDRunModule", "TranscoderModule"]
