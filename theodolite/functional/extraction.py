r"""Directions from contrastive pairs, and their controls: pure tensor functions.

Two sources of evidence. *Gradient difference*: per pair ``D_i = grad NLL(concept_i) - grad NLL(clean_i)`` for each parameter, a
loss-gradient direction. *State difference*: ``d = mean_i (h_i(concept) - h_i(clean))`` in the residual stream, an activation direction.

Four controls, by one switch (:data:`Control`): ``haar`` (uniformly random rows of the same shapes and norms), ``shuffled`` (each pair's
sides swapped by a coin), ``placebo`` (pairs that do not differ in the concept) and ``reversed`` (the direction turned round). Shuffling
and placebo act on the pairs, see :func:`swap_sides`; the other two on the finished direction, see :func:`apply_control`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from theodolite.functional.directions import ConceptDirection
from theodolite.functional.subspaces import haar_rows, orthonormal_rows, top_singular_rows
from theodolite.seeds import derive_seed

Control: TypeAlias = Literal["none", "haar", "shuffled", "placebo", "reversed"]
CONTROLS = ("none", "haar", "shuffled", "placebo", "reversed")


def check_method(method: str, k: int) -> None:
    """Refuse an unknown method or a ``k`` that it cannot give (``ValueError``, one sentence)."""
    if method not in ("mean", "svd"):
        raise ValueError(f"method={method!r} is unknown: use 'mean' or 'svd'.")
    if k < 1 or (method == "mean" and k != 1):
        raise ValueError(f"k={k} is out of range: a mean has k=1, method='svd' takes k >= 1.")


def check_control(control: str) -> None:
    """Refuse an unknown control (``ValueError``, one sentence)."""
    if control not in CONTROLS:
        raise ValueError(f"control={control!r} is unknown: use one of {', '.join(map(repr, CONTROLS))}.")


def gradient_difference(
    differences: Mapping[str, Tensor],
    method: Literal["mean", "svd"] = "mean",
    k: int = 1,
    metadata: Mapping[str, Any] | None = None,
    *,
    normalize: Literal["tensor", "none"] = "tensor",
    noise_floor: float = 0.0,
) -> ConceptDirection:
    r"""A direction from per-pair gradient differences ``D_i = grad NLL(concept_i) - grad NLL(clean_i)``.

    ``mean``: ``v = sum_i D_i / |sum_i D_i|``. ``svd``: the top ``k`` right singular vectors of the stack of ``D_i``, found through the
    (n, n) Gram matrix; a singular vector has no sign of its own, so each is turned to agree with the majority of pairs (``<D_i, v> > 0``;
    on a tie with the sum).

    Args:
        differences: ``{parameter: (n, *shape)}``. For ``mean`` one row that already is a sum will do.
        method: ``mean`` or ``svd``.
        k: Rows per parameter for ``svd``; 1 for ``mean``.
        metadata: Facts to keep; the parameters without any gradient are added as ``without_direction``.
        normalize: ``tensor``: every parameter's rows have norm 1. ``none``: rows keep the norm of the mean difference (``svd``: the
            singular value over sqrt(n)), so that a flattened direction weighs parameters as the pairs do.
        noise_floor: For ``svd``: pool the singular values of all parameters and drop the lowest so many (a fraction) with their rows; a
            parameter that keeps none is left out and named.

    Returns:
        A direction with orthogonal rows. A parameter whose gradient is zero for all pairs (LoRA ``A`` while ``B = 0``) has none and is
        left out; with fewer than ``k`` independent pairs it has fewer rows.

    Raises:
        ValueError: Non-finite gradients, ``k`` out of range, or no parameter with a gradient.
    """
    check_method(method, k)
    if not 0 <= noise_floor < 1 or (noise_floor > 0 and method != "svd"):
        raise ValueError(f"noise_floor={noise_floor} must be a fraction in [0, 1), and only method='svd' has singular values to drop.")
    if not differences or any(len(stack) == 0 for stack in differences.values()):
        raise ValueError("The pair set is empty, so there is no gradient difference: give at least one contrastive pair.")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, stack in differences.items():
        if not torch.isfinite(stack).all():
            raise ValueError(f"The gradient difference of {name} contains NaN or infinite values: no direction can be taken from it.")
        if method == "svd" and k > len(stack):
            raise ValueError(f"k={k} singular vectors need at least as many pairs, and there are {len(stack)}.")
        rows, strengths = _mean_row(stack) if method == "mean" else top_singular_rows(stack, k)
        if len(rows) > 0:
            found[name] = (rows, strengths)
    found = _above_floor(found, noise_floor)
    if not found:
        raise ValueError("Every gradient difference is zero, so there is no direction: the pairs' two sides are the same to the model.")
    scaled = {name: rows * _column(strengths, rows) if normalize == "none" else rows for name, (rows, strengths) in found.items()}
    vectors = {name: rows.float() for name, rows in scaled.items()}
    facts = {**(metadata or {}), "method": method, "k": k, "without_direction": [name for name in differences if name not in vectors]}
    return ConceptDirection(vectors, metadata=facts)


def state_difference(concept: Tensor, clean: Tensor) -> Tensor:
    """``d = mean_i (h_i(concept) - h_i(clean))``, not normalised.

    Args:
        concept: (n, d) states of the concept sides.
        clean: (n, d) states of the clean sides, pair by pair.

    Returns:
        (d,) in float64.

    Raises:
        ValueError: No pairs, different shapes, or a difference that is zero or not finite.
    """
    if concept.shape != clean.shape or concept.ndim != 2:
        raise ValueError(f"States of shapes {tuple(concept.shape)} and {tuple(clean.shape)} are not pairs: both must be (n, d).")
    if len(concept) == 0:
        raise ValueError("The pair set is empty, so there is no mean difference: give at least one contrastive pair.")
    difference = (concept.double() - clean.double()).mean(0)
    norm = float(difference.norm())
    if not 0 < norm < float("inf"):
        raise ValueError("The pairs' two sides have the same mean state, or one that is not finite: there is no direction between them.")
    return difference


@dataclass(frozen=True, slots=True)
class Denoised:
    """A vector restricted to a matrix's leading singular space.

    Attributes:
        vector: (d,) of norm 1.
        retained: ``e = |U_m^T v|^2 / |v|^2``, the kept share of the squared norm; ``cos(v, vector) = sqrt(e)``.
        null: Its expectation for a random ``v``: ``m / d``.
    """

    vector: Tensor
    retained: float
    null: float

    @property
    def is_noise(self) -> bool:
        """Not more than twice what a random vector keeps: what is left is then mostly chance."""
        return self.retained <= 2 * self.null


def denoise(vector: Tensor, weight: Tensor, m: int, side: Literal["left", "right"] = "left") -> Denoised:
    """``U_m U_m^T v`` over its norm, with the singular space that ``v`` lives in.

    ``y = W x`` with ``W`` (d_out, d_in) = ``U S V^T`` has outputs in the span of ``U`` and reads along ``V``. A residual-stream vector
    belongs to the *left* space of a matrix that writes to the residual stream (``o_proj``, ``down_proj``) and to the right space of one
    that reads it.

    Args:
        vector: (d,).
        weight: (d_out, d_in).
        m: Leading singular vectors to keep (8, 16 or 32 are usual).
        side: ``left`` for a writing matrix, ``right`` for a reading one.

    Raises:
        ValueError: ``m`` out of range, the wrong side for the vector's size, or nothing of the vector left.
    """
    d_out, d_in = weight.shape
    size = d_out if side == "left" else d_in
    if len(vector) != size:
        raise ValueError(f"A vector of {len(vector)} numbers is not in the {side} singular space of a {d_out} x {d_in} matrix.")
    if not 1 <= m <= min(d_out, d_in):
        raise ValueError(f"m={m} singular vectors of a {d_out} x {d_in} matrix do not exist: use 1 to {min(d_out, d_in)}.")
    left, _, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    basis = left[:, :m].T if side == "left" else right[:m]
    unit = vector.to(basis) / vector.double().norm().to(basis)
    kept = basis.T @ (basis @ unit)
    length = float(kept.norm())
    if not length > 0:
        raise ValueError(f"Nothing of the vector lies in the leading {m} singular vectors: raise m or leave denoising off.")
    return Denoised(kept / length, length**2, m / size)


def haar_random_like(like: ConceptDirection | Mapping[str, Sequence[int]], k: int | None = None, seed: int = 0) -> ConceptDirection:
    """Uniformly random orthonormal rows, the control with matched shape.

    Args:
        like: A direction (its space, and its number of rows per name as the default) or ``{parameter name: shape}``.
        k: Rows per parameter.
        seed: Each parameter's rows are a function of this and its name.

    Raises:
        ValueError: ``k`` is missing, below 1, or larger than a parameter.
    """
    facts = {"source": "haar_random", "seed": seed, "k": k}
    if isinstance(like, ConceptDirection):
        vectors = {name: haar_rows(name, k or len(rows), tuple(rows.shape[1:]), seed) for name, rows in like.vectors.items()}
        return ConceptDirection(vectors, like.space, facts)
    if k is None:
        raise ValueError("haar_random_like needs k when it is given shapes instead of a direction.")
    return ConceptDirection({name: haar_rows(name, k, tuple(shape), seed) for name, shape in like.items()}, metadata=facts)


def apply_control(direction: ConceptDirection, control: str, seed: int) -> ConceptDirection:
    """The finished direction under a control: ``haar`` rows with the norms of the real ones, or ``reversed``; the others are unchanged."""
    check_control(control)
    if control == "reversed":
        return direction.reversed()
    facts = direction.metadata if control == "none" else {**direction.metadata, "control": control}
    if control != "haar":
        return ConceptDirection(direction.vectors, direction.space, facts)
    random = haar_random_like(direction, seed=seed)
    vectors = {
        name: random.vectors[name] * _column(rows.flatten(1).norm(dim=1).cpu(), random.vectors[name])
        for name, rows in direction.vectors.items()
    }
    return ConceptDirection(vectors, direction.space, facts)


def swap_sides(n: int, seed: int) -> list[bool]:
    """The shuffled control's coins: whether pair ``i`` of ``n`` has its sides swapped. A function of ``seed`` and ``i`` alone."""
    return [derive_seed("shuffle", seed, index) % 2 == 0 for index in range(n)]


def _mean_row(stack: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised sum as one row (none if it is zero), and the norm of the mean."""
    total = stack.double().sum(0, keepdim=True)
    rows = orthonormal_rows(total)
    return rows, (torch.linalg.vector_norm(total) / len(stack)).expand(len(rows))


def _above_floor(found: dict[str, tuple[Tensor, Tensor]], noise_floor: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Without the rows whose singular values are among the pooled lowest."""
    if noise_floor == 0 or not found:
        return found
    threshold = torch.quantile(torch.cat([strengths for _, strengths in found.values()]), noise_floor)
    kept = {name: (rows[strengths >= threshold], strengths[strengths >= threshold]) for name, (rows, strengths) in found.items()}
    return {name: part for name, part in kept.items() if len(part[0]) > 0}


def _column(values: Tensor, rows: Tensor) -> Tensor:
    """(k,) as (k, 1, ..., 1)."""
    return values.to(rows).view(-1, *[1] * (rows.ndim - 1))
