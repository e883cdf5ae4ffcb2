r"""Projection of one gradient tensor on and off an orthonormal basis: pure tensor functions.

Notation: ``g`` is a *loss* gradient of any shape, ``V`` holds ``k`` orthonormal rows of that shape, ``c_i = <g, v_i>``. Rows are
    loss-gradient
directions, so ``c_i > 0`` means that a descent step on ``g`` also descends along ``v_i``, towards the concept (polarity is defined once, in
:mod:`theodolite.functional.directions`).

* removal: ``g' = g - o * sum_i a(c_i) v_i`` with overshoot ``o`` and gate ``a(c) = max(c, 0)`` (one-sided) or ``a(c) = c`` (two-sided);
  ``o = 1`` is pure removal, ``o = 2`` reflects the gated component, which is an active step away from the concept and no longer a removal;
* push: ``g' = g - b |g| u`` with ``u = sum_i v_i / sqrt(k)``, whatever ``g`` says: the control that shows how much of overshoot is a push;
* magnitude preservation: ``g' *= min(|g| / |g'|, bound)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Gate: TypeAlias = Literal["one_sided", "two_sided"]

DEFAULT_MAX_MAGNITUDE_FACTOR = 2.0
"""Largest rescaling of a projected gradient. Removal at cosine ``cos`` asks for ``1/sqrt(1 - cos^2)``: 2 is reached at ``cos = 0.87``, and
beyond it the residual is a small part of the gradient that should not be blown up to the size of the whole."""


@dataclass(frozen=True, slots=True)
class ProjectionStats:
    """What one projection did. All fields are 0-dimensional tensors on the gradient's device, so that reading them can be deferred.

    Attributes:
        cos_before: Cosine of ``g`` with ``u = sum_i v_i / sqrt(k)``, the middle of the rows (for ``k = 1`` simply the direction); 0 for
            ``g = 0``.
        cos_after: The same for the returned gradient.
        removed_fraction: ``|g - g'| / |g|`` before magnitude preservation.
        fired: The gate let something through (bool).
    """

    cos_before: Tensor
    cos_after: Tensor
    removed_fraction: Tensor
    fired: Tensor


def check_projection_settings(gate: str, overshoot: float, push: float, max_magnitude_factor: float) -> None:
    """Refuse settings that contradict one another.

    Raises:
        ValueError: One sentence naming the setting, its value and what would work.
    """
    if gate not in ("one_sided", "two_sided"):
        raise ValueError(f"gate={gate!r} is unknown: use 'one_sided' or 'two_sided'.")
    if overshoot <= 0:
        raise ValueError(f"overshoot={overshoot} removes nothing: use 1 for removal or 2 for reflection.")
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
    if basis.shape[1:] != gradient.shape:
        raise ValueError(f"The basis has rows of shape {tuple(basis.shape[1:])}, the gradient has {tuple(gradient.shape)}.")
    dtype = _working_dtype(gradient, basis)
    return basis.flatten(1).to(dtype) @ gradient.flatten().to(dtype)


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
    """Remove, reflect or push a gradient along a basis (equations in the module's docstring).

    Args:
        gradient: ``g``, any shape and floating dtype. Not modified.
        basis: (k, *gradient.shape) orthonormal rows on the same device.
        gate: ``one_sided`` touches only rows with ``c_i > 0``; ``two_sided`` all of them.
        overshoot: ``o``, dimensionless.
        push: ``b``, a fraction of ``|g|``; above 0 it replaces the gated removal.
        preserve_magnitude: Rescale the result to ``|g|``.
        max_magnitude_factor: Upper bound of that rescaling. A result of exactly 0 stays 0: it has no direction that could be kept.

    Returns:
        The new gradient in the dtype of ``gradient``, and :class:`ProjectionStats`. Where nothing fired, the returned values are the
        given ones, bit for bit; so is a gradient with a NaN or infinite norm, whose statistics are then NaN.

    Raises:
        ValueError: The shapes do not match.
    """
    dtype = _working_dtype(gradient, basis)
    rows, flat = basis.flatten(1).to(dtype), gradient.flatten().to(dtype)
    c = coefficients(gradient, basis)
    norm = torch.linalg.vector_norm(flat)
    gated = overshoot * (c.clamp_min(0) if gate == "one_sided" else c)
    amounts = (push * norm / len(rows) ** 0.5).expand(len(rows)) if push > 0 else gated
    removed = amounts @ rows
    fired = (amounts != 0).any() & torch.isfinite(norm)
    projected = flat - removed
    if preserve_magnitude:
        projected = projected * _magnitude_factor(norm, torch.linalg.vector_norm(projected), max_magnitude_factor)
    result = torch.where(fired, projected.to(gradient.dtype), gradient.flatten())
    stats = ProjectionStats(
        cos_before=_cosine(c, norm),
        cos_after=_cosine(rows @ result.to(dtype), torch.linalg.vector_norm(result.to(dtype))),
        removed_fraction=torch.where(norm == 0, torch.zeros_like(norm), torch.linalg.vector_norm(removed) / norm),
        fired=fired,
    )
    return result.view_as(gradient), stats


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    """Float64 if any tensor is, otherwise float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _magnitude_factor(before: Tensor, after: Tensor, bound: float) -> Tensor:
    """``min(before / after, bound)``, and 1 where nothing is left to rescale."""
    return torch.where(after > 0, (before / after).clamp_max(bound), torch.ones_like(after))


def _cosine(c: Tensor, norm: Tensor) -> Tensor:
    """``sum_i c_i / (sqrt(k) |g|)``, and 0 for a zero gradient."""
    return torch.where(norm == 0, torch.zeros_like(norm), c.sum() / (len(c) ** 0.5 * norm))
