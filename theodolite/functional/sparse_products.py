"""Encoder and decoder on the active entries alone, forward and backward.

A dense training step of a sparse coder is five products of 2 N d M operations. With k of M latents active only the encoder's forward
product needs all of them; the other four touch N k rows of length d. They are sums of bags of rows, so everything here is
``embedding_bag``, which runs on CPU and GPU alike: bags of one token for the decoder, bags of one latent for the weights' gradients.

Nested prefixes cost one decode: the entries of a token are cut into blocks at the prefixes, each block is one bag, and a cumulative sum
over blocks gives all reconstructions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from theodolite.functional.sparse_codes import SparseCodes


def encode_sparsely(inputs: Tensor, weight: Tensor, bias: Tensor, codes: SparseCodes) -> SparseCodes:
    r"""Give selected activations their gradient.

    The values :math:`a_{ni} = w_i \cdot x_n + b_i` are known from the selection; this attaches the backward pass, in which

    .. math:: \partial w_i = \sum_{n: a_{ni}\,\text{active}} g_{ni} x_n ,\qquad \partial b_i = \sum_n g_{ni} ,\qquad
        \partial x_n = \sum_i g_{ni} w_i .

    Args:
        inputs: (N, d_in).
        weight: (M, d_in).
        bias: (M,).
        codes: The selection; entries of value 0 get no gradient, as behind a ReLU. Use values of any sign by selecting with raw ones:
            only exact zeros are taken for inactive.

    Returns:
        The same codes, differentiable.
    """
    return codes.with_values(cast(Tensor, _SparseEncoder.apply(inputs, weight, bias, codes)))


def decode_blocks(codes: SparseCodes, weight: Tensor, prefixes: Tensor) -> Tensor:
    """What each block of latents between two prefixes adds to the reconstruction.

    Args:
        codes: Active entries.
        weight: (M, d_out) decoder.
        prefixes: (G,) increasing, the last one M: block g holds the latents from ``prefixes[g - 1]`` (0 for the first) to ``prefixes[g]``.

    Returns:
        (N, G, d_out); the cumulative sum over G gives the nested reconstructions without bias.
    """
    groups = len(prefixes)
    bags = codes.rows if groups == 1 else codes.rows * groups + torch.searchsorted(prefixes, codes.latents, right=True)
    starts = torch.searchsorted(bags, torch.arange(codes.n_rows * groups, device=bags.device))
    values = codes.values.to(weight.dtype)
    blocks = F.embedding_bag(codes.latents, weight.detach(), starts, mode="sum", per_sample_weights=values)
    if weight.requires_grad:
        blocks = cast(Tensor, _DecoderWeightGradient.apply(blocks, weight, values.detach(), bags, codes))
    return blocks.view(codes.n_rows, groups, weight.shape[1])


def decode(codes: SparseCodes, weight: Tensor) -> Tensor:
    """(N, d_out) sum of the active decoder rows: one block over all latents."""
    return decode_blocks(codes, weight, torch.tensor([codes.n_latents], device=weight.device))[:, 0]


class _SparseEncoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, codes: SparseCodes) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(inputs, weight)
        return codes.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        codes: SparseCodes = ctx.codes
        inputs, weight = ctx.saved_tensors
        gradient = torch.where(codes.values != 0, gradients[0], 0).to(weight.dtype)
        wanted = ctx.needs_input_grad
        d_inputs = _sum_rows(weight, codes.latents, _row_starts(codes), gradient) if wanted[0] else None
        d_weight = _sum_by_latent(inputs.to(weight.dtype), codes.rows, gradient, codes) if wanted[1] else None
        d_bias = gradient.new_zeros(codes.n_latents).index_add_(0, codes.latents, gradient) if wanted[2] else None
        return d_inputs, d_weight, d_bias, None


class _DecoderWeightGradient(torch.autograd.Function):
    """Passes blocks through; in the backward pass the decoder's rows get their gradient, summed latent by latent."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, weight: Tensor, values: Tensor, bags: Tensor, codes: SparseCodes) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(values, bags)
        return blocks.view_as(blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, bags = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        return gradient, _sum_by_latent(gradient, bags, values, ctx.codes), None, None, None


def _sum_by_latent(vectors: Tensor, entries: Tensor, weights: Tensor, codes: SparseCodes) -> Tensor:
    """(M, d) sums over each latent's entries of ``weights[entry] * vectors[entries[entry]]``."""
    order, starts = codes.by_latent
    return _sum_rows(vectors, entries[order], starts, weights[order])


def _sum_rows(vectors: Tensor, indices: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(indices, vectors, starts, mode="sum", per_sample_weights=weights.to(vectors.dtype))


def _row_starts(codes: SparseCodes) -> Tensor:
    return torch.searchsorted(codes.rows, torch.arange(codes.n_rows, device=codes.rows.device))
