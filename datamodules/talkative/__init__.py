"""Activations with captions, for talkative autoencoders."""

from .captions import CaptionSource, FileCaptions
from .datamodule import CaptionedActivations

__all__ = ["CaptionSource", "CaptionedActivations", "FileCaptions"]
