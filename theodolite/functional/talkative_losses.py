"""Losses of a talkative autoencoder: how far a reconstruction is from its vector, and what its text costs.

Everything is per row or per token; the caller weighs and sums, so that a total does not depend on microbatches or ranks.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

ReconstructionLoss: TypeAlias = Literal["relative_mse", "directional", "mse"]


def relative_mse(reconstruction: Tensor, target: Tensor) -> Tensor:
    r"""Squared error as a share of the vector's own square, :math:`\|\hat a - a\|^2 / \|a\|^2`.

    Args:
        reconstruction: (B, d).
        target: (B, d); a zero row has no relative error and gives infinity (NaN where its reconstruction is zero too).

    Returns:
        (B,) in the inputs' dtype.
    """
    return (reconstruction - target).square().sum(-1) / target.square().sum(-1)


def mean_squared_error(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Squared error, mean over dimensions: (B, d), (B, d) -> (B,)."""
    return (reconstruction - target).square().mean(-1)


def directional_error(reconstruction: Tensor, target: Tensor) -> Tensor:
    r"""Mean squared error of both sides scaled to norm :math:`\sqrt d`, which is :math:`2 (1 - \cos)`, in [0, 4].

    A reconstruction of zero length has no direction and counts as orthogonal: 2.

    Args:
        reconstruction: (B, d).
        target: (B, d).

    Returns:
        (B,).
    """
    return 2 * (1 - torch.nn.functional.cosine_similarity(reconstruction, target, dim=-1))


RECONSTRUCTION_LOSSES = {"relative_mse": relative_mse, "directional": directional_error, "mse": mean_squared_error}
"""By the name that configs use."""


def kl_to_reference(reference_logits: Tensor, logits: Tensor) -> Tensor:
    r"""Per token :math:`KL(P_\text{ref} \| P) = \sum_v P_\text{ref}(v) (\log P_\text{ref}(v) - \log P(v))`.

    Tokens that both forbid (minus infinity) contribute nothing.

    Args:
        reference_logits: (B, T, V).
        logits: (B, T, V), differentiable.

    Returns:
        (B, T), not negative up to rounding.
    """
    reference = _log_softmax(reference_logits)
    return (reference.exp() * (_finite(reference) - _finite(_log_softmax(logits)))).sum(-1)


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of every token's distribution in nats: (B, T, V) -> (B, T). Forbidden tokens (minus infinity) contribute nothing."""
    log_probs = _log_softmax(logits)
    return -(log_probs.exp() * _finite(log_probs)).sum(-1)


def gumbel_noise(uniforms: Tensor) -> Tensor:
    r"""Standard Gumbel variates :math:`-\log(-\log u)` of uniform numbers in [0, 1); the ends are moved inside by 2^-53."""
    inside = uniforms.double().clamp(2.0**-53, 1 - 2.0**-53)
    return -(-inside.log()).log()


def straight_through_gumbel(logits: Tensor, noise: Tensor, tau: float) -> Tensor:
    r"""A one-hot sample forward, the gradient of its soft relaxation backward (Jang et al., arXiv 1611.01144).

    Forward: the one-hot of :math:`\arg\max_v (\ell_v + g_v)`, an exact sample of :math:`\operatorname{softmax}(\ell)` whatever
    :math:`\tau` is. Backward: the gradient of :math:`\operatorname{softmax}((\ell + g) / \tau)`.

    Args:
        logits: (..., V), already divided by the sampling temperature.
        noise: (..., V) standard Gumbel variates.
        tau: Temperature of the relaxation, above 0; it shapes the gradient only.

    Returns:
        (..., V), exactly 0 and 1 in the forward pass.
    """
    perturbed = logits + noise.to(logits)
    soft = (perturbed / tau).softmax(-1)
    hard = torch.nn.functional.one_hot(perturbed.argmax(-1), logits.shape[-1]).to(soft)
    return hard + (soft - soft.detach())


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def _finite(log_probs: Tensor) -> Tensor:
    """0 for minus infinity *before* anything is multiplied with it: 0 times infinity would be NaN in the gradient."""
    return torch.where(log_probs.isinf(), 0.0, log_probs)
