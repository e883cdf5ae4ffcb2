"""Group-relative advantages.

All functions work on the *global* window (every rank's rewards, ordered by slot), so that a group or batch statistic is the same on
one process and on eight.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

AdvantageScale: TypeAlias = Literal["none", "group", "batch", "rloo"]

ZERO_VARIANCE_TOLERANCE = 1e-8
"""A group whose rewards differ by no more than this carries no signal; dividing float noise by its own spread would invent one."""


def group_advantages(values: Tensor, group_size: int, scale: AdvantageScale = "group", eps: float = 1e-4) -> Tensor:
    r"""Advantages of grouped rewards.

    With :math:`\bar R_g` the mean over the group's scorable samples and :math:`s` an unbiased standard deviation,

    .. math::
        A_i = R_i - \bar R_g \;(\text{none}),\qquad \frac{R_i - \bar R_g}{s_g + \epsilon} \;(\text{group}),\qquad
        \frac{R_i - \bar R_g}{s_\text{batch} + \epsilon} \;(\text{batch}),\qquad \frac{n_g}{n_g - 1}(R_i - \bar R_g) \;(\text{rloo}).

    ``none`` is Dr. GRPO (arXiv 2503.20783), ``group`` is GRPO (arXiv 2402.03300), ``batch`` scales by the spread of the whole window,
    ``rloo`` is the leave-one-out baseline (arXiv 2402.14740): each reward against the mean of the *others*, with n_g scorable samples.

    Args:
        values: (n,) rewards, groups contiguous. NaN marks a sample that could not be scored: it leaves every statistic and gets 0.
        group_size: Completions per prompt; must divide n.
        scale: What the centred reward is divided by.
        eps: Added to the standard deviation.

    Returns:
        (n,) advantages in float64. A group whose rewards are all equal (up to 1e-8), or with fewer than two scorable samples, gets 0.

    Raises:
        ValueError: If ``group_size`` is below 2 or does not divide n, or a reward is infinite.
    """
    if group_size < 2:
        raise ValueError(f"A group of {group_size} has no relative advantage; use a group_size of at least 2.")
    if values.ndim != 1 or values.numel() % group_size:
        raise ValueError(f"{tuple(values.shape)} rewards do not form groups of {group_size}.")
    if values.isinf().any():
        raise ValueError("A reward is infinite, which no mean survives; give a finite number, or NaN where a sample could not be scored.")
    groups = values.to(torch.float64).view(-1, group_size)
    scorable = ~groups.isnan()
    mean = groups.nanmean(dim=1, keepdim=True)
    centred = torch.where(scorable, groups - mean, 0.0)
    if scale == "group":
        count = scorable.sum(dim=1, keepdim=True)
        deviation = (centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
        centred = centred / (deviation + eps)
    elif scale == "batch":
        scored = groups[scorable]
        deviation = scored.std(correction=1) if scored.numel() > 1 else torch.zeros((), dtype=torch.float64, device=groups.device)
        centred = centred / (deviation + eps)
    elif scale == "rloo":
        count = scorable.sum(dim=1, keepdim=True)
        centred = centred * count / (count - 1).clamp_min(1)
    centred = torch.where(has_signal(values, group_size)[:, None], centred, 0.0)
    return centred.reshape(-1)


def weighted_reward(components: Tensor, weights: Tensor) -> Tensor:
    r"""Several rewards as one: :math:`R_i = \sum_k w_k r_{ik}` over the components that could be scored.

    Args:
        components: (n, K) rewards; NaN = this function says nothing about this sample.
        weights: (K,).

    Returns:
        (n,) float64; NaN where *no* component was scored (such a sample must not enter a baseline as if it had earned 0).
    """
    components = components.to(torch.float64)
    total = (components.nan_to_num(nan=0.0) * weights.to(torch.float64)).sum(dim=1)
    return torch.where(components.isnan().all(dim=1), torch.nan, total)


def gdpo_advantages(components: Tensor, weights: Tensor, group_size: int, eps: float = 1e-4) -> Tensor:
    r"""Normalise every reward within its group, add, then whiten over the window (GDPO, arXiv 2601.05242).

    .. math:: S_i = \sum_k w_k \frac{r_{ik} - \bar r_{gk}}{s_{gk} + \epsilon},\qquad A_i = \frac{S_i - \bar S}{s_S + \epsilon}

    So a reward with a small range is not drowned by one with a large range, as it is when rewards are summed first.

    Args:
        components: (n, K) rewards, groups contiguous; NaN = not scored.
        weights: (K,).
        group_size: Completions per prompt.
        eps: Added to both standard deviations (unbiased ones).

    Returns:
        (n,) float64. Samples without any score get 0 and leave the statistics; so do groups in which no component varies.
    """
    normalised = [group_advantages(column, group_size, "group", eps) for column in components.T]
    total = torch.stack(normalised, dim=1) @ weights.to(torch.float64)
    alive = torch.stack([has_signal(column, group_size) for column in components.T], dim=1).any(dim=1).repeat_interleave(group_size)
    scored = alive & ~components.isnan().all(dim=1)
    if int(scored.sum()) < 2:
        return torch.zeros_like(total)
    kept = total[scored]
    return torch.where(scored, (total - kept.mean()) / (kept.std(correction=1) + eps), 0.0)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    r"""DAPO's soft penalty for completions that come near the limit (arXiv 2503.14476, eq. 13).

    0 up to :math:`L_\text{max} - L_\text{buffer}` tokens, then falling linearly to -1 at :math:`L_\text{max}`.

    Args:
        lengths: (n,) completion lengths in tokens.
        max_length: :math:`L_\text{max}`.
        buffer: :math:`L_\text{buffer}`, in 1..max_length.

    Returns:
        (n,) float64 in [-1, 0], to be added to the rewards.

    Raises:
        ValueError: For a buffer outside 1..max_length.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"An overlong buffer of {buffer} tokens does not fit a limit of {max_length}; use 1 to {max_length}.")
    return ((max_length - buffer - lengths.to(torch.float64)) / buffer).clamp(-1.0, 0.0)


def has_signal(values: Tensor, group_size: int) -> Tensor:
    """Which groups can teach anything: ``max - min > 1e-8`` over at least two scorable samples.

    Args:
        values: (n,) rewards, groups contiguous, NaN = not scorable.
        group_size: Completions per prompt.

    Returns:
        (n / group_size,) booleans, independent of how advantages are scaled.
    """
    groups = values.to(torch.float64).view(-1, group_size)
    scorable = ~groups.isnan()
    highest = torch.where(scorable, groups, -torch.inf).amax(dim=1)
    lowest = torch.where(scorable, groups, torch.inf).amin(dim=1)
    return (scorable.sum(dim=1) > 1) & (highest - lowest > ZERO_VARIANCE_TOLERANCE)
