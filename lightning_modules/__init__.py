"""What is trained."""

from typing import TYPE_CHECKING

from theodolite.lazy_names import lazy_names

if TYPE_CHECKING:
    from .decomposition import DecompositionModule, SPDRunModule
    from .grpo import GRPOModule
    from .sft import SFTModule
    from .transcoder import TranscoderModule

__all__ = ["DecompositionModule", "GRPOModule", "SFTModule", "SPDRunModule", "TranscoderModule"]

__getattr__ = lazy_names(
    __name__,
    {
        "DecompositionModule": ".decomposition",
        "GRPOModule": ".grpo",
        "SFTModule": ".sft",
        "SPDRunModule": ".decomposition",
        "TranscoderModule": ".transcoder",
    },
)
