"""Causal attention patterns from queries and keys, and how far two of them are apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def attention_log_pattern(
    query: Tensor, key: Tensor, heads: int, key_heads: int, rotate: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Log-probabilities of causal attention (B, heads, S, S).

    Args:
        query: (B, S, heads * head width).
        key: (B, S, key_heads * head width); each key head serves ``heads / key_heads`` query heads.
        heads: Query heads.
        key_heads: Key heads.
        rotate: Rotary positions for (B, heads, S, head width); None = none.

    Raises:
        ValueError: If heads do not divide.
    """
    if heads % key_heads or query.shape[-1] % heads or key.shape[-1] % key_heads:
        raise ValueError(f"{heads} query heads and {key_heads} key heads do not fit widths {query.shape[-1]} and {key.shape[-1]}.")
    q = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    k = key.unflatten(-1, (key_heads, -1)).transpose(1, 2)
    if rotate is not None:
        q, k = rotate(q), rotate(k)
    k = k.repeat_interleave(heads // key_heads, dim=1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    length = scores.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -torch.inf).log_softmax(dim=-1)


def pattern_kl_sum(target: Tensor, found: Tensor) -> Tensor:
    """Summed KL(target || found) of log-patterns; entries that are impossible in both count nothing."""
    possible = target > -torch.inf
    difference = torch.where(possible, target, 0.0) - torch.where(possible, found, 0.0)
    return (target.exp() * difference).sum()
