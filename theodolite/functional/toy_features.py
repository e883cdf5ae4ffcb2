"""Sparse synthetic features, the data of toy models of superposition and of compressed computation."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

FeatureKind: TypeAlias = Literal["unit", "signed"]


def sparse_features(
    rows: int, features: int, probability: float, generator: torch.Generator, kind: FeatureKind = "unit", device: torch.device | None = None
) -> Tensor:
    """(rows, features): each feature is active with ``probability``, then uniform on [0, 1] (``unit``) or [-1, 1] (``signed``), else 0."""
    if not 0.0 < probability <= 1.0:
        raise ValueError(f"The probability of a feature is {probability}; it must lie above 0 and not above 1.")
    draws = torch.rand((2, rows, features), generator=generator, device=device)
    values = draws[1] if kind == "unit" else 2 * draws[1] - 1
    return values * (draws[0] < probability)


def induction_tokens(rows: int, length: int, vocabulary: int, generator: torch.Generator, device: torch.device | None = None) -> Tensor:
    """Sequences ``BOS T* S M T* S`` (rows, length) whose right continuation is M.

    Tokens T and M are uniform on 0..vocabulary-1; S is ``vocabulary``, BOS ``vocabulary + 1``. The first S stands at a uniform place.

    Raises:
        ValueError: If the length is below 5.
    """
    if length < 5:
        raise ValueError(f"An induction sequence of {length} tokens has no room for S, M and S; use at least 5.")
    tokens = torch.randint(0, vocabulary, (rows, length), generator=generator, device=device)
    place = torch.randint(1, length - 3, (rows,), generator=generator, device=device)
    tokens[:, 0] = vocabulary + 1
    tokens[torch.arange(rows, device=tokens.device), place] = vocabulary
    tokens[:, -1] = vocabulary
    return tokens


def induction_answers(tokens: Tensor, vocabulary: int) -> Tensor:
    """The token M after the first S, (rows,)."""
    first = (tokens == vocabulary).to(torch.int64).argmax(dim=1)
    return tokens.gather(1, first[:, None] + 1)[:, 0]
