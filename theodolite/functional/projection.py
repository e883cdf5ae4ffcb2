r"""Projection of gradients on and off orthonormal bases: pure tensor functions.

Notation: ``g`` is a *loss* gradient of any shape, ``V`` holds ``k`` orthonormal rows of that shape, ``c_i = <g, v_i>``. Rows are
loss-gradient directions, so ``c_i > 0`` means that a descent step on ``g`` also descends along ``v_i``, towards the concept (polarity is
defined once, in :mod:`theodolite.functional.directions`). An applied update ``w_new - w_old`` is projected as the gradient that it stands
for, ``g = w_old - w_new``.

* removal: ``g' = g - o * sum_i a(c_i) v_i`` with overshoot ``o`` and gate ``a(c) = max(c, 0)`` (one-sided), ``a(c) = c`` (two-sided) or
  ``a(c) = 2c`` (reverse); ``o = 1`` is pure removal, ``o = 2`` reflects the gated component, which is an active step away from the concept
  and no longer a removal; ``reverse`` reflects every component, also one that already leads away;
* push: ``g' = g - b |g| u`` with ``u = sum_i v_i / sqrt(k)``, whatever ``g`` says: the control that shows how much of overshoot is a push;
* magnitude preservation: ``g' *= min(|g| / |g'|, bound)``.

**Gate scope.** ``tensor``: every row of every tensor decides for itself. ``module`` and ``global``: one decision for the tensors of a
module, or for all, from the sum of their coefficients; where it opens, all their components go, of either sign.

**Flattened.** All tensors are one long vector with one set of coefficients, one gate and one norm. Needs rows that are orthonormal jointly.

Every map here is positively homogeneous (``P(s g) = s P(g)`` for ``s > 0``), so loss scales and clipping factors pass through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Gate: TypeAlias = Literal["one_sided", "two_sided", "reverse"]
GateScope: TypeAlias = Literal["tensor", "module", "global"]
Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""Sums a vector over the processes that hold shards of the same tensors."""

DEFAULT_MAX_MAGNITUDE_FACTOR = 2.0
"""Largest rescaling of a projected gradient. Removal at cosine ``cos`` asks for ``1/sqrt(1 - cos^2)``: 2 is reached at ``cos = 0.87``, and
beyond it the residual is a small part of the gradient that should not be blown up to the size of the whole."""


@dataclass(frozen=True, slots=True)
class ProjectionRule:
    """What is done with the component along a basis (equations in the module's docstring).

    Attributes:
        gate: Which components go.
        gate_scope: Who decides.
        overshoot: ``o``, dimensionless.
        push: ``b``, a fraction of ``|g|``; above 0 it replaces the gated removal.
        preserve_magnitude: Rescale the result to ``|g|``.
        max_magnitude_factor: Upper bound of that rescaling. A result of exactly 0 stays 0: it has no direction that could be kept.
        flattened: One coefficient vector for all tensors.
        measure_only: Return the gradients as they are, with the statistics of what they hold.

    Raises:
        ValueError: Settings that contradict one another.
    """

    gate: Gate = "one_sided"
    gate_scope: GateScope = "tensor"
    overshoot: float = 1.0
    push: float = 0.0
    preserve_magnitude: bool = False
    max_magnitude_factor: float = DEFAULT_MAX_MAGNITUDE_FACTOR
    flattened: bool = False
    measure_only: bool = False

    def __post_init__(self) -> None:
        check_projection_settings(self.gate, self.overshoot, self.push, self.max_magnitude_factor)
        if self.gate_scope not in ("tensor", "module", "global"):
            raise ValueError(f"gate_scope={self.gate_scope!r} is unknown: use 'tensor', 'module' or 'global'.")
        if self.gate_scope != "tensor" and (self.push > 0 or self.flattened):
            what = f"push={self.push}" if self.push > 0 else "a flattened gradient"
            raise ValueError(f"gate_scope={self.gate_scope!r} has nothing to decide for {what}: leave gate_scope='tensor'.")


@dataclass(frozen=True, slots=True)
class Basis:
    """Orthonormal rows of one tensor (or of its local shard).

    Attributes:
        rows: (k, *shape); on the output side (k, d_out), acting on every column of a (d_out, d_in) matrix.
        columns: ``d_in`` for an output-side basis, which has ``k * d_in`` coefficients without a meaningful sign; None otherwise.
    """

    rows: Tensor
    columns: int | None = None

    @property
    def output_side(self) -> bool:
        """Whether the rows act on every column."""
        return self.columns is not None

    def coefficients(self, flat: Tensor) -> Tensor:
        """``c`` (k,) or (k * d_in,) of a flat gradient."""
        rows = self.rows.flatten(1).to(flat.dtype)
        return rows @ flat if self.columns is None else (rows @ flat.view(-1, self.columns)).flatten()

    def combine(self, amounts: Tensor) -> Tensor:
        """``sum_i a_i v_i`` as a flat gradient."""
        rows = self.rows.flatten(1).to(amounts.dtype)
        return amounts @ rows if self.columns is None else (rows.T @ amounts.view(-1, self.columns)).flatten()

    def null_share(self, size: int) -> float:
        """Expected ``sum_i c_i^2 / |g|^2`` of an isotropic random gradient with ``size`` numbers: ``k / size``, or ``k / d_out``."""
        return len(self.rows) / (self.rows.shape[1] if self.output_side else size)


@dataclass(frozen=True, slots=True)
class ProjectionStats:
    """What one projection did. All fields are 0-dimensional tensors on the gradient's device, so that reading them can be deferred.

    Attributes:
        cos_before: Cosine of ``g`` with ``u = sum_i v_i / sqrt(k)``, the middle of the rows (for ``k = 1`` simply the direction); 0 for
            ``g = 0``. For an output-side basis ``sqrt(sum_i c_i^2) / |g|``: there is no sign.
        cos_after: The same for the returned gradient.
        removed_fraction: ``|g - g'| / |g|`` before magnitude preservation.
        fired: The gate let something through (bool).
        cin: ``|a(c)| / |g|`` at overshoot 1: the share of the gradient that the gate sees.
        cin_after: The same for the returned gradient.
        component: ``sum_i c_i / sqrt(k)`` (output side: ``|c|``), so that cosines over several tensors can be made.
        norm: ``|g|``.
    """

    cos_before: Tensor
    cos_after: Tensor
    removed_fraction: Tensor
    fired: Tensor
    cin: Tensor
    cin_after: Tensor
    component: Tensor
    norm: Tensor


def check_projection_settings(gate: str, overshoot: float, push: float, max_magnitude_factor: float) -> None:
    """Refuse settings that contradict one another.

    Raises:
        ValueError: One sentence naming the setting, its value and what would work.
    """
    if gate not in ("one_sided", "two_sided", "reverse"):
        raise ValueError(f"gate={gate!r} is unknown: use 'one_sided', 'two_sided' or 'reverse'.")
    if overshoot <= 0:
        raise ValueError(f"overshoot={overshoot} removes nothing: use 1 for removal or 2 for reflection.")
    if gate == "reverse" and overshoot != 1.0:
        raise ValueError(f"overshoot={overshoot} with gate='reverse' is an overshoot of {2 * overshoot}: leave overshoot=1.0.")
    if push < 0:
        raise ValueError(f"push={push} points towards the concept: use a positive fraction of the gradient norm, e.g. 0.3.")
    if push > 0 and (gate != "one_sided" or overshoot != 1.0):
        raise ValueError(f"push={push} replaces the gated removal: leave gate='one_sided' and overshoot=1.0 (got {gate!r}, {overshoot}).")
    if max_magnitude_factor < 1:
        raise ValueError(f"max_magnitude_factor={max_magnitude_factor} would shrink every projected gradient: use 1 or more.")


def coefficients(gradient: Tensor, basis: Tensor) -> Tensor:
    """``c_i = <g, v_i>``, computed in at least float32.

    Args:
        gradient: Any shape.
        basis: (k, *gradient.shape).

    Returns:
        (k,) coefficients.

    Raises:
        ValueError: The shapes do not match.
    """
    _check_shapes(gradient, Basis(basis))
    return Basis(basis).coefficients(gradient.flatten().to(_working_dtype(gradient, basis)))


def project(
    gradient: Tensor,
    basis: Tensor,
    *,
    gate: Gate = "one_sided",
    overshoot: float = 1.0,
    push: float = 0.0,
    preserve_magnitude: bool = False,
    max_magnitude_factor: float = DEFAULT_MAX_MAGNITUDE_FACTOR,
) -> tuple[Tensor, ProjectionStats]:
    """Remove, reflect or push one gradient along a basis: :func:`project_all` for a single tensor.

    Args:
        gradient: ``g``, any shape and floating dtype. Not modified.
        basis: (k, *gradient.shape) orthonormal rows on the same device.
        gate: See :class:`ProjectionRule`, as for all that follow.
        overshoot: ``o``.
        push: ``b``.
        preserve_magnitude: Rescale the result to ``|g|``.
        max_magnitude_factor: Upper bound of that rescaling.

    Returns:
        The new gradient in the dtype of ``gradient``, and :class:`ProjectionStats`. Where nothing fired, the returned values are the
        given ones, bit for bit; so is a gradient with a NaN or infinite norm, whose statistics are then NaN.

    Raises:
        ValueError: The shapes do not match.
    """
    rule = ProjectionRule(gate, "tensor", overshoot, push, preserve_magnitude, max_magnitude_factor)
    results, stats = project_all([gradient], [Basis(basis)], rule)
    return results[0], stats[0]


def project_all(
    gradients: Sequence[Tensor],
    bases: Sequence[Basis],
    rule: ProjectionRule,
    groups: Sequence[str] | None = None,
    reduce: Reduce | None = None,
) -> tuple[list[Tensor], list[ProjectionStats]]:
    """Project several gradients under one rule.

    Args:
        gradients: Tensors of any shapes and floating dtypes. Not modified.
        bases: One per gradient, on its device.
        rule: What to do.
        groups: Gate scope ``module``: the module of each gradient. None puts each in its own.
        reduce: Gradients and bases are shards: sums coefficients and squared norms over those who hold the others. Everybody must call this
            with the same number of gradients, in the same order.

    Returns:
        The new gradients, in the order and dtypes given, and their statistics: one per gradient, or a single one if ``rule.flattened``.

    Raises:
        ValueError: Shapes that do not match, or a gate that needs a sign on an output-side basis.
    """
    for gradient, basis in zip(gradients, bases, strict=True):
        _check_shapes(gradient, basis)
        if basis.output_side and (rule.gate == "one_sided" or rule.push > 0):
            raise ValueError("An output-side basis has no sign for a one-sided gate or a push: use gate='two_sided' or 'reverse'.")
    flats = [g.flatten().to(_working_dtype(g, b.rows)) for g, b in zip(gradients, bases, strict=True)]
    signed = [not basis.output_side for basis in bases]
    c, norms = _measure(flats, bases, reduce)
    if rule.flattened:
        c, norms, signed = [torch.stack(c).sum(0)], [_joint_norm(norms)], signed[:1]
    shares = _gate_all(c, rule, groups)
    amounts = [_push(c_i, n, rule.push) if rule.push > 0 else rule.overshoot * a for c_i, n, a in zip(c, norms, shares, strict=True)]
    fired = [(amount != 0).any() & torch.isfinite(norm) for amount, norm in zip(amounts, norms, strict=True)]
    spread = amounts * len(flats) if rule.flattened else amounts
    removed = [basis.combine(amount) for basis, amount in zip(bases, spread, strict=True)]
    removed_norms = _norms(removed, reduce, rule.flattened)
    results = [gradient.flatten() for gradient in gradients]
    if not rule.measure_only:
        projected = [flat - part for flat, part in zip(flats, removed, strict=True)]
        if rule.preserve_magnitude:
            after = _norms(projected, reduce, rule.flattened)
            factors = [_magnitude_factor(n, m, rule.max_magnitude_factor) for n, m in zip(norms, after, strict=True)]
            spread = factors * len(flats) if rule.flattened else factors
            projected = [part * factor for part, factor in zip(projected, spread, strict=True)]
        gates = fired * len(flats) if rule.flattened else fired
        results = [torch.where(f, new.to(old.dtype), old) for f, new, old in zip(gates, projected, results, strict=True)]
    c_after, norms_after = _measure([r.to(flat.dtype) for r, flat in zip(results, flats, strict=True)], bases, reduce)
    if rule.flattened:
        c_after, norms_after = [torch.stack(c_after).sum(0)], [_joint_norm(norms_after)]
    shares_after = _gate_all(c_after, rule, groups)
    stats = [
        ProjectionStats(
            cos_before=_cosine(c[i], norms[i], signed[i]),
            cos_after=_cosine(c_after[i], norms_after[i], signed[i]),
            removed_fraction=torch.zeros_like(norms[i]) if rule.measure_only else _share(removed_norms[i], norms[i]),
            fired=fired[i],
            cin=_share(_gate_norm(shares[i], rule), norms[i]),
            cin_after=_share(_gate_norm(shares_after[i], rule), norms_after[i]),
            component=_component(c[i], signed[i]),
            norm=norms[i],
        )
        for i in range(len(c))
    ]
    return [result.view_as(gradient) for result, gradient in zip(results, gradients, strict=True)], stats


def _gate_all(c: Sequence[Tensor], rule: ProjectionRule, groups: Sequence[str] | None) -> list[Tensor]:
    """``a(c)`` for every tensor."""
    if rule.gate != "one_sided":
        return [2 * c_i if rule.gate == "reverse" else c_i for c_i in c]
    if rule.gate_scope == "tensor":
        return [c_i.clamp_min(0) for c_i in c]
    keys = [""] * len(c) if rule.gate_scope == "global" else list(groups or map(str, range(len(c))))
    totals: dict[str, Tensor] = {}
    for key, c_i in zip(keys, c, strict=True):
        totals[key] = totals[key] + c_i.sum() if key in totals else c_i.sum()
    return [torch.where(totals[key] > 0, c_i, torch.zeros_like(c_i)) for key, c_i in zip(keys, c, strict=True)]


def _measure(flats: Sequence[Tensor], bases: Sequence[Basis], reduce: Reduce | None) -> tuple[list[Tensor], list[Tensor]]:
    """Coefficients and norms, of whole tensors or summed over shards in a single call of ``reduce``."""
    c = [basis.coefficients(flat) for flat, basis in zip(flats, bases, strict=True)]
    norms = [torch.linalg.vector_norm(flat) for flat in flats]
    if reduce is None or not flats:
        return c, norms
    sizes = [len(c_i) for c_i in c]
    total = reduce(torch.cat([*c, torch.stack(norms).square()]))
    *parts, squares = total.split([*sizes, len(norms)])
    return parts, list(squares.sqrt())


def _norms(flats: Sequence[Tensor], reduce: Reduce | None, jointly: bool) -> list[Tensor]:
    """Norms per tensor, or of all tensors as one vector."""
    norms = [torch.linalg.vector_norm(flat) for flat in flats]
    if reduce is not None and norms:
        norms = list(reduce(torch.stack(norms).square()).sqrt())
    return [_joint_norm(norms)] if jointly else norms


def _joint_norm(norms: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(list(norms)))


def _push(c: Tensor, norm: Tensor, push: float) -> Tensor:
    return (push * norm / len(c) ** 0.5).expand(len(c))


def _gate_norm(share: Tensor, rule: ProjectionRule) -> Tensor:
    return torch.linalg.vector_norm(share) / (2 if rule.gate == "reverse" else 1)


def _cosine(c: Tensor, norm: Tensor, signed: bool) -> Tensor:
    """``sum_i c_i / (sqrt(k) |g|)`` (without a sign ``|c| / |g|``), and 0 for a zero gradient."""
    if not signed:
        return _share(torch.linalg.vector_norm(c), norm)
    return torch.where(norm == 0, torch.zeros_like(norm), c.sum() / (len(c) ** 0.5 * norm))


def _component(c: Tensor, signed: bool) -> Tensor:
    return c.sum() / len(c) ** 0.5 if signed else torch.linalg.vector_norm(c)


def _share(part: Tensor, norm: Tensor) -> Tensor:
    """``part / norm``, and 0 of a zero gradient."""
    return torch.where(norm == 0, torch.zeros_like(norm), part / norm)


def _check_shapes(gradient: Tensor, basis: Basis) -> None:
    wanted = gradient.shape[:1] if basis.output_side else gradient.shape
    if basis.rows.shape[1:] != wanted:
        raise ValueError(f"The basis has rows of shape {tuple(basis.rows.shape[1:])}, the gradient has {tuple(gradient.shape)}.")


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    """Float64 if any tensor is, otherwise float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _magnitude_factor(before: Tensor, after: Tensor, bound: float) -> Tensor:
    """``min(before / after, bound)``, and 1 where nothing is left to rescale."""
    return torch.where(after > 0, (before / after).clamp_max(bound), torch.ones_like(after))
