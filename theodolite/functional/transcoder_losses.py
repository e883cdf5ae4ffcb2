"""Losses of transcoders and sparse autoencoders, as sums that add up over ranks.

Every function takes the total variance of the *global* batch and returns the share of the loss that belongs to the rows it was given, so
the sum over ranks of losses (and of gradients) is that of one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from theodolite.functional.sparse_codes import SparseCodes, largest_per_row
from theodolite.functional.sparse_products import decode_blocks, encode_sparsely


def nested_reconstructions(blocks: Tensor, base: Tensor) -> Tensor:
    r"""Reconstructions by prefix, :math:`R_g = \text{base} + \sum_{h \le g} \text{block}_h`.

    Args:
        blocks: (N, G, d) contributions of the blocks between prefixes.
        base: (d,) bias, or (N, d) bias and skip connection.

    Returns:
        (N, G, d).
    """
    base = base if base.ndim == 1 else base[:, None]
    return (blocks if blocks.shape[1] == 1 else blocks.cumsum(dim=1)) + base


def dense_blocks(activations: Tensor, decoder: Tensor, prefixes: Tensor) -> Tensor:
    """As :func:`theodolite.functional.sparse_products.decode_blocks`, from (N, M) activations that may all be active."""
    ends = [0, *prefixes.tolist()]
    return torch.stack([activations[:, a:b] @ decoder[a:b] for a, b in pairwise(ends)], dim=1)


def nested_loss(reconstructions: Tensor, target: Tensor, weights: Tensor, total_variance: Tensor) -> tuple[Tensor, Tensor]:
    r"""Weighted sum of the prefixes' fractions of variance unexplained.

    .. math:: L = \sum_g w_g \frac{\sum_n \lVert R_{g,n} - y_n \rVert^2}{\sum_n \lVert y_n - \bar y \rVert^2}

    The nested objective of Matryoshka representations (arXiv 2205.13147) for sparse dictionaries (arXiv 2503.17547), in units of the
    target's variance, so that it does not depend on the scale of the activations. With one prefix it is plain FVU.

    Args:
        reconstructions: (N, G, d).
        target: (N, d).
        weights: (G,) weights of the prefixes.
        total_variance: Scalar, the denominator over the global batch.

    Returns:
        The loss, and the (G,) residual sums of squares (detached, float64).
    """
    residuals = (reconstructions - target[:, None]).square().sum(dim=(0, 2))
    return (weights * residuals).sum() / total_variance, residuals.detach().double()


@dataclass(frozen=True, slots=True)
class AuxiliaryResidual:
    """What dead latents are asked to explain.

    Attributes:
        residual: (N, G, d) target minus reconstruction by prefix, detached: the auxiliary loss must not pull on the main one.
        prefixes: (G,) ends of the blocks. With one prefix all dead latents share the final residual; with several, those of block g get
            the residual that is left after block g.
    """

    residual: Tensor
    prefixes: Tensor


def auxiliary_loss(
    inputs: Tensor, weight: Tensor, bias: Tensor, decoder: Tensor, scores: Tensor, dead: Tensor, k: int, goal: AuxiliaryResidual,
    total_variance: Tensor,
) -> Tensor:  # fmt: skip
    r"""Let the ``k`` strongest dead latents of every token predict the residual (AuxK, arXiv 2406.04093).

    The *raw* pre-activations of the dead latents are used: behind a ReLU those that are dead for good would get no gradient.

    .. math:: L_\text{aux} = \min(n_\text{dead} / k, 1)\; \frac{1}{G} \sum_g
        \frac{\sum_n \lVert e_{g,n} - \hat e_{g,n} \rVert^2}{\sum_n \lVert y_n - \bar y \rVert^2}

    Args:
        inputs: (N, d_in).
        weight: (M, d_in) encoder.
        bias: (M,).
        decoder: (M, d_out).
        scores: (N, M) pre-activations, as they came from the encoder.
        dead: (M,) booleans, at least one true.
        k: Dead latents per token; fewer where there are fewer.
        goal: What they are to explain.
        total_variance: Denominator over the global batch.
    """
    candidates = dead.nonzero().squeeze(1)
    kept = min(k, len(candidates))
    chosen = candidates[largest_per_row(scores.detach()[:, candidates], kept)].sort(dim=1).values
    rows = torch.arange(len(scores), device=scores.device).repeat_interleave(kept)
    codes = SparseCodes(rows, chosen.reshape(-1), scores.detach().gather(1, chosen).reshape(-1), *scores.shape)
    explained = decode_blocks(encode_sparsely(inputs, weight, bias, codes), decoder, goal.prefixes)
    share = min(len(candidates) / k, 1.0)
    return share * (explained - goal.residual).square().sum() / (len(goal.prefixes) * total_variance)


class _JumpReLU(torch.autograd.Function):
    """z where z > threshold, else 0; the threshold's gradient by a rectangular kernel of a given width."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.width = width
        return torch.where(z > threshold, z, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, threshold = ctx.saved_tensors
        window = (z - threshold).abs() < ctx.width / 2
        return gradients[0] * (z > threshold), -(window * gradients[0]).sum(dim=0) * threshold / ctx.width, None


class _Step(torch.autograd.Function):
    """1 where z > threshold, else 0, with the same kernel."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.width = width
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, threshold = ctx.saved_tensors
        window = (z - threshold).abs() < ctx.width / 2
        return None, -(window * gradients[0]).sum(dim=0) / ctx.width, None


def jumprelu(z: Tensor, threshold: Tensor, width: float) -> Tensor:
    r"""JumpReLU, :math:`z\,H(z - \theta)`, with the straight-through gradient of its threshold (arXiv 2407.14435, eq. 9 and 11).

    Args:
        z: (N, M) pre-activations behind a ReLU.
        threshold: (M,) positive thresholds.
        width: Width of the kernel within which a threshold feels the pre-activations.
    """
    return _JumpReLU.apply(z, threshold, width)  # type: ignore[return-value]


def jumprelu_l0(z: Tensor, threshold: Tensor, width: float) -> Tensor:
    """Number of active latents over all rows, differentiable in the thresholds as :func:`jumprelu` is."""
    return _Step.apply(z, threshold, width).sum()  # type: ignore[union-attr]
