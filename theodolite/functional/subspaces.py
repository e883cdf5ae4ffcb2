"""Row spaces: orthonormal bases of any tensor shape, where they come from and how they compare. Pure tensor functions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from theodolite.seeds import derive_seed

_DEPENDENT = 1e-6  # a row whose part outside the earlier rows is below this share of its length is rounding noise, not a direction


def orthonormal_rows(rows: Tensor) -> Tensor:
    """Gram-Schmidt in row order (twice, in float64), which keeps the orientation of every row.

    Args:
        rows: (k, *shape). Zero rows and rows that depend on earlier ones are dropped.

    Returns:
        (k', *shape) with ``k' <= k``, possibly 0, in at least float32.

    Raises:
        ValueError: NaN or infinite values.
    """
    if not torch.isfinite(rows).all():
        raise ValueError("Rows with NaN or infinite values cannot be orthonormalised.")
    flat = rows.flatten(1).double()
    kept = flat[:0]
    for row in flat:
        length = torch.linalg.vector_norm(row)
        if length == 0:
            continue
        unit = row / length
        for _ in range(2):
            unit = unit - kept.T @ (kept @ unit)
        rest = torch.linalg.vector_norm(unit)
        if rest > _DEPENDENT:
            kept = torch.cat([kept, (unit / rest)[None]])
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return kept.to(dtype).view(len(kept), *rows.shape[1:])


def top_singular_rows(stack: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top ``k`` right singular vectors of (n, *shape), found through the (n, n) Gram matrix, oriented by majority vote.

    A singular vector has no sign of its own: each is turned so that most rows of the stack have a positive inner product with it (on a tie,
    their sum).

    Returns:
        (k', *shape) rows and their (k',) singular values, decreasing; ``k' < k`` where the stack has fewer independent rows.
    """
    flat = stack.flatten(1).double()
    values, left = torch.linalg.eigh(flat @ flat.T)
    order = torch.argsort(values, descending=True)[:k]
    order = order[values[order] > _DEPENDENT**2 * values.max().clamp_min(0)]
    rows = orthonormal_rows((left[:, order].T @ flat).view(len(order), *stack.shape[1:]))
    scores = flat @ rows.flatten(1).T
    votes = torch.sign(scores).sum(0)
    orientation = torch.sign(torch.where(votes == 0, scores.sum(0), votes))
    turned = rows * torch.where(orientation == 0, 1.0, orientation).view(-1, *[1] * (stack.ndim - 1))
    return turned, values[order].clamp_min(0).sqrt()


def haar_rows(name: str, k: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """(k, *shape) orthonormalised Gaussian rows: uniform on the Stiefel manifold, a function of ``name`` and ``seed``.

    Raises:
        ValueError: More rows than dimensions.
    """
    if not 1 <= k <= math.prod(shape):
        raise ValueError(f"k={k} orthonormal rows do not exist in the {math.prod(shape)} dimensions of {name}.")
    generator = torch.Generator().manual_seed(derive_seed("haar", seed, name))
    return orthonormal_rows(torch.randn(k, *shape, generator=generator, dtype=torch.float64)).float()


def subspace_overlap(name: str, first: Tensor, second: Tensor) -> float:
    """``sqrt(|A B^T|_F^2 / min(k_A, k_B))``, the root mean squared cosine of the principal angles between two row spaces.

    Args:
        name: For the error message.
        first: (k_A, *shape), any rows.
        second: (k_B, *shape).

    Raises:
        ValueError: Different shapes.
    """
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(f"The two directions of {name} have rows of shape {tuple(first.shape[1:])} and {tuple(second.shape[1:])}.")
    a, b = orthonormal_rows(first).flatten(1), orthonormal_rows(second.to(first.device)).flatten(1)
    if min(len(a), len(b)) == 0:
        return 0.0
    cross = a.double() @ b.double().T
    return math.sqrt(float(cross.square().sum()) / min(len(a), len(b)))


def null_overlap(first: int, second: int, dimensions: int) -> float:
    """Root mean square of :func:`subspace_overlap` for Haar-random row spaces: ``sqrt(max(k_A, k_B) / d)``, at most 1."""
    return math.sqrt(min(1.0, max(first, second) / dimensions))


def jointly_orthonormal(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows that are orthonormal after concatenation over all names: the flattened direction, with each part's share of it.

    Args:
        rows: ``{name: (k, *shape)}`` with the same ``k`` everywhere.

    Returns:
        ``{name: (k', *shape)}``; ``k' = 0`` if everything is zero.

    Raises:
        ValueError: Different numbers of rows.
    """
    counts = {name: len(part) for name, part in rows.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"Flattened rows need the same number in every parameter, and there are {counts}.")
    joint = orthonormal_rows(torch.cat([part.flatten(1).double() for part in rows.values()], dim=1))
    parts = joint.split([part[0].numel() for part in rows.values()], dim=1)
    return {name: part.view(len(joint), *rows[name].shape[1:]).to(rows[name].dtype) for name, part in zip(rows, parts, strict=True)}
