"""Decompositions: what adversaries and figures may ask of a module that reconstructs a target model from masked parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class MaskedReconstruction(Protocol):
    """A module whose reconstruction of a target an adversary can attack through *sources*.

    A source is a number in [0, 1] per channel; the module turns sources into the masks they allow (for a decomposition with causal
    importance g, the mask ``g + (1 - g) * source``, and the mask of the delta component is its source itself). What the channels are
    is the module's own affair.
    """

    def leading_shape(self, batch: Any) -> tuple[int, ...]:
        """Shape of the batch without channels: ``(rows,)`` or ``(rows, positions)``. Rows are the first axis of every tensor in it."""
        ...

    def source_channels(self) -> dict[str, int]:
        """Number of source channels by site, in a fixed order: the components C, or C + 1 where a delta component comes last."""
        ...

    def prepare(self, batch: Any) -> Any:
        """What every step of an attack on ``batch`` shares, without graph: target output, causal importances. Draws no random number."""
        ...

    def loss_sum(self, prepared: Any, sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Summed reconstruction loss under ``sources``, and the count it is a sum over.

        Differentiable in the sources, without side effect, and in the module's own precision.

        Args:
            prepared: From :meth:`prepare`.
            sources: By site, each broadcastable to ``(*leading_shape, channels)``.

        Returns:
            A scalar sum (KL over positions, or squared error over elements) and the count (positions, or elements).
        """
        ...


@runtime_checkable
class SlopedReconstruction(MaskedReconstruction, Protocol):
    """A reconstruction whose loss is cheaper to differentiate than to know."""

    def slope_sum(self, prepared: Any, sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """As ``loss_sum``, with the same gradient; its value may be anything, NaN for one."""
        ...


@runtime_checkable
class ComponentView(Protocol):
    """A decomposition whose components and causal importances can be looked at."""

    def importances(self, batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """By module, (lower causal importances, logits), each (..., C), without graph."""
        ...

    def component_matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By module, V (d_in, C) and U (C, d_out), without graph."""
        ...

    def one_hot_batch(self) -> Tensor | None:
        """Inputs with one active feature each (features, features); None where inputs are not features."""
        ...
