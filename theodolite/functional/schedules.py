"""Schedules over training as factors of a starting value."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

ScheduleName: TypeAlias = Literal["constant", "linear", "cosine"]


def schedule_factor(step: int, steps: int, schedule: str, warmup_fraction: float = 0.0, final_fraction: float = 0.0) -> float:
    """The factor at ``step`` of ``steps``: a linear rise over ``int(steps * warmup_fraction)`` steps, then the schedule.

    Args:
        step: Steps taken before this one.
        steps: Steps in all.
        schedule: ``constant``, or ``linear`` or ``cosine`` down to ``final_fraction`` at the last step.
        warmup_fraction: Fraction of all steps that rise from 0.
        final_fraction: Where a decaying schedule ends.

    Raises:
        ValueError: If there is no such schedule.
    """
    if schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"There is no schedule {schedule!r}; choose constant, linear or cosine.")
    warmup = int(steps * warmup_fraction)
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, steps - warmup - 1))
    decay = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final_fraction + (1 - final_fraction) * decay
