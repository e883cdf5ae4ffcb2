"""The random numbers of a batch's losses: a function of run seed, step, loss and row, whatever rank or microbatch the row is in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from theodolite.functional.component_masks import static_routing, uniform_k_routing
from theodolite.functional.row_noise import uniform_rows


@dataclass(frozen=True)
class Routing:
    """Which modules are replaced at which positions.

    Attributes:
        probability: Each module on its own with this probability; None = a uniform subset of a uniform size k in 1..M.
    """

    probability: float | None = None

    def __post_init__(self) -> None:
        """Check the probability."""
        if self.probability is not None and not 0 < self.probability <= 1:
            raise ValueError(f"routing.probability is {self.probability}; it must lie above 0 and not above 1.")


@dataclass(frozen=True)
class Draws:
    """Draws for the rows of one batch.

    Attributes:
        seed: What they are for: run seed, phase and step.
        slots: Global slots of the batch's rows.
        dtype: Of the numbers.
        device: Where they are made.
    """

    seed: tuple[int | str, ...]
    slots: Sequence[int]
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None

    def named(self, purpose: str) -> Draws:
        """Independent draws for another purpose."""
        return replace(self, seed=(*self.seed, purpose))

    def uniform(self, shape: Sequence[int], what: str, sample: int = 0) -> Tensor:
        """Uniform numbers (rows, *shape)."""
        return uniform_rows(self.slots, shape, *self.seed, what, sample, dtype=self.dtype, device=self.device)

    def mask_noise(self, leading: tuple[int, ...], channels: int, sample: int = 0) -> Tensor:
        """(*leading, channels) numbers for stochastic masks."""
        return self.uniform((*leading[1:], channels), "masks", sample)

    def routing(self, routing: Routing, names: Sequence[str], leading: tuple[int, ...], sample: int = 0) -> dict[str, Tensor]:
        """Routing masks by module."""
        numbers = self.uniform((*leading[1:], len(names) + 1), "routing", sample).movedim(-1, 0)
        if routing.probability is not None:
            return static_routing(names, numbers[1:], routing.probability)
        return uniform_k_routing(names, numbers[0], numbers[1:])
