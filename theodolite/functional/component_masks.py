"""Masks of components: what an ablation may do, and which positions it is routed through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class ComponentMask:
    """How one module is replaced by its components.

    Attributes:
        component: (C,) or (..., C): multiplies the component activations; None = all ones.
        delta: (...): multiplies the delta component, what the components leave of the target's weight; None = it is left out.
        routing: (...) bool: positions at which the module is replaced; elsewhere it keeps its own output, bit for bit. None = everywhere.
    """

    component: Tensor | None = None
    delta: Tensor | None = None
    routing: Tensor | None = None

    def at(self, places: Tensor, leading: Sequence[int]) -> ComponentMask:
        """The mask of some positions, (n, C), routed everywhere.

        Args:
            places: (n,) indices of positions, each at most once, into the flattened leading shape.
            leading: Shape of all positions.
        """
        component = None if self.component is None else rows_at(self.component, places, leading)
        return ComponentMask(component, self._delta_at(places, leading))

    def _delta_at(self, places: Tensor, leading: Sequence[int]) -> Tensor | None:
        return None if self.delta is None else rows_at(self.delta.expand(*leading)[..., None], places, leading)[:, 0]


@dataclass(frozen=True, slots=True)
class SourceMask(ComponentMask):
    """The mask ``g + (1 - g) r`` that a source r stands for. It is never stored: see :func:`scaled_acts`.

    Attributes:
        importance: (..., C) lower causal importances g.
        source: r, (..., C), broadcastable to the importances.
        whole: (..., C + 1) the sources of components and delta, or (..., C) without delta, where one tensor holds them all.
    """

    importance: Tensor = field(kw_only=True)
    source: Tensor = field(kw_only=True)
    whole: Tensor | None = field(kw_only=True, default=None)

    def at(self, places: Tensor, leading: Sequence[int]) -> SourceMask:
        """See :class:`ComponentMask`."""
        importance, source = (rows_at(values, places, leading) for values in (self.importance, self.source))
        return SourceMask(None, ComponentMask._delta_at(self, places, leading), importance=importance, source=source)


def rows_at(values: Tensor, places: Tensor, leading: Sequence[int]) -> Tensor:
    """(n, k) values at some positions, of values (..., k) that broadcast to ``leading``; what has no leading shape stays as it is.

    Args:
        values: (..., k), (k,) or ().
        places: (n,) indices into the flattened leading shape, each at most once.
        leading: Shape of all positions.
    """
    if values.ndim <= 1:
        return values
    result = _Rows.apply(values.expand(*leading, values.shape[-1]).flatten(0, -2), places)
    assert isinstance(result, Tensor)
    return result


class _Rows(torch.autograd.Function):
    """Different rows of a matrix. Their gradient is copied back at once, where indexing would add it row after row."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rows = matrix.shape[0]
        return matrix.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors
        return upstream.new_zeros(ctx.rows, upstream.shape[1]).index_copy_(0, places, upstream), None


def mask_from_source(importance: Tensor, source: Tensor, routing: Tensor | None = None) -> SourceMask:
    """The mask that sources in [0, 1] stand for: ``g + (1 - g) r``, and for the delta component r itself.

    Args:
        importance: (..., C) lower causal importances g.
        source: (..., C) or (..., C + 1) with the delta component last; broadcastable to the importances' leading shape.
        routing: See :class:`ComponentMask`.

    Raises:
        ValueError: If the number of channels is neither C nor C + 1.
    """
    channels = importance.shape[-1]
    if source.shape[-1] not in (channels, channels + 1):
        raise ValueError(f"A source of {source.shape[-1]} channels does not fit {channels} components; give {channels} or {channels + 1}.")
    if source.shape[-1] == channels:
        return SourceMask(None, None, routing, importance=importance, source=source, whole=source)
    # split, because the backward passes of two slices would each make a gradient of the whole source
    components, delta = source.split([channels, 1], dim=-1)
    return SourceMask(None, delta.squeeze(-1), routing, importance=importance, source=components, whole=source)


def scaled_acts(acts: Tensor, mask: ComponentMask) -> Tensor:
    """``acts * m``, or ``acts * (m - d)`` under a delta mask d: what the components write beyond d times the target's own output.

    Args:
        acts: (..., C) component activations.
        mask: Their module's mask.
    """
    if isinstance(mask, SourceMask):
        result = _Interpolated.apply(acts, mask.importance, mask.source, mask.delta)
        assert isinstance(result, Tensor)
        return result
    if mask.delta is None:
        return acts if mask.component is None else acts * mask.component
    return acts * ((1 - mask.delta[..., None]) if mask.component is None else mask.component - mask.delta[..., None])


class _Interpolated(torch.autograd.Function):
    """``a (g + (1 - g) r - d)``, in two or three passes over memory forward and at most seven backward, and nothing but a and g is kept.

    By autograd it takes about three times as many, which is a third of an attack's time.
    """

    @staticmethod
    def forward(ctx: Any, acts: Tensor, importance: Tensor, source: Tensor, delta: Tensor | None) -> Tensor:
        ctx.save_for_backward(acts, importance, source, delta)
        return _times_mask(acts, importance, source, delta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        acts, importance, source, delta = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        for_acts = _times_mask(upstream, importance, source, delta).to(acts.dtype) if wanted[0] else None
        for_importance = for_source = for_delta = None
        if any(wanted[1:]):
            product = upstream * acts
            for_delta = -product.sum(-1).sum_to_size(delta.shape).to(delta.dtype) if wanted[3] else None
            if wanted[1]:
                for_importance = torch.addcmul(product, product, source, value=-1).sum_to_size(importance.shape).to(importance.dtype)
            if wanted[2]:
                for_source = product.addcmul_(product, importance, value=-1).sum_to_size(source.shape).to(source.dtype)
        return for_acts, for_importance, for_source, for_delta


def _times_mask(values: Tensor, importance: Tensor, source: Tensor, delta: Tensor | None) -> Tensor:
    """``values (g + (1 - g) r - d)``, with one tensor of the values' size made."""
    mask = mask_beyond_delta(importance, source, None if delta is None else delta[..., None])
    return mask.mul_(values) if mask.dtype == values.dtype and mask.shape == values.shape else mask * values


def mask_beyond_delta(importance: Tensor, source: Tensor, delta: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``g + (1 - g) r - d``: what the components write beyond d times the target's own output; exactly 0 where everything is on.

    Args:
        importance: (..., C) g.
        source: r, (..., C), broadcastable to the importances.
        delta: (..., 1) d, broadcastable; None = 0.
        out: (..., C) where the result goes; None = memory of its own.
    """
    if source.numel() == importance.numel():
        mask = torch.lerp(source, source.new_ones(()), importance, out=out)
        return mask if delta is None else mask.sub_(delta)
    # what is smaller than the importances costs nothing
    return torch.addcmul(source if delta is None else source - delta, importance, 1 - source, out=out)


def stochastic_masks(
    importances: Mapping[str, Tensor], noise: Tensor, delta: bool, binomial: bool = False, routing: Mapping[str, Tensor] | None = None
) -> dict[str, ComponentMask]:
    """Masks ``g + (1 - g) xi`` of all modules from one block of uniform numbers.

    Args:
        importances: (..., C_l) by module; a routing or noise column belongs to a module by its place in this order.
        noise: (..., sum of C_l + number of modules) uniform numbers: all components, then one delta per module.
        delta: Use the delta component; its mask is its noise (uniform also under binomial sampling).
        binomial: Round component noise to 0 or 1.
        routing: See :class:`ComponentMask`, by module.
    """
    sizes = [importance.shape[-1] for importance in importances.values()]
    noise = noise.to(next(iter(importances.values())).dtype)
    columns = noise[..., : sum(sizes)].split(sizes, dim=-1)
    masks: dict[str, ComponentMask] = {}
    for index, ((name, importance), column) in enumerate(zip(importances.items(), columns, strict=True)):
        column = (column >= 0.5).to(column.dtype) if binomial else column
        routed = None if routing is None else routing[name]
        masks[name] = SourceMask(None, noise[..., sum(sizes) + index] if delta else None, routed, importance=importance, source=column)
    return masks


def uniform_k_routing(names: Sequence[str], size_noise: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """At each position a random subset of k ~ U{1..M} of the M modules.

    Args:
        names: The modules, in the order of ``noise``.
        size_noise: (...) uniform numbers that decide k.
        noise: (M, ...) uniform numbers; the k modules with the smallest are routed.
    """
    count = len(names)
    k = (size_noise * count).floor().clamp_max(count - 1) + 1
    return routing_of_ranks(names, k, noise)


def routing_of_ranks(names: Sequence[str], k: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """The ``k`` (...) modules with the smallest ``noise`` (M, ...) at each position."""
    ranks = noise.argsort(dim=0).argsort(dim=0)
    return {name: ranks[index] < k for index, name in enumerate(names)}


def static_routing(names: Sequence[str], noise: Tensor, probability: float) -> dict[str, Tensor]:
    """Each module at each position on its own with ``probability``; ``noise`` is (M, ...) uniform numbers."""
    return {name: noise[index] < probability for index, name in enumerate(names)}
