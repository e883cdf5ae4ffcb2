"""What fits into memory at once: as configured, and less where memory ran out, for the rest of the run and of those that resume it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from theodolite.distributed import gather_objects

from ..policy_module import PolicyModule

CHECKPOINT_KEY = "theodolite_memory_limits"


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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep every rank's limits, where memory has run out."""
        super().on_save_checkpoint(checkpoint)
        found = gather_objects((self._halvings, self._row_limit))
        if any(halvings for halvings, _ in found):
            checkpoint[CHECKPOINT_KEY] = found

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take this rank's limits back; on another number of ranks, the tightest of all."""
        super().on_load_checkpoint(checkpoint)
        found: list[tuple[int, int | None]] = checkpoint.get(CHECKPOINT_KEY, [])
        if found and self._trainer is not None and len(found) == self.trainer.world_size:
            self._halvings, self._row_limit = found[self.trainer.global_rank]
        elif found:
            self._halvings = max(halvings for halvings, _ in found)
            self._row_limit = min(limit for _, limit in found if limit is not None)
