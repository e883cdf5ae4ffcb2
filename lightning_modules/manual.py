"""What every module with manual optimisation shares: the schedule, the clip after all callbacks, slots, and the time of each phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy

SCHEDULES = ("constant", "linear", "cosine")


class ManualModule(L.LightningModule):
    """A module that accumulates and sums its gradients itself.

    Subclasses set the attributes below in their constructor.

    Attributes:
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        schedule: ``constant``, or ``cosine`` or ``linear`` to ``min_lr_fraction`` over the trainer's ``max_steps``.
        min_lr_fraction: Where a decaying schedule ends, as a fraction of the learning rate.
        max_grad_norm: Gradient-norm clip, applied after all callbacks have seen the gradient; 0 = off.
        seconds: Wall time of each phase of the current step.
        phase: What is being done; None between phases.
        phase_started: Since when, on the monotonic clock.
    """

    warmup_steps: int
    schedule: str
    min_lr_fraction: float
    max_grad_norm: float
    seconds: dict[str, float]
    phase: str | None = None
    phase_started: float | None = None

    def _lr_factor(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant":
            return warmup
        if self.trainer.max_steps < 1:
            raise ValueError(f"model.schedule={self.schedule} needs trainer.max_steps; set it, or choose constant.")
        progress = min(1.0, max(0, step - self.warmup_steps) / max(1, self.trainer.max_steps - self.warmup_steps))
        # float32 whatever dtype a precision plugin makes the default: in half precision the rate would move in steps
        angle = torch.tensor(torch.pi * progress, dtype=torch.float32)
        decay = 1 - progress if self.schedule == "linear" else (1 + torch.cos(angle).item()) / 2
        return warmup * (self.min_lr_fraction + (1 - self.min_lr_fraction) * decay)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Runs after every callback's hook of this name: clip the gradient that they leave."""
        if self.max_grad_norm > 0:
            self.clip_gradients(optimizer, gradient_clip_val=self.max_grad_norm, gradient_clip_algorithm="norm")

    def _without_gradient_sync(self) -> AbstractContextManager[Any]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def slot(self, index: int) -> int:
        """Position in the global batch of this rank's ``index``-th row."""
        return self.global_rank + index * self.trainer.world_size

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of a phase to ``self.seconds``, and say meanwhile in ``self.phase`` what is being done."""
        outer, start = (self.phase, self.phase_started), time.perf_counter()
        self.phase, self.phase_started = phase, time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
            self.phase, self.phase_started = outer
