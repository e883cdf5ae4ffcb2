"""The threshold by which a BatchTopK coder runs on single tokens: tracked while training, or calibrated on held-out tokens.

BatchTopK keeps the k N largest activations of a batch, so what a token activates depends on its neighbours. At inference every latent
above one threshold is active instead. An exponential mean that starts at zero is far too low for hundreds of steps (after 150 steps with
decay 0.99, a k of 8 becomes an L0 of 38), hence the correction by its own accumulated weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = 12
"""Low bits of a float32 that :func:`activation_histogram` drops: 2^19 bins, each 1/2048 of its value wide."""

BINS = 1 << (31 - BITS)


def update_mean(state: Tensor, value: Tensor, decay: float) -> Tensor:
    r"""Exponential mean with bias correction, :math:`\theta_t = \sum_s \beta^{t-s} v_s / \sum_s \beta^{t-s}`.

    Args:
        state: (2,) float64, weighted sum and weight; zeros at the start.
        value: The batch's threshold.
        decay: beta.

    Returns:
        The new state; :func:`mean_of` reads it.
    """
    return decay * state + (1 - decay) * torch.stack([value.to(state), torch.ones_like(state[0])])


def mean_of(state: Tensor) -> Tensor:
    """The corrected mean of :func:`update_mean`'s state; 0 before the first value."""
    return torch.where(state[1] > 0, state[0] / state[1].clamp_min(torch.finfo(state.dtype).tiny), 0)


def activation_histogram(scores: Tensor) -> Tensor:
    """Counts of positive scores in bins of equal relative width, (BINS,) int64. Counts of parts, or of ranks, add up.

    The bit pattern of a positive float32 grows with its value, so its upper bits are the bin.
    """
    positive = scores[scores > 0].float()
    return torch.bincount(positive.view(torch.int32).to(torch.int64) >> BITS, minlength=BINS)


def threshold_for_count(histogram: Tensor, count: float) -> float:
    """The threshold that ``count`` of the histogram's scores exceed, to about 1 in 2000 of its value.

    Args:
        histogram: Summed :func:`activation_histogram`.
        count: k times the number of tokens.

    Returns:
        The threshold; 0 if there are not so many positive scores.
    """
    above = histogram.flip(0).cumsum(0).flip(0)  # scores in this bin or a higher one
    reaches = (above >= count).nonzero()
    if len(reaches) == 0:
        return 0.0
    index = int(reaches[-1])
    missing = count - (int(above[index + 1]) if index + 1 < len(above) else 0)
    low, high = (_lower_edge(edge) for edge in (index, index + 1))
    return high - (high - low) * missing / int(histogram[index])


def _lower_edge(index: int) -> float:
    value = torch.tensor(index << BITS, dtype=torch.int32).view(torch.float32).item()
    return value if math.isfinite(value) else torch.finfo(torch.float32).max
