"""Policy-gradient losses on token tensors, and the weights that turn tokens into a window's loss.

A window is everything between two optimizer steps, over all microbatches and ranks. Its loss is ``sum(weight * token_loss)`` where the
weights hold the *global* denominator. So the gradient is a plain sum over microbatches and ranks, however they were split; nothing is
ever divided by an accumulation count or averaged per rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Aggregation: TypeAlias = Literal["dapo", "dr_grpo", "grpo", "seq_mean_token_sum"]
KLEstimator: TypeAlias = Literal["k2", "k3", "k3_is"]

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to this before ``exp``; beyond it the ratio is an overflow, not information."""


@dataclass(frozen=True, slots=True)
class WindowTotals:
    """Global counts of one window, summed over ranks before its first backward pass.

    Attributes:
        tokens: Loss tokens.
        sequences: Rollouts with at least one loss token.
        rollouts: All rollouts.
        max_length: Longest completion that sampling allowed, in tokens (a constant of the run, for ``dr_grpo``).
    """

    tokens: float
    sequences: float
    rollouts: float
    max_length: int


def token_weights(mask: Tensor, aggregation: Aggregation, totals: WindowTotals) -> Tensor:
    r"""Weight of every token in the window's loss.

    With :math:`m_{it}` the loss mask and :math:`n_i = \sum_t m_{it}`:

    ======================  ===========================================  ======================================
    aggregation             weight                                       source
    ======================  ===========================================  ======================================
    ``dapo``                :math:`m_{it} / \sum_{jt} m_{jt}`            DAPO, arXiv 2503.14476
    ``dr_grpo``             :math:`m_{it} / (N_\text{all} L_\text{max})`  Dr. GRPO, arXiv 2503.20783
    ``grpo``                :math:`m_{it} / (n_i N_\text{seq})`          GRPO, arXiv 2402.03300
    ``seq_mean_token_sum``  :math:`m_{it} / N_\text{seq}`                Dr. GRPO without its constant
    ======================  ===========================================  ======================================

    Args:
        mask: (B, T) loss mask of this microbatch, 0 or 1.
        aggregation: Which denominator.
        totals: Global counts of the window.

    Returns:
        (B, T) weights, 0 where the mask is 0. A window without tokens gives zeros, not NaN.

    Raises:
        ValueError: For an unknown aggregation.
    """
    if aggregation == "dapo":
        return mask / max(totals.tokens, 1.0)
    if aggregation == "dr_grpo":
        return mask / max(totals.rollouts * totals.max_length, 1.0)
    if aggregation == "grpo":
        return mask / mask.sum(dim=1, keepdim=True).clamp_min(1) / max(totals.sequences, 1.0)
    if aggregation == "seq_mean_token_sum":
        return mask / max(totals.sequences, 1.0)
    raise ValueError(f"Unknown aggregation {aggregation!r}; choose dapo, dr_grpo or grpo, or seq_mean_token_sum.")


def microbatch_token_mean(token_loss: Tensor, mask: Tensor) -> Tensor:
    """``bnpo``: the mean over one microbatch's own tokens. It changes with the split into microbatches: for parity with other code only.

    Args:
        token_loss: (B, T) of one microbatch.
        mask: (B, T) loss mask.
    """
    return (token_loss * mask).sum() / mask.sum().clamp_min(1)


def log_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """``log pi - log pi_old`` on loss tokens, 0 elsewhere, clamped to +-20 (a padding column must not become inf * 0 = NaN)."""
    return torch.where(mask.bool(), log_probs - old_log_probs, 0.0).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_cap: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    r"""PPO's clipped objective per token, as a loss.

    .. math:: L = -\min\big(r A,\; \operatorname{clip}(r, 1-\epsilon_\text{low}, 1+\epsilon_\text{high}) A\big)

    The minimum leaves one side open: for A < 0 a large ratio makes the loss, and its gradient, as large as it likes. Two ways to close it:
    ``ratio_cap`` replaces the first r by min(r, cap) (two-sided clipping, arXiv 2505.07291); ``dual_clip`` bounds the loss for A < 0 by
    -c A (arXiv 1912.09729).

    Args:
        ratio: (B, T) importance sampling ratios :math:`\pi/\pi_\text{old}`, or (B, 1) for one per sequence.
        advantages: (B, T), or (B, 1) for one advantage per rollout.
        clip_low: :math:`\epsilon_\text{low}`.
        clip_high: :math:`\epsilon_\text{high}`.
        ratio_cap: Absolute; must exceed 1 + clip_high to matter.
        dual_clip: c > 1.

    Returns:
        (B, T) loss per token, or (B, 1) where both arguments have one column.
    """
    free = ratio if ratio_cap is None else ratio.clamp_max(ratio_cap)
    loss = -torch.minimum(free * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    return loss if dual_clip is None else torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def cispo_surrogate(log_probs: Tensor, ratio: Tensor, advantages: Tensor, ratio_cap: float = 5.0, ratio_floor: float = 0.0) -> Tensor:
    r"""CISPO (MiniMax-M1, arXiv 2506.13585): the clipped ratio is a constant weight, so that no token ever loses its gradient.

    .. math:: L = -\operatorname{sg}\big(\operatorname{clip}(r, \text{floor}, \text{cap})\big)\, A \log\pi

    Both bounds are ratios, not distances from 1.

    Args:
        log_probs: (B, T) under the policy, differentiable.
        ratio: (B, T) or (B, 1) importance sampling ratios.
        advantages: (B, T) or (B, 1).
        ratio_cap: Upper bound of the weight.
        ratio_floor: Lower bound; 0 = one-sided.

    Returns:
        (B, T) loss per token.
    """
    return -ratio.detach().clamp(ratio_floor, ratio_cap) * advantages * log_probs


def kl_penalty(log_probs: Tensor, reference_log_probs: Tensor, ratio: Tensor, mask: Tensor, estimator: KLEstimator = "k3_is") -> Tensor:
    r"""Per-token estimate of :math:`KL(\pi\|\pi_\text{ref})` to be added to the loss with a coefficient.

    With :math:`d = \log\pi - \log\pi_\text{ref}`: ``k2`` is :math:`d^2/2` (exact reverse-KL gradient on policy, biased value), ``k3`` is
    :math:`e^{-d} + d - 1` (unbiased value, but its gradient is that of the *forward* KL), ``k3_is`` is :math:`r\,(e^{-d} + d - 1)` with a
    differentiable ratio, whose gradient is the reverse KL's on and off policy (DeepSeek-V3.2). See also Schulman, "Approximating KL
    divergence".

    Args:
        log_probs: (B, T) under the policy, differentiable.
        reference_log_probs: (B, T) under the reference policy.
        ratio: (B, T) importance sampling ratios, differentiable (used by ``k3_is``).
        mask: (B, T) loss mask.
        estimator: Which of the three.

    Returns:
        (B, T), 0 where the mask is 0.

    Raises:
        ValueError: For an unknown estimator.
    """
    difference = log_ratio(log_probs, reference_log_probs, mask)
    if estimator == "k2":
        return difference.square() / 2
    k3 = torch.exp(-difference) + difference - 1
    if estimator == "k3":
        return k3
    if estimator == "k3_is":
        return ratio * k3
    raise ValueError(f"Unknown KL estimator {estimator!r}; choose k2, k3 or k3_is.")
