"""Importance sampling: ratios of whole sequences, and corrections for a sampler whose numerics are not the trainer's.

Notation: ``mu`` is what the sampler reported, ``old`` the trainer's own log-probability of the same token under the same weights, ``pi``
the policy being trained; ``m`` is the loss mask and ``n_i`` its row sum.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from theodolite.functional.policy_loss import LOG_RATIO_BOUND

MismatchMode: TypeAlias = Literal["token_tis", "token_mis", "sequence_tis", "sequence_mis", "geometric_tis", "geometric_mis"]
MISMATCH_MODES: tuple[MismatchMode, ...] = (
    "token_tis",
    "token_mis",
    "sequence_tis",
    "sequence_mis",
    "geometric_tis",
    "geometric_mis",
)


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    r"""Length-normalised log-ratio of a sequence: GSPO, arXiv 2507.18071, eq. 7.

    .. math:: \log s_i = \frac{1}{n_i} \sum_t m_{it} (\log\pi_{it} - \log\text{old}_{it})

    Args:
        log_ratio: (B, T) per token, 0 where the mask is 0.
        mask: (B, T) loss mask.

    Returns:
        (B, 1); 0 for a row without loss tokens.
    """
    return (log_ratio * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp_min(1)


def sequence_token_log_ratio(log_probs: Tensor, log_ratio: Tensor, mask: Tensor) -> Tensor:
    r"""GSPO-token: the sequence's ratio as value, every token's own gradient (arXiv 2507.18071, eq. 13).

    .. math:: \log r_{it} = \log\pi_{it} - \operatorname{sg}(\log\pi_{it}) + \operatorname{sg}(\log s_i)

    With one advantage per sequence its gradient is that of :func:`sequence_log_ratio`; unlike it, advantages may differ by token.

    Returns:
        (B, T), 0 where the mask is 0.
    """
    own = torch.where(mask.bool(), log_probs - log_probs.detach(), 0.0)
    return torch.where(mask.bool(), own + sequence_log_ratio(log_ratio, mask).detach(), 0.0)


def mismatch_log_ratio(old_log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor) -> Tensor:
    """``sg(old - mu)`` on loss tokens, clamped to +-20; 0 elsewhere and where a sampler reported NaN. (B, T), without gradient."""
    gap = torch.where(mask.bool(), old_log_probs.detach() - sampler_log_probs, 0.0)
    return gap.nan_to_num(nan=0.0, posinf=LOG_RATIO_BOUND, neginf=-LOG_RATIO_BOUND).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def mismatch_weights(gap: Tensor, mask: Tensor, mode: MismatchMode, low: float, high: float) -> Tensor:
    r"""Weights that correct the policy loss for the sampler's own distribution (``d`` is :func:`mismatch_log_ratio`).

    =================  ===================================================================  ========================================
    mode               weight                                                               also called
    =================  ===================================================================  ========================================
    ``token_tis``      :math:`\min(e^{d_{it}}, C)`                                          truncated importance sampling
    ``token_mis``      :math:`e^{d_{it}}` if in :math:`[c, C]`, else 0                      masked importance sampling, IcePop
    ``sequence_tis``   :math:`\min(e^{\sum_t d_{it}}, C)`
    ``sequence_mis``   :math:`e^{\sum_t d_{it}}` if in :math:`[c, C]`, else 0
    ``geometric_tis``  :math:`\min(e^{\frac{1}{n_i}\sum_t d_{it}}, C)`                       the sequence's ratio per token, any length
    ``geometric_mis``  1 if :math:`e^{\frac{1}{n_i}\sum_t d_{it}}` in :math:`[c, C]`, else 0  rejection by geometric mean, any length
    =================  ===================================================================  ========================================

    Args:
        gap: (B, T) from :func:`mismatch_log_ratio`.
        mask: (B, T) loss mask.
        mode: Which correction.
        low: :math:`c`; not used by the truncated modes.
        high: :math:`C`.

    Returns:
        (B, T) for token modes, (B, 1) for the others. To be multiplied with the policy loss after its clip, not with a KL term.

    Raises:
        ValueError: For an unknown mode, or bounds that keep nothing.
    """
    if mode not in MISMATCH_MODES:
        raise ValueError(f"Unknown mismatch mode {mode!r}; choose one of {', '.join(MISMATCH_MODES)}.")
    if not 0 <= low < high:
        raise ValueError(f"Mismatch bounds [{low}, {high}] keep nothing; use 0 <= low < high.")
    if mode.startswith("token"):
        ratio = gap.exp()
    else:
        total = (gap * mask).sum(dim=1, keepdim=True)
        mean = total / mask.sum(dim=1, keepdim=True).clamp_min(1)
        ratio = (mean if mode.startswith("geometric") else total.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)).exp()
    if mode.endswith("tis"):
        return ratio.clamp_max(high)
    kept = (ratio >= low) & (ratio <= high)
    return torch.where(kept, torch.ones_like(ratio) if mode == "geometric_mis" else ratio, 0.0)


def mismatch_statistics(gap: Tensor, mask: Tensor, weights: Tensor) -> dict[str, tuple[float, float]]:
    """How far sampler and trainer are apart, as (sum, count) pairs.

    Args:
        gap: (B, T) from :func:`mismatch_log_ratio`.
        mask: (B, T) loss mask.
        weights: (B, T) how often every token counts, 0 where the mask is 0.

    Returns:
        ``sampler_gap`` (mean absolute log-ratio of a token), ``sampler_kl`` (``E[e^d - d - 1]``, the k3 estimate of KL(mu || old)) and
        ``sampler_sequence_ratio`` (mean over sequences of the product of ratios: 1 for equal distributions).
    """
    tokens = float(weights.sum())
    rows = weights.amax(dim=1)
    products = (gap * mask).sum(dim=1).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    return {
        "sampler_gap": (float((gap.abs() * weights).sum()), tokens),
        "sampler_kl": (float(((gap.exp() - gap - 1) * weights).sum()), tokens),
        "sampler_sequence_ratio": (float((products * rows).sum()), float(rows.sum())),
    }
