"""What fits into memory at once: as configured, and less where memory ran out, for the rest of the run and of those that resume it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from theodolite.distributed import gather_objects
from theodolite.out_of_memory import FittingParts

from ..policy_module import PolicyModule
from ..rollouts import HFRollout

T = TypeVar("T")
CHECKPOINT_KEY = "theodolite_memory_limits"
SAMPLING_KEY = "theodolite_sampling_limits"
REMEDY = "lower model.max_new_tokens, train an adapter or a smaller policy, or take a larger device"


class LimitedModule(PolicyModule):
    """A policy module whose microbatches shrink where they do not fit. Every rank has limits of its own.

    Attributes:
        token_budget: Most completion tokens per microbatch, and most prompt tokens computed at once; None = no bound.
    """

    token_budget: int | None
    _halvings: int = 0
    _row_limit: int | None = None

    def _most_rows(self) -> int | None:
        """The configured microbatch, or what fitted after memory ran out."""
        limits = [limit for limit in (self.micro_batch_size, self._row_limit) if limit is not None]
        return min(limits) if limits else None

    def _most_prompt_tokens(self, prompts: Sequence[tuple[int, ...]]) -> int | None:
        if not self._halvings:
            return self.token_budget
        return max(1, (self.token_budget or len(set(prompts)) * max(map(len, prompts), default=0)) >> self._halvings)

    def in_fitting_parts(self, function: Callable[[Sequence[int]], T], indices: Sequence[int]) -> list[T]:
        """What ``function`` returns for consecutive parts of a microbatch; where memory runs out for less, and less from then on.

        Args:
            function: Without gradient, and the same for a rollout in whatever company.
            indices: Of rollouts; not empty.

        Raises:
            RuntimeError: One rollout alone does not fit.
        """
        parts = FittingParts(min(len(indices), self._most_rows() or len(indices)), REMEDY)
        found = parts.map(lambda part: function(indices[part]), len(indices))
        if parts.halvings:
            self._halvings, self._row_limit = self._halvings + parts.halvings, parts.rows_per_part
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep every rank's limits, where memory has run out."""
        super().on_save_checkpoint(checkpoint)
        found = gather_objects((self._halvings, self._row_limit, self.engine.row_limit if isinstance(self.engine, HFRollout) else None))
        if any(halvings for halvings, _, _ in found):
            checkpoint[CHECKPOINT_KEY] = [(halvings, limit) for halvings, limit, _ in found]
        if any(sampled for _, _, sampled in found):
            checkpoint[SAMPLING_KEY] = [sampled for _, _, sampled in found]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take this rank's limits back; on another number of ranks, the tightest of all."""
        super().on_load_checkpoint(checkpoint)
        found: list[tuple[int, int | None]] = checkpoint.get(CHECKPOINT_KEY, [])
        sampled: list[int | None] = checkpoint.get(SAMPLING_KEY, [])
        if found:
            own = self._mine(found)
            self._halvings, self._row_limit = max(halvings for halvings, _ in own), _tightest([limit for _, limit in own])
        if sampled and isinstance(self.engine, HFRollout):
            self.engine.row_limit = _tightest(self._mine(sampled))

    def _mine(self, by_rank: list[T]) -> list[T]:
        """This rank's own value alone; every rank's, where there were more or fewer of them."""
        same = self._trainer is not None and len(by_rank) == self.trainer.world_size
        return [by_rank[self.trainer.global_rank]] if same else by_rank


def _tightest(limits: Sequence[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
