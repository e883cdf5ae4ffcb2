"""The hot products of an attack, in which only sources and activations are differentiated, written out for speed.

Weights are constants here. A product's rows begin at cache lines: with 650 columns of float32 a matrix product is a quarter faster than
where they begin anywhere, with 4019 columns by more than a third (one thread of an AMD EPYC).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from theodolite.functional.component_masks import SourceMask

CACHE_LINE = 64
"""Bytes."""


def aligned_empty(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows, columns) without values, of the dtype and on the device of ``like``, whose rows lie a whole number of cache lines apart."""
    numbers = CACHE_LINE // like.element_size()
    return like.new_empty(rows, -(-columns // numbers) * numbers)[:, :columns]


def _product(inputs: Tensor, weight: Tensor) -> Tensor:
    flat = inputs.flatten(0, -2)
    result = aligned_empty(flat.shape[0], weight.shape[1], flat)
    return torch.mm(flat, weight, out=result).unflatten(0, inputs.shape[:-1])


class _ConstantProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(inputs, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return _product(upstream, weight.T), None


def constant_product(inputs: Tensor, weight: Tensor) -> Tensor:
    """``inputs @ weight``, (..., d_in) and (d_in, d_out), differentiable in the inputs alone."""
    if inputs.ndim < 2 or not _plain(inputs, weight):
        return inputs @ weight.detach()
    result = _ConstantProduct.apply(inputs, weight.detach())
    assert isinstance(result, Tensor)
    return result


def _plain(*tensors: Tensor) -> bool:
    """Whether a product needs no casts."""
    return len({tensor.dtype for tensor in tensors}) == 1 and not torch.is_autocast_enabled(tensors[0].device.type)


def can_attack(acts: Tensor, mask: SourceMask, write: Tensor) -> bool:
    """Whether :func:`attacked_output` computes this replacement: sources alone are differentiated, everywhere, in one precision."""
    whole, importance = mask.whole, mask.importance
    if whole is None or mask.routing is not None or importance.requires_grad or whole.ndim != acts.ndim or acts.ndim < 2:
        return False
    return _plain(acts, importance, whole, write)


def attacked_output(acts: Tensor, target: Tensor | None, bias: Tensor | None, mask: SourceMask, write: Tensor) -> Tensor:
    """``d (x W) + (a * (g + (1 - g) r - d)) U + bias``: what a module gives under a source, differentiable in a, x W and the source alone.

    Args:
        acts: (..., C) component activations a.
        target: (..., d_out) the module's own output ``x W + bias``; None if the source has no delta component (d = 0).
        bias: (d_out,) of the module, or None.
        mask: With its ``whole`` source; see :func:`can_attack`.
        write: (C, d_out) the components' U.
    """
    assert mask.whole is not None
    result = _AttackedOutput.apply(acts, target, mask.whole, mask.importance, write.detach(), bias)
    assert isinstance(result, Tensor)
    return result


class _AttackedOutput(torch.autograd.Function):
    """Keeps activations and the target's output, but no mask: making it again is cheaper than fetching it from memory."""

    @staticmethod
    def forward(
        ctx: Any, acts: Tensor, target: Tensor | None, source: Tensor, importance: Tensor, write: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(acts, target, source, importance, write, bias)
        delta = None if target is None else source[..., -1:]
        masked = _scale(importance, source, with_delta=target is not None).mul_(acts)
        result = _base(acts, target, delta, bias, write.shape[1]).flatten(0, -2)
        return result.addmm_(masked.flatten(0, -2), write).unflatten(0, acts.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        acts, target, source, importance, write, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        read = _product(upstream, write.T)
        for_acts = _scale(importance, source, with_delta=target is not None).mul_(read) if wanted[0] else None
        for_source = _source_gradient(target, source, importance, bias, upstream, read.mul_(acts)) if wanted[2] else None
        return for_acts, (upstream * source[..., -1:] if wanted[1] else None), for_source, None, None, None


def _like(acts: Tensor) -> Tensor:
    return aligned_empty(acts[..., 0].numel(), acts.shape[-1], acts).unflatten(0, acts.shape[:-1])


def _scale(importance: Tensor, source: Tensor, with_delta: bool) -> Tensor:
    """``g + (1 - g) r - d``, or without d, (..., C)."""
    result = _like(importance)
    columns = source[..., : importance.shape[-1]]
    if source.shape[:-1] == importance.shape[:-1]:
        torch.lerp(columns, source.new_ones(()), importance, out=result)
        return result.sub_(source[..., -1:]) if with_delta else result
    start = columns - source[..., -1:] if with_delta else columns  # what is smaller than the importances costs nothing
    return torch.addcmul(start, importance, 1 - columns, out=result)


def _base(acts: Tensor, target: Tensor | None, delta: Tensor | None, bias: Tensor | None, width: int) -> Tensor:
    """What the components' part is added to, a tensor of its own: exactly the target's output at d = 1."""
    if target is None or delta is None:
        zero = acts.new_zeros(*acts.shape[:-1], width)
        return zero if bias is None else zero.add_(bias)
    return target * delta if bias is None else torch.addcmul(target, target - bias, delta - 1)


def _source_gradient(
    target: Tensor | None, source: Tensor, importance: Tensor, bias: Tensor | None, upstream: Tensor, product: Tensor
) -> Tensor:
    """Gradient as the source is shaped; ``product`` is ``a * (upstream U')``, which is changed."""
    for_delta = None
    if target is not None:
        direct = upstream * (target if bias is None else target - bias)
        for_delta = direct.sum(-1, keepdim=True).sub_(product.sum(-1, keepdim=True))
    product.addcmul_(product, importance, value=-1)
    parts = [product] if for_delta is None else [product, for_delta]
    return torch.cat([part.sum_to_size(*source.shape[:-1], part.shape[-1]) for part in parts], dim=-1)
