"""Masks of components: what an ablation may do, and which positions it is routed through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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


def mask_from_source(importance: Tensor, source: Tensor, routing: Tensor | None = None) -> ComponentMask:
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
    component = torch.lerp(source[..., :channels].expand_as(importance), torch.ones_like(importance), importance)
    if source.shape[-1] == channels:
        return ComponentMask(component, None, routing)
    return ComponentMask(component, source[..., channels].expand(importance.shape[:-1]), routing)


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
