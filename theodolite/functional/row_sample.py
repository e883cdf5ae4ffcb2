"""A uniform sample of a stream of rows that depends on which rows there were, not on their order, batches or ranks."""

from __future__ import annotations

import torch
from torch import Tensor

NO_KEY = torch.iinfo(torch.int64).max
"""Larger than the key of any row."""
_INCREMENT = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: the constants of splitmix64 (Steele, Lea and Flood, 2014)
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


def sample_keys(ids: Tensor, seed: int = 0) -> Tensor:
    """A pseudo-random key in ``[0, 2**63)`` for each id: the rows with the k smallest keys are a uniform sample of size k.

    Args:
        ids: int64 of any shape, each row's own.
        seed: Chooses the sample.

    Returns:
        int64 of the same shape (splitmix64 of the ids; different ids rarely share a key).
    """
    z = ids + (seed + 1) * _wrapped(_INCREMENT, ids)
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return (z ^ _shifted(z, 31)) & NO_KEY


def _wrapped(value: int, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.int64, device=like.device)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch shifts the sign in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
