r"""Adversarial sources that live through training: an ascent step per training step, instead of a fresh attack on every batch.

Sources are stored as (rows, positions or 1, ..., C) by site, and a scope says which stored row attacks which row of the global batch:

================================ ============== ====================================
scope                            stored rows    row of slot s
================================ ============== ====================================
``single_source``                1              0; all positions share one source
``broadcast_across_batch``       1              0
``repeat_across_batch``          n_sources      s mod n_sources
``per_batch_per_position``       the batch's    s
================================ ============== ====================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from theodolite.functional.pgd import Sources, ascend, initial_sources

SourceScope: TypeAlias = Literal["single_source", "broadcast_across_batch", "repeat_across_batch", "per_batch_per_position"]
SOURCE_SCOPES: tuple[SourceScope, ...] = ("single_source", "broadcast_across_batch", "repeat_across_batch", "per_batch_per_position")

SMALLEST = 2.0**-24
"""Uniform numbers are multiples of this; the normal quantile of 0 is infinite."""


@dataclass(frozen=True, slots=True)
class Ascent:
    r"""How sources move against the reconstruction.

    ``sign``: :math:`r + \eta\,\mathrm{sign}(g)`. ``adam``: :math:`r + \eta\,\hat m / (\sqrt{\hat v} + \epsilon)` with the bias-corrected
    moments of Adam (arXiv 1412.6980). Then clipped to [0, 1], unless the sources are logits.

    Attributes:
        kind: ``sign`` or ``adam``.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        logits: Sources are sigmoids of what is stored.
    """

    kind: Literal["sign", "adam"] = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    logits: bool = False


@dataclass(slots=True)
class SourceState:
    """Sources and what their ascent remembers.

    Attributes:
        values: (rows, ..., C) by site: sources, or their logits.
        first: Adam's first moments; empty for sign ascent.
        second: Adam's second moments.
        updates: Steps taken.
    """

    values: Sources
    first: Sources = field(default_factory=dict)
    second: Sources = field(default_factory=dict)
    updates: int = 0

    def tensors(self) -> dict[str, Sources]:
        """All tensors by kind."""
        return {"values": self.values, "first": self.first, "second": self.second}


def stored_rows(scope: SourceScope, n_sources: int, slots: Sequence[int]) -> list[int]:
    """Which stored row attacks the row of each slot."""
    if scope == "per_batch_per_position":
        return list(slots)
    return [slot % n_sources for slot in slots] if scope == "repeat_across_batch" else [0] * len(slots)


def stored_shape(scope: SourceScope, positions: Sequence[int]) -> tuple[int, ...]:
    """Shape of a stored row's positions."""
    return (1,) * len(positions) if scope == "single_source" else tuple(positions)


def first_state(
    channels: Mapping[str, int],
    rows: Sequence[int],
    shape: Sequence[int],
    ascent: Ascent,
    seed: Sequence[int | str],
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> SourceState:
    """Sources uniform on [0, 1), or standard normal logits; each stored row's numbers belong to its number in ``rows``."""
    values = initial_sources(channels, (len(rows), *shape), "random", seed, rows, dtype, device)
    if ascent.logits:
        values = {name: torch.special.ndtri(value.clamp(SMALLEST, 1 - SMALLEST)) for name, value in values.items()}
    state = SourceState({name: value.contiguous() for name, value in values.items()})
    if ascent.kind == "adam":
        state.first = {name: torch.zeros_like(value) for name, value in values.items()}
        state.second = {name: torch.zeros_like(value) for name, value in values.items()}
    return state


def effective(values: Mapping[str, Tensor], ascent: Ascent) -> Sources:
    """Sources in [0, 1]."""
    return {name: value.sigmoid() for name, value in values.items()} if ascent.logits else dict(values)


@torch.no_grad()
def move(state: SourceState, gradients: Mapping[str, Tensor], ascent: Ascent, lr: float) -> None:
    """One ascent step, in place."""
    state.updates += 1
    for name, value in state.values.items():
        gradient = gradients[name].to(value.dtype)
        if ascent.kind == "sign" and not ascent.logits:
            ascend(value, gradient, lr)
            continue
        if ascent.kind == "sign":
            value.add_(gradient.sign(), alpha=lr)
        else:
            first = state.first[name].lerp_(gradient, 1 - ascent.beta1)
            second = state.second[name].mul_(ascent.beta2).addcmul_(gradient, gradient, value=1 - ascent.beta2)
            scale = (second / (1 - ascent.beta2**state.updates)).sqrt_().add_(ascent.eps)
            value.addcdiv_(first / (1 - ascent.beta1**state.updates), scale, value=lr)
        if not ascent.logits:
            value.clamp_(0.0, 1.0)
