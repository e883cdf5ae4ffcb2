"""Rollouts by vLLM: an engine in the training process, or a stock server elsewhere. vLLM itself is imported only when one starts."""

from .agreement import DisagreementError
from .colocated import VLLMRollout
from .server import VLLMServerRollout

__all__ = ["DisagreementError", "VLLMRollout", "VLLMServerRollout"]
