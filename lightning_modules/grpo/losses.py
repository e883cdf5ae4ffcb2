"""Policy losses: what one token contributes, as a class that a config names by ``class_path``.

A loss maps a :class:`TokenBatch` to a loss per token; weights, denominators, the KL term and the backward pass are the module's::

    model:
      init_args:
        loss: {class_path: theodolite.lightning_modules.grpo.losses.CISPOLoss, init_args: {ratio_cap: 4.0}}

Any class with the signature of :class:`PolicyLoss` will do, from any importable module.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, runtime_checkable

from torch import Tensor

from theodolite.functional.importance import sequence_log_ratio, sequence_token_log_ratio
from theodolite.functional.policy_loss import cispo_surrogate, clipped_surrogate, log_ratio

RatioLevel = Literal["token", "sequence", "sequence_token"]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The tokens of one microbatch, padded to (B, T); everything but ``log_probs`` is without gradient.

    Attributes:
        log_probs: Under the policy, differentiable; 0 on padding.
        old_log_probs: Before the window's first update. For rollouts of another source: what that source reported.
        sampler_log_probs: As the sampler reported them.
        advantages: (B, 1), or (B, T) where they differ by token.
        mask: Loss mask.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    sampler_log_probs: Tensor
    advantages: Tensor
    mask: Tensor


@runtime_checkable
class PolicyLoss(Protocol):
    """What a loss must offer.

    It may declare ``linear = True``: proportional to the advantage while the ratio is 1, and 0 wherever the advantage is 0. Then rollouts
    without advantage are not computed, and identical ones of a group are computed once. Without it every rollout is.
    """

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per token and statistics without gradient, each broadcastable to (B, T); statistics are logged as token means."""
        ...


class ClippedLoss:
    """PPO's clipped surrogate on token or sequence ratios; see :func:`theodolite.functional.policy_loss.clipped_surrogate`.

    Args:
        clip_low: Lower clipping distance. GSPO's ratios are geometric means: its paper uses 3e-4.
        clip_high: Upper clipping distance; 4e-4 for GSPO.
        ratio: ``token``, ``sequence`` (GSPO) or ``sequence_token`` (GSPO-token: advantages may differ by token).
        ratio_cap: Upper bound of the unclipped ratio (two-sided clipping); null = none.
        dual_clip: Bound c of the loss -c A for A < 0; null = none.
    """

    linear = True

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        ratio: RatioLevel = "token",
        ratio_cap: float | None = None,
        dual_clip: float | None = None,
    ) -> None:
        if ratio not in ("token", "sequence", "sequence_token"):
            raise ValueError(f"loss.ratio is {ratio!r}; choose token, sequence or sequence_token.")
        if not 0 <= clip_low <= 1 or clip_high < 0:
            raise ValueError(
                f"clip_low={clip_low} and clip_high={clip_high} clip nothing sensible; use 0 <= clip_low <= 1, clip_high >= 0."
            )
        if ratio_cap is not None and ratio_cap <= 1 + clip_high:
            raise ValueError(f"loss.ratio_cap is {ratio_cap}; below 1 + clip_high = {1 + clip_high} it would undo the clip, use more.")
        if dual_clip is not None and dual_clip <= 1:
            raise ValueError(f"loss.dual_clip is {dual_clip}; it must exceed 1.")
        self.clip_low, self.clip_high, self.ratio, self.ratio_cap, self.dual_clip = clip_low, clip_high, ratio, ratio_cap, dual_clip

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`PolicyLoss`. Statistics: ``clip_fraction``, the share of tokens whose gradient the clip takes away."""
        difference = log_ratio(batch.log_probs, batch.old_log_probs, batch.mask)
        if self.ratio == "sequence":
            difference = sequence_log_ratio(difference, batch.mask)
        elif self.ratio == "sequence_token":
            difference = sequence_token_log_ratio(batch.log_probs, difference, batch.mask)
        ratio, advantages = difference.exp(), batch.advantages
        loss = clipped_surrogate(ratio, advantages, self.clip_low, self.clip_high, self.ratio_cap, self.dual_clip)
        clipped = ((ratio < 1 - self.clip_low) & (advantages < 0)) | ((ratio > 1 + self.clip_high) & (advantages > 0))
        return loss, {"clip_fraction": clipped.float()}


class CISPOLoss:
    """Clipped importance weights as constants; see :func:`theodolite.functional.policy_loss.cispo_surrogate`.

    Args:
        ratio_cap: Upper bound of the weight, a ratio.
        ratio_floor: Lower bound, a ratio; 0 = one-sided.
    """

    linear = True

    def __init__(self, ratio_cap: float = 5.0, ratio_floor: float = 0.0) -> None:
        if not 0 <= ratio_floor < ratio_cap:
            raise ValueError(f"Ratios in [{ratio_floor}, {ratio_cap}] do not exist; use 0 <= ratio_floor < ratio_cap.")
        self.ratio_cap, self.ratio_floor = ratio_cap, ratio_floor

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`PolicyLoss`. Statistics: ``clip_fraction``, the share of tokens whose weight is at a bound."""
        ratio = log_ratio(batch.log_probs, batch.old_log_probs, batch.mask).exp()
        loss = cispo_surrogate(batch.log_probs, ratio, batch.advantages, self.ratio_cap, self.ratio_floor)
        return loss, {"clip_fraction": ((ratio > self.ratio_cap) | (ratio < self.ratio_floor)).float()}


def build_loss(spec: dict[str, Any] | None, clip_low: float, clip_high: float) -> PolicyLoss:
    """The loss a config names, or the clipped surrogate.

    Args:
        spec: ``{"class_path": ..., "init_args": {...}}``, or None.
        clip_low: Of the default loss.
        clip_high: Of the default loss.

    Raises:
        ValueError: The class is not there, is no loss, or refuses its arguments.
    """
    if spec is None:
        return ClippedLoss(clip_low, clip_high)
    path = str(spec.get("class_path", ""))
    module, _, name = path.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)(**(spec.get("init_args") or {}))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"model.loss names {path!r}, which cannot be made: {error}") from error
    if not callable(made):
        raise ValueError(
            f"model.loss names {path!r}, which cannot be called with a TokenBatch; see theodolite.lightning_modules.grpo.losses."
        )
    return cast(PolicyLoss, made)
