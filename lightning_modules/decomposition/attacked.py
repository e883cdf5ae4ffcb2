"""Reconstruction under attack, as a training loss or an evaluation: the adversary sees the whole batch of all ranks.

The attack itself is :mod:`theodolite.functional.pgd`. Sources are found before the batch is differentiated and are then constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from theodolite.distributed import sum_over_ranks
from theodolite.functional.component_masks import ComponentMask, mask_from_source
from theodolite.functional.pgd import (
    MASK_SCOPES,
    SOURCE_INITS,
    LossSum,
    MaskScope,
    Rows,
    SourceInit,
    Sources,
    attack_each,
    attack_groups,
    initial_sources,
    is_shared,
    source_shape,
)

from .decomposition import Decomposition, Prepared
from .draws import Draws
from .objectives import ScopedRecon, hidden_acts, total_of

Batch = Sequence[tuple[Prepared, Draws]]


@dataclass(frozen=True, kw_only=True)
class PGDRecon(ScopedRecon):
    """Reconstruction under sources found by projected gradient ascent on this very loss.

    ``layerwise`` attacks every module by itself. As an evaluation prefer ``PGDReconLossCallback``, which states its attack batch.

    Attributes:
        init: Where sources start: ``random``, ``zeroes`` or ``ones``.
        step_size: Of a step, in units of the box [0, 1].
        n_steps: Steps.
        mask_scope: Who shares a source; see :func:`~theodolite.functional.pgd.source_shape`.
    """

    name: ClassVar[str] = "pgd_recon"
    init: SourceInit = "random"
    step_size: float = 0.1
    n_steps: int = 1
    mask_scope: MaskScope = "shared_across_batch"
    _found: dict[tuple[int, str], Sources] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the settings of the attack."""
        super().__post_init__()
        if self.init not in SOURCE_INITS:
            raise ValueError(f"{self.name}: there is no init {self.init!r}; choose {', '.join(SOURCE_INITS)}.")
        if self.mask_scope not in MASK_SCOPES:
            raise ValueError(f"{self.name}: there is no mask_scope {self.mask_scope!r}; choose {', '.join(MASK_SCOPES)}.")
        if self.n_steps < 0 or self.step_size <= 0:
            raise ValueError(f"{self.name}: n_steps must not be negative and step_size must be above 0.")

    def begin(self, parts: Decomposition, batch: Batch, step: int, training: bool) -> None:
        """Find the sources of every microbatch."""
        self._found.clear()
        if self.scope == "layerwise":
            for name in parts.names:
                self._attack(parts, batch, [name], name)
        else:
            self._attack(parts, batch, parts.names, "")

    def _attack(self, parts: Decomposition, batch: Batch, names: Sequence[str], key: str) -> None:
        channels = {name: parts.source_channels()[name] for name in names}
        losses = [self._loss(parts, prepared, self.routed(parts, prepared, draws, 0)) for prepared, draws in batch]
        if is_shared(self.mask_scope):
            prepared, draws = batch[0]
            sources = self._start(channels, prepared, draws, key, shared=True)
            rows = [
                Rows(loss, torch.zeros(len(p.batch), dtype=torch.long, device=parts.device))
                for loss, (p, _) in zip(losses, batch, strict=True)
            ]
            attack_groups(rows, sources, [self.n_steps], self.step_size, reduce=sum_over_ranks)
            for prepared, _ in batch:
                self._found[prepared.index, key] = sources
        else:
            for loss, (prepared, draws) in zip(losses, batch, strict=True):
                sources = self._start(channels, prepared, draws, key, shared=False)
                attack_each(loss, sources, [self.n_steps], self.step_size)
                self._found[prepared.index, key] = sources

    def _start(self, channels: Mapping[str, int], prepared: Prepared, draws: Draws, key: str, shared: bool) -> Sources:
        dtype = next(iter(prepared.lower.values())).dtype
        shape = source_shape(self.mask_scope, prepared.leading)
        slots = None if shared else draws.slots
        return initial_sources(channels, shape, self.init, (*draws.seed, key), slots, dtype, prepared.batch.device)

    def _loss(self, parts: Decomposition, prepared: Prepared, routing: Mapping[str, Tensor] | None) -> LossSum:
        def loss(sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
            return parts.recon_sum(prepared, attacked_masks(prepared, sources, routing), frozen=True), parts.recon_count(prepared)

        return loss

    def sums(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> tuple[Tensor, int]:
        """Sum over the batch under the sources found by :meth:`begin`."""
        routing = self.routed(parts, prepared, draws, 0)
        keys = parts.names if self.scope == "layerwise" else [""]
        sums = [parts.recon_sum(prepared, attacked_masks(prepared, self._found[prepared.index, key], routing)) for key in keys]
        return torch.stack(sums).sum(), parts.recon_count(prepared) * len(sums)

    def finish(self, step: int) -> None:
        """Forget the sources."""
        self._found.clear()


@dataclass(frozen=True, kw_only=True)
class PGDHiddenActsRecon(PGDRecon):
    """Squared error of every decomposed module's output under the sources that hurt the *output* most, in all modules at once."""

    name: ClassVar[str] = "pgd_hidden_acts_recon"

    def __post_init__(self) -> None:
        """Only all modules at once."""
        super().__post_init__()
        if self.scope != "all":
            raise ValueError("pgd_hidden_acts_recon has scope all; its values by module are reported anyway.")

    def by_module(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> dict[str, tuple[Tensor, int]]:
        """Sum and count of each module."""
        return hidden_acts(parts, prepared, attacked_masks(prepared, self._found[prepared.index, ""], None))

    def sums(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> tuple[Tensor, int]:
        """Sum over modules and the batch."""
        return total_of(self.by_module(parts, prepared, draws))


def attacked_masks(prepared: Prepared, sources: Mapping[str, Any], routing: Mapping[str, Tensor] | None) -> dict[str, ComponentMask]:
    """Masks that sources stand for."""
    return {n: mask_from_source(prepared.lower[n], s, None if routing is None else routing[n]) for n, s in sources.items()}
