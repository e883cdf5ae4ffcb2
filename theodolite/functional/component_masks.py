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


@dataclass(frozen=True, slots=True)
class SourceMask(ComponentMask):
    """The mask ``g + (1 - g) r`` that a source r stands for. It is never stored: see :func:`scaled_acts`.

    Attributes:
        importance: (..., C) lower causal importances g.
        source: r, (..., C), broadcastable to the importances.
    """

    importance: Tensor = field(kw_only=True)
    source: Tensor = field(kw_only=True)


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
    delta = None if source.shape[-1] == channels else source[..., channels]
    return SourceMask(None, delta, routing, importance=importance, source=source[..., :channels])


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
    """``a (g + (1 - g) r - d)`` as ``a ((r - d) + g (1 - r))``, with two passes over memory forward and five backward.

    By autograd it takes about three times as many, which is a third of an attack's time.
    """

    @staticmethod
    def forward(ctx: Any, acts: Tensor, importance: Tensor, source: Tensor, delta: Tensor | None) -> Tensor:
        offset = source if delta is None else source - delta[..., None]
        mask = torch.addcmul(offset, importance, 1 - source)
        ctx.save_for_backward(acts, importance, source, delta, mask if ctx.needs_input_grad[0] else None)
        return acts * mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        acts, importance, source, delta, mask = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        for_acts = (upstream * mask).to(acts.dtype) if wanted[0] else None
        product = upstream * acts
        for_delta = -product.sum(-1).sum_to_size(delta.shape).to(delta.dtype) if wanted[3] else None
        for_importance = (product * (1 - source)).sum_to_size(importance.shape).to(importance.dtype) if wanted[1] else None
        for_source = product.addcmul_(product, importance, value=-1).sum_to_size(source.shape).to(source.dtype) if wanted[2] else None
        return for_acts, for_importance, for_source, for_delta


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
        masks[name] = ComponentMask(
            torch.lerp(column, torch.ones_like(column), importance),
            noise[..., sum(sizes) + index] if delta else None,
            None if routing is None else routing[name],
        )
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
