"""Talkative autoencoders: a verbaliser that describes an activation and a reconstructor that reads it back."""

from .grpo import TalkativeGRPO
from .gumbel import TalkativeGumbel
from .module import TalkativeModule
from .sft import TalkativeSFT

__all__ = ["TalkativeGRPO", "TalkativeGumbel", "TalkativeModule", "TalkativeSFT"]
