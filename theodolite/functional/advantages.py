"""Group-relative advantages.

All functions work on the *global* window (every rank's rewards, ordered by slot), so that a group or batch statistic is the same on
one process and on eight.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

AdvantageScale: TypeAlias = Literal["none", "group", "batch"]

ZERO_VARIANCE_TOLERANCE = 1e-8
"""A group whose rewards differ by no more than this carries no signal; dividing float noise by its own spread would invent one."""


def group_advantages(values: Tensor, group_size: int, scale: AdvantageScale = "group", eps: float = 1e-4) -> Tensor:
    r"""Advantages of grouped rewards.

    With :math:`\bar R_g` the mean over the group's scorable samples and :math:`s` an unbiased standard deviation,

    .. math::
        A_i = R_i - \bar R_g \;(\text{none}),\qquad \frac{R_i - \bar R_g}{s_g + \epsilon} \;(\text{group}),\qquad
        \frac{R_i - \bar R_g}{s_\text{batch} + \epsilon} \;(\text{batch}).

    ``none`` is Dr. GRPO (arXiv 2503.20783), ``group`` is GRPO (arXiv 2402.03300), ``batch`` scales by the spread of the whole window.

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
    centred = torch.where(has_signal(values, group_size)[:, None], centred, 0.0)
    return centred.reshape(-1)


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
