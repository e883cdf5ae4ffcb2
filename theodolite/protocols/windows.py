"""Windows of rollouts: everything between two optimizer steps of a policy gradient, and the hooks that may change it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .grades import Reward, Verdict
from .policies import TokenSequence


@dataclass(slots=True)
class Rollout:
    """One sampled completion.

    Attributes:
        tokens: Prompt and completion ids exactly as sampled (never re-tokenised).
        text: The decoded completion without special tokens.
        sampler_log_probs: Log-probability of each completion token when it was sampled, after temperature.
        finish: ``stop`` (an end token was sampled) or ``length``.
        problem: The row's id.
        slot: Position of the prompt in the *global* batch of the window, the same whatever the number of ranks.
        sample: Index within the group.
        weight_version: Number of optimizer steps that the sampling weights had seen.
        source: ``policy``, or the name of whatever else wrote it.
    """

    tokens: TokenSequence
    text: str
    sampler_log_probs: tuple[float, ...]
    finish: Literal["stop", "length"]
    problem: str
    slot: int
    sample: int
    weight_version: int
    source: str = "policy"


@dataclass(slots=True)
class Window:
    """Everything between two optimizer steps, as this rank sees it. Groups are contiguous.

    Attributes:
        step: Optimizer steps taken before this window.
        rows: The rank's prompts, one per group.
        rollouts: ``len(rows) * group_size`` rollouts, group after group.
        rewards: One per rollout.
        group_size: Completions per prompt.
        values: (n,) float64 reward values; callbacks may change them in ``on_rollouts``. NaN = not scorable.
        advantages: (n,) advantages, or (n, T) with column t for completion token t; callbacks may change them in ``on_advantages``.
        metrics: (sum, count) pairs that callbacks add; the module sums both over ranks and logs the ratio.
        features: (n,) numbers per rollout that callbacks measure, for the gates and reports of later callbacks. NaN = not measured.
        weights: (n,) or (n, T) factors on the loss, set by callbacks; empty = 1 everywhere. Denominators stay as they are.
        parts: Name of the gradient part that each rollout belongs to, set by callbacks; empty = its source.
    """

    step: int
    rows: list[Any]
    rollouts: list[Rollout]
    rewards: list[Reward]
    group_size: int
    values: Tensor
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    parts: list[str] = field(default_factory=list)


@dataclass(slots=True)
class OracleWindow(Window):
    """A window that also shows the oracle's verdicts: handed only to callbacks that declare ``uses_oracle = True``."""

    verdicts: list[Verdict] = field(default_factory=list)


class WindowHooks(Protocol):
    """The hooks of a policy-gradient window, in the order they are called. Each is optional for a callback.

    Lightning's own ``on_before_optimizer_step`` fires between ``on_microbatch_gradients`` and ``on_after_optimizer_step``: gradients
    are then accumulated, summed over ranks and not yet clipped. Clipping follows it, then the step.
    """

    def on_rollouts(self, trainer: Any, pl_module: Any, window: Window) -> None:
        """Rollouts are graded; ``window.values`` may be changed."""

    def on_advantages(self, trainer: Any, pl_module: Any, window: Window) -> None:
        """Advantages are computed; ``window.advantages`` may be changed."""

    def on_microbatch_gradients(self, trainer: Any, pl_module: Any, window: Window, part: str) -> None:
        """One microbatch of gradient part ``part`` has been added to ``p.grad`` (local to this rank).

        ``window`` holds the groups that this rank computes, here and in ``on_part_gradients``; on several ranks not those that it sampled.
        """

    def on_part_gradients(self, trainer: Any, pl_module: Any, window: Window, part: str) -> None:
        """``p.grad`` holds part ``part`` alone, summed over ranks, and may be changed; the parts are added afterwards.

        Called for every part of the window, in the order of their names, on every rank.
        """

    def on_after_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The optimizer has stepped; the applied update is known."""
