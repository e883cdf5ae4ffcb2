"""How well scores tell concept completions from clean ones: pure tensor functions."""

from __future__ import annotations

import torch
from torch import Tensor


def pair_accuracy(concept: Tensor, clean: Tensor) -> float:
    """Share of pairs whose concept side scores higher; a tie counts half.

    Args:
        concept: (n,) scores.
        clean: (n,) scores, pair by pair.
    """
    return float(((concept > clean).double() + 0.5 * (concept == clean).double()).mean())


def auc(concept: Tensor, clean: Tensor) -> float:
    """Probability that a random concept completion scores higher than a random clean one (Mann-Whitney); a tie counts half.

    Args:
        concept: (n,) scores.
        clean: (m,) scores; need not be paired.
    """
    difference = concept[:, None] - clean[None]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def separation_report(concept: Tensor, clean: Tensor, concept_lengths: Tensor, clean_lengths: Tensor) -> dict[str, float | int | None]:
    """Accuracy and AUC on held-out pairs, split by which side is longer.

    A direction that only measures length separates well where concept completions are longer and badly where they are shorter.

    Args:
        concept: (n,) scores of concept sides.
        clean: (n,) scores of clean sides.
        concept_lengths: (n,) tokens.
        clean_lengths: (n,) tokens.

    Returns:
        ``pairs``, ``accuracy``, ``auc``, ``accuracy_concept_longer`` and ``accuracy_concept_not_longer`` (None where there is no such
        pair), with their counts, and ``auc_of_length``: what the number of tokens alone would reach.

    Raises:
        ValueError: No pairs, or scores that are not finite.
    """
    if len(concept) == 0:
        raise ValueError("There is no held-out pair, so a direction cannot be validated: hold out at least one.")
    if not (torch.isfinite(concept).all() and torch.isfinite(clean).all()):
        raise ValueError("Scores of held-out pairs are not finite, so the direction cannot be validated.")
    longer = concept_lengths > clean_lengths
    return {
        "pairs": len(concept),
        "accuracy": pair_accuracy(concept, clean),
        "auc": auc(concept, clean),
        "accuracy_concept_longer": pair_accuracy(concept[longer], clean[longer]) if bool(longer.any()) else None,
        "pairs_concept_longer": int(longer.sum()),
        "accuracy_concept_not_longer": pair_accuracy(concept[~longer], clean[~longer]) if bool((~longer).any()) else None,
        "pairs_concept_not_longer": int((~longer).sum()),
        "auc_of_length": auc(concept_lengths.double(), clean_lengths.double()),
    }
