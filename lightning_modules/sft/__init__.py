"""Supervised fine-tuning of causal language models."""

from .module import SFTModule

__all__ = ["SFTModule"]
