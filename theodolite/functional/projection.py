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
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from theodolite.functional.projection_rule import DEFAULT_MAX_MAGNITUDE_FACTOR, Gate, ProjectionRule

Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""Sums a vector over the processes that hold shards of the same tensors."""


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

    @property
    def coefficient_count(self) -> int:
        """``k``, or ``k * d_in``."""
        return len(self.rows) * (1 if self.columns is None else self.columns)

    def null_share(self, size: int) -> float:
        """Expected ``sum_i c_i^2 / |g|^2`` of an isotropic random gradient with ``size`` numbers: ``k / size``, or ``k / d_out``."""
        return len(self.rows) / (self.rows.shape[1] if self.output_side else size)


@dataclass(frozen=True, slots=True)
class ProjectionStats:
    """What a projection did. Fields are tensors on the gradient's device, so that reading them can be deferred.

    They are 0-dimensional for one gradient, and have one entry each for several.

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

    def one(self, index: int) -> ProjectionStats:
        """Those of one of several gradients."""
        return ProjectionStats(*(getattr(self, name)[index] for name in self.__slots__))


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
    return results[0], stats.one(0)


def project_all(
    gradients: Sequence[Tensor],
    bases: Sequence[Basis],
    rule: ProjectionRule,
    groups: Sequence[str] | None = None,
    reduce: Reduce | None = None,
    outputs: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], ProjectionStats]:
    """Project several gradients on one device under one rule.

    Args:
        gradients: Tensors of any shapes and floating dtypes. Not modified, unless they are among ``outputs``.
        bases: One per gradient, on its device.
        rule: What to do.
        groups: Gate scope ``module``: the module of each gradient. None puts each in its own.
        reduce: Gradients and bases are shards: sums coefficients and squared norms over those who hold the others. Everybody must call this
            with the same number of gradients, in the same order.
        outputs: Where the new gradients go, one after the other; without it they are all held at once.

    Returns:
        The new gradients, in the order and dtypes given, and their statistics with fields of shape (number of gradients,), or (1,) if
        ``rule.flattened``.

    Raises:
        ValueError: Shapes that do not match, or a gate that needs a sign on an output-side basis.
    """
    for gradient, basis in zip(gradients, bases, strict=True):
        _check_shapes(gradient, basis)
        if basis.output_side and (rule.gate == "one_sided" or rule.push > 0):
            raise ValueError("An output-side basis has no sign for a one-sided gate or a push: use gate='two_sided' or 'reverse'.")
    flats = [g.flatten().to(_working_dtype(g, b.rows)) for g, b in zip(gradients, bases, strict=True)]
    c, counts, norms = _measure(flats, bases, reduce, rule.flattened)
    shares = _gate_all(c, rule, groups)
    amounts = (rule.push * norms / counts**0.5)[:, None].expand_as(c) if rule.push > 0 else rule.overshoot * shares
    fired = (amounts != 0).any(1) & torch.isfinite(norms)
    results = [gradient.flatten() for gradient in gradients]
    removed_norms, after = torch.zeros_like(norms), (c, counts, norms)
    if not rule.measure_only:
        results, removed_norms = _apply(flats, results, bases, amounts, fired, norms, rule, reduce, outputs)
        after = _measure([r.to(flat.dtype) for r, flat in zip(results, flats, strict=True)], bases, reduce, rule.flattened)
    elif outputs is not None:
        for output, gradient in zip(outputs, gradients, strict=True):
            output.copy_(gradient)
    halved = 2.0 if rule.gate == "reverse" else 1.0
    signed = torch.tensor([not basis.output_side for basis in bases][: len(c)], device=c.device)
    stats = ProjectionStats(
        cos_before=_cosine(c, counts, norms, signed),
        cos_after=_cosine(*after, signed),
        removed_fraction=_share(removed_norms, norms),
        fired=fired,
        cin=_share(torch.linalg.vector_norm(shares, dim=1) / halved, norms),
        cin_after=_share(torch.linalg.vector_norm(_gate_all(after[0], rule, groups), dim=1) / halved, after[2]),
        component=torch.where(signed, c.sum(1) / counts**0.5, torch.linalg.vector_norm(c, dim=1)),
        norm=norms,
    )
    return [result.view_as(gradient) for result, gradient in zip(results, gradients, strict=True)], stats


def _apply(
    flats: Sequence[Tensor],
    old: Sequence[Tensor],
    bases: Sequence[Basis],
    amounts: Tensor,
    fired: Tensor,
    norms: Tensor,
    rule: ProjectionRule,
    reduce: Reduce | None,
    outputs: Sequence[Tensor] | None,
) -> tuple[list[Tensor], Tensor]:
    """The new flat gradients, and the norms of what was taken out of them."""
    # only a factor that several tensors or processes share has to wait for all of them
    at_once = rule.preserve_magnitude and (rule.flattened or reduce is not None)
    results: list[Tensor] = []
    removed_norms, projected_norms, waiting = [], [], []
    lengths = [basis.coefficient_count for basis in bases]
    for i, (flat, basis) in enumerate(zip(flats, bases, strict=True)):
        unit = 0 if rule.flattened else i
        removed = basis.combine(amounts[unit, : lengths[i]])
        removed_norms.append(torch.linalg.vector_norm(removed))
        projected = flat - removed
        if at_once:
            projected_norms.append(torch.linalg.vector_norm(projected))
            waiting.append(projected)
            continue
        if rule.preserve_magnitude:
            projected = projected * _magnitude_factor(norms[unit], torch.linalg.vector_norm(projected), rule.max_magnitude_factor)
        results.append(_written(projected, old[i], fired[unit], outputs, i))
    if at_once:
        totals = _total_norms(torch.stack(projected_norms), reduce, rule.flattened)
        for i, projected in enumerate(waiting):
            unit = 0 if rule.flattened else i
            factor = _magnitude_factor(norms[unit], totals[unit], rule.max_magnitude_factor)
            results.append(_written(projected * factor, old[i], fired[unit], outputs, i))
    return results, _total_norms(torch.stack(removed_norms), reduce, rule.flattened)


def _written(projected: Tensor, old: Tensor, fired: Tensor, outputs: Sequence[Tensor] | None, index: int) -> Tensor:
    """The projected values where the gate fired, the old bits elsewhere; in the output, if there is one."""
    result = torch.where(fired, projected.to(old.dtype), old)
    if outputs is None:
        return result
    outputs[index].copy_(result.view_as(outputs[index]))
    return outputs[index].flatten()


def _gate_all(c: Tensor, rule: ProjectionRule, groups: Sequence[str] | None) -> Tensor:
    """``a(c)`` for every row of coefficients."""
    if rule.gate != "one_sided":
        return 2 * c if rule.gate == "reverse" else c
    if rule.gate_scope == "tensor":
        return c.clamp_min(0)
    keys = [""] * len(c) if rule.gate_scope == "global" else list(groups or map(str, range(len(c))))
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    index = torch.tensor([numbers[key] for key in keys], device=c.device)
    totals = c.new_zeros(len(numbers)).index_add_(0, index, c.sum(1))
    return torch.where((totals[index] > 0)[:, None], c, torch.zeros_like(c))


def _measure(flats: Sequence[Tensor], bases: Sequence[Basis], reduce: Reduce | None, jointly: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients (P, K) with zeros behind the shorter ones, how many there are (P,), and norms (P,); P = 1 if ``jointly``."""
    found = [basis.coefficients(flat) for flat, basis in zip(flats, bases, strict=True)]
    norms = torch.stack([torch.linalg.vector_norm(flat) for flat in flats])
    c = torch.stack(found) if len({len(one) for one in found}) == 1 else pad_sequence(found, batch_first=True)
    counts = torch.tensor([float(len(one)) for one in found], device=c.device, dtype=norms.dtype)
    if reduce is not None:
        *whole, squares = reduce(torch.cat([c.flatten(), norms.square()])).split([c.numel(), len(norms)])
        c, norms = whole[0].view_as(c), squares.sqrt()
    if jointly:
        return c.sum(0, keepdim=True), counts[:1], torch.linalg.vector_norm(norms)[None]
    return c, counts, norms


def _total_norms(norms: Tensor, reduce: Reduce | None, jointly: bool) -> Tensor:
    """Norms over all shards, per tensor or of all as one vector."""
    whole = norms if reduce is None else reduce(norms.square()).sqrt()
    return torch.linalg.vector_norm(whole)[None] if jointly else whole


def _cosine(c: Tensor, counts: Tensor, norms: Tensor, signed: Tensor) -> Tensor:
    """``sum_i c_i / (sqrt(k) |g|)`` (without a sign ``|c| / |g|``), and 0 for a zero gradient."""
    cosine = torch.where(signed, c.sum(1) / (counts**0.5 * norms), torch.linalg.vector_norm(c, dim=1) / norms)
    return torch.where(norms == 0, torch.zeros_like(norms), cosine)


def _share(part: Tensor, norms: Tensor) -> Tensor:
    """``part / norm``, and 0 of a zero gradient."""
    return torch.where(norms == 0, torch.zeros_like(norms), part / norms)


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
