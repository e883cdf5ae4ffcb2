"""Transcoders and sparse autoencoders, nested prefixes included."""

from .module import TranscoderModule
from .transcoder import Transcoder

__all__ = ["Transcoder", "TranscoderModule"]
