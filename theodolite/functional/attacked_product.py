"""The hot products of an attack, in which only sources and activations are differentiated, written out for speed.

Weights are constants here, so each is laid out once for all steps of an attack: packed for oneDNN where that multiplies it (float32 on a
processor), a sixth faster than a weight as it lies (one thread of an AMD EPYC; ``make bench-pgd`` measures the whole).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from theodolite.functional.component_masks import SourceMask, mask_beyond_delta


def _onednn(tensor: Tensor) -> bool:
    """Whether oneDNN multiplies it better than the BLAS: by a tenth, and wherever rows begin (one thread of an AMD EPYC)."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and torch.backends.mkldnn.is_available()


def _product(flat: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _onednn(weight):
        return torch.ops.mkldnn._linear_pointwise(flat, weight.T, bias, "none", [], "")
    return flat @ weight if bias is None else torch.addmm(bias, flat, weight)


class _ConstantProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(inputs.flatten(0, -2), weight, bias).unflatten(0, inputs.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return _product(upstream.flatten(0, -2), weight.T).unflatten(0, upstream.shape[:-1]), None, None


def constant_product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``inputs @ weight + bias``, (..., d_in), (d_in, d_out) and (d_out,), differentiable in the inputs alone."""
    bias = None if bias is None else bias.detach()
    if inputs.ndim < 2 or not _plain(inputs, weight):
        return F.linear(inputs, weight.detach().T, bias)
    result = _ConstantProduct.apply(inputs, weight.detach(), bias)
    assert isinstance(result, Tensor)
    return result


def _plain(*tensors: Tensor) -> bool:
    """Whether a product needs no casts."""
    return len({tensor.dtype for tensor in tensors}) == 1 and not torch.is_autocast_enabled(tensors[0].device.type)


class ConstantWeight:
    """A matrix (d_in, d_out) that many inputs are multiplied with.

    Args:
        weight: The matrix.
        rows: Number of rows of the inputs, where there will be enough inputs that packing pays (about five); None = leave it as it is.
    """

    def __init__(self, weight: Tensor, rows: int | None) -> None:
        packs = rows is not None and _onednn(weight)  # by the operator that PyTorch's own compiler freezes weights with
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.T, rows) if packs else None
        self._weight = weight

    def times(self, flat: Tensor, plus: Tensor | None = None) -> Tensor:
        """``flat @ weight``, (rows, d_in) to (rows, d_out); with ``plus`` (rows, d_out) added, which may be overwritten."""
        if self._packed is None:
            return _product(flat, self._weight) if plus is None else plus.addmm_(flat, self._weight)
        if plus is None:
            return torch.ops.mkldnn._linear_pointwise(flat, self._packed, None, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(flat, plus, self._packed, None, "add")


class AttackedSite:
    """What stays the same at one module during an attack on one batch.

    Args:
        mask: With the importances g; its source may change.
        read: V (d_in, C).
        write: U (C, d_out).
        weight: W (d_in, d_out) of the target.
        bias: (d_out,) of the module, or None.
        pack: There will be enough steps that packing weights pays.

    Attributes:
        importance: (..., C) g.
        delta: The source has a delta component.
        bias: See above.
    """

    def __init__(self, mask: SourceMask, read: Tensor, write: Tensor, weight: Tensor, bias: Tensor | None, pack: bool) -> None:
        self.importance, self.delta, self.bias = mask.importance, mask.delta is not None, bias
        self._read, self._write, self._weight = read.detach(), write.detach(), weight.detach()
        self._rows = self.importance[..., 0].numel() if pack else None

    @cached_property
    def read(self) -> ConstantWeight:
        """V."""
        return ConstantWeight(self._read, self._rows)

    @cached_property
    def write(self) -> ConstantWeight:
        """U."""
        return ConstantWeight(self._write, self._rows)

    @cached_property
    def write_back(self) -> ConstantWeight:
        """U transposed."""
        return ConstantWeight(self._write.T, self._rows)

    @cached_property
    def read_back(self) -> ConstantWeight:
        """(C + d_out, d_in): V and W side by side, transposed, so that what returns through both is one product; without delta V alone."""
        return ConstantWeight((torch.cat([self._read, self._weight], dim=1) if self.delta else self._read).T, self._rows)


def can_attack(mask: SourceMask, *tensors: Tensor) -> bool:
    """Whether :func:`attacked_output` computes this replacement: sources alone are differentiated, everywhere, in one precision.

    Args:
        mask: Of the module.
        tensors: Weights and input of the module.
    """
    whole, importance = mask.whole, mask.importance
    if whole is None or mask.routing is not None or importance.requires_grad or whole.ndim != importance.ndim or whole.ndim < 2:
        return False
    return _plain(importance, whole, *tensors)


def attacked_output(
    inputs: Tensor, source: Tensor, site: AttackedSite, original: Callable[[Tensor], Tensor], known: tuple[Tensor, Tensor | None] | None
) -> Tensor:
    """``d (x W) + ((x V) * (g + (1 - g) r - d)) U + bias``: what a module gives under a source, differentiable in x and the source alone.

    Args:
        inputs: (..., d_in) x; not looked at where ``known`` is given.
        source: (..., C + 1), or (..., C) without delta component (d = 0); leading axes may be 1.
        site: Constants of the attack.
        original: The module's own forward.
        known: Component activations ``x V`` (..., C) and the module's own output (..., d_out) where they are no function of sources.
    """
    acts, target = (None, None) if known is None else known
    result = _AttackedOutput.apply(inputs, source, site, original, acts, target)
    assert isinstance(result, Tensor)
    return result


class _AttackedOutput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        source: Tensor,
        site: AttackedSite,
        original: Callable[[Tensor], Tensor],
        acts: Tensor | None,
        target: Tensor | None,
    ) -> Tensor:
        if acts is None:
            acts = site.read.times(inputs.flatten(0, -2)).view(site.importance.shape)
            target = original(inputs) if site.delta else None
        ctx.site = site
        ctx.save_for_backward(acts, target, source)  # and not the mask: to make it again costs no more than to fetch it from memory
        masked = _scale(site, source).mul_(acts).flatten(0, -2)
        return site.write.times(masked, _base(target, source, site)).unflatten(0, acts.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        acts, target, source = ctx.saved_tensors
        site: AttackedSite = ctx.site
        read = site.write_back.times(upstream.flatten(0, -2)).view(acts.shape)
        joined = _joined(read, upstream, source, site) if ctx.needs_input_grad[0] else None
        for_inputs = for_source = None
        if ctx.needs_input_grad[1]:  # before the next product, which would drive what it reads out of the cache
            direct = None if target is None else upstream * (target if site.bias is None else target - site.bias)
            for_source = _source_gradient(read.mul_(acts), direct, site.importance, source.shape)
        if joined is not None:
            for_inputs = site.read_back.times(joined.flatten(0, -2)).unflatten(0, acts.shape[:-1])
        return for_inputs, for_source, None, None, None, None


def _scale(site: AttackedSite, source: Tensor, out: Tensor | None = None) -> Tensor:
    """What activations are multiplied with, (..., C), in ``out`` or memory of its own."""
    components, delta = (source[..., :-1], source[..., -1:]) if site.delta else (source, None)
    return mask_beyond_delta(site.importance, components, delta, out)


def _base(target: Tensor | None, source: Tensor, site: AttackedSite) -> Tensor | None:
    """(rows, d_out) what the components' part is added to, a tensor of its own: exactly the target's output at d = 1."""
    if target is None:
        return None if site.bias is None else site.bias.repeat(site.importance[..., 0].numel(), 1)
    delta = source[..., -1:]
    base = target * delta if site.bias is None else torch.addcmul(target, target - site.bias, delta - 1)
    return base.flatten(0, -2)


def _joined(read: Tensor, upstream: Tensor, source: Tensor, site: AttackedSite) -> Tensor:
    """(..., C + d_out) what returns through V and, beside it, through W; without delta (..., C)."""
    columns = read.shape[-1]
    joined = read.new_empty(*read.shape[:-1], columns + (upstream.shape[-1] if site.delta else 0))
    _scale(site, source, joined[..., :columns]).mul_(read)
    if site.delta:
        torch.mul(upstream, source[..., -1:], out=joined[..., columns:])
    return joined


def _source_gradient(product: Tensor, direct: Tensor | None, importance: Tensor, shape: Sequence[int]) -> Tensor:
    """Gradient as the source is shaped.

    Args:
        product: (..., C) ``a * (upstream U')``, which is changed.
        direct: (..., d_out) ``upstream * (x W)``; None without delta component.
        importance: (..., C) g.
        shape: Of the source.
    """
    gradient = product.new_empty(shape)
    for_delta = None if direct is None else direct.sum(-1, keepdim=True).sub_(product.sum(-1, keepdim=True))
    columns = gradient[..., : importance.shape[-1]]
    if columns.shape == product.shape:
        torch.addcmul(product, product, importance, value=-1, out=columns)
    else:
        columns.copy_(product.addcmul_(product, importance, value=-1).sum_to_size(columns.shape))
    if for_delta is not None:  # last: one number per row, in memory that is then at hand
        gradient[..., -1:] = for_delta.sum_to_size(*shape[:-1], 1)
    return gradient
