"""The loss of one step: this rank's share of a sum over the global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from theodolite.functional.sparse_codes import SparseCodes, above_threshold, topk_codes
from theodolite.functional.sparse_products import decode_blocks, encode_sparsely
from theodolite.functional.transcoder_losses import (
    AuxiliaryResidual,
    auxiliary_loss,
    dense_blocks,
    jumprelu,
    jumprelu_l0,
    nested_loss,
    nested_reconstructions,
)

from .selection import Moments, global_batch_topk
from .transcoder import Transcoder


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What is added to the nested loss, and how it is weighted.

    Attributes:
        weights: (G,) weights of the prefixes, sum 1.
        auxiliary: Weight of the dead latents' loss.
        auxiliary_k: Dead latents per token.
        auxiliary_levels: Each dead latent explains what is left after its own prefix.
        dead_after_tokens: When a latent counts as dead.
        l0_coefficient: Weight of the mean number of active latents (``jumprelu``).
        width: Of the kernel of ``jumprelu``.
    """

    weights: Tensor
    auxiliary: float
    auxiliary_k: int
    auxiliary_levels: bool
    dead_after_tokens: int
    l0_coefficient: float
    width: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """Of this rank's rows.

    Attributes:
        loss: Scalar to differentiate; summed over ranks it is the loss.
        residuals: (G,) float64 residual sums of squares by prefix.
        auxiliary: Scalar, the dead latents' loss before its weight (0 without dead latents).
        codes: Active latents.
        threshold: Of the batch's selection; None where there is none.
    """

    loss: Tensor
    residuals: Tensor
    auxiliary: Tensor
    codes: SparseCodes
    threshold: Tensor | None


def training_loss(coder: Transcoder, inputs: Tensor, target: Tensor, moments: Moments, settings: LossSettings) -> StepResult:
    """Nested reconstruction loss and what the settings add to it.

    Args:
        coder: The coder; nothing of it is changed.
        inputs: (N, d_in) normalised, this rank's rows.
        target: (N, d_out) normalised.
        moments: Of the target over the global batch.
        settings: See there.
    """
    if coder.activation == "jumprelu":
        return _dense_loss(coder, inputs, target, moments, settings)
    with torch.no_grad():
        scores = coder.scores(inputs)
    codes, threshold = _select(coder, scores, moments.count)
    codes = encode_sparsely(inputs, coder.W_enc, coder.b_enc, coder.unscaled(codes))
    blocks = decode_blocks(codes, coder.W_dec, coder.prefixes)
    reconstructions = nested_reconstructions(blocks, coder.base(inputs))
    variance = moments.variance.to(target.dtype)
    loss, residuals = nested_loss(reconstructions, target, settings.weights, variance)
    extra = loss.new_zeros(())
    dead = coder.tokens_since_active >= settings.dead_after_tokens
    if settings.auxiliary > 0 and bool(dead.any()):
        goal = _goal(coder, target - reconstructions.detach().transpose(0, 1), settings.auxiliary_levels)
        extra = auxiliary_loss(
            inputs, coder.W_enc, coder.b_enc, coder.W_dec, scores, dead, settings.auxiliary_k, goal, variance
        )  # fmt: skip
        loss = loss + settings.auxiliary * extra
    return StepResult(loss, residuals, extra.detach(), codes, threshold)


def _select(coder: Transcoder, scores: Tensor, count: int) -> tuple[SparseCodes, Tensor | None]:
    if coder.activation == "topk":
        return topk_codes(scores, coder.k), None
    return global_batch_topk(scores, coder.k * count)


def _goal(coder: Transcoder, residuals: Tensor, levels: bool) -> AuxiliaryResidual:
    """``residuals`` is (G, N, d)."""
    chosen = residuals if levels else residuals[-1:]
    return AuxiliaryResidual(chosen.transpose(0, 1), coder.prefixes if levels else coder.prefixes[-1:])


def _dense_loss(coder: Transcoder, inputs: Tensor, target: Tensor, moments: Moments, settings: LossSettings) -> StepResult:
    """JumpReLU: the thresholds learn from pre-activations near them, so all latents take part."""
    assert coder.log_threshold is not None
    scores = torch.relu(torch.addmm(coder.b_enc, inputs, coder.W_enc.t()))
    threshold = coder.log_threshold.exp()
    activations = jumprelu(scores, threshold, settings.width)
    reconstructions = nested_reconstructions(dense_blocks(activations, coder.W_dec, coder.prefixes), coder.base(inputs))
    loss, residuals = nested_loss(reconstructions, target, settings.weights, moments.variance.to(target.dtype))
    loss = loss + settings.l0_coefficient * jumprelu_l0(scores, threshold, settings.width) / moments.count
    codes = above_threshold(scores.detach(), threshold.detach())
    return StepResult(loss, residuals, loss.new_zeros(()).detach(), codes, None)
