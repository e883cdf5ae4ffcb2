"""Has a decomposition of a toy model found what is known to be there? Errors and similarities, equal to 0 and 1 where it has."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

HUNGARIAN_SIZE = 500
"""Matrices whose smaller side is below this get the best assignment of columns to rows, larger ones a greedy one."""


def identity_order(importance: Tensor) -> Tensor:
    """Order of columns that brings a matrix (features, C) closest to the identity; columns without a row come last, in their order.

    Args:
        importance: Causal importances of one-hot inputs.
    """
    rows, columns = importance.shape
    if min(rows, columns) < HUNGARIAN_SIZE:
        row_index, chosen = linear_sum_assignment(-importance.detach().to(torch.float64).cpu().numpy())
        pairs = sorted(zip(row_index.tolist(), chosen.tolist(), strict=True))
        first = [column for _, column in pairs]
    else:
        first = _greedy_columns(importance)
    taken = set(first)
    return torch.tensor(first + [column for column in range(columns) if column not in taken])


def dense_order(importance: Tensor) -> Tensor:
    """Order of columns by their sum, largest first."""
    return importance.sum(dim=0).argsort(descending=True, stable=True)


def identity_error(importance: Tensor, tolerance: float = 0.1) -> int:
    """Entries of a permuted (features, C) matrix that are not the identity's: off it above ``tolerance``, on it below 1 - ``tolerance``."""
    ordered = importance[:, identity_order(importance).to(importance.device)]
    size = min(ordered.shape)
    diagonal = torch.zeros_like(ordered, dtype=torch.bool)
    diagonal[range(size), range(size)] = True
    return int((ordered[~diagonal] > tolerance).sum() + (ordered[diagonal] < 1 - tolerance).sum())


def dense_error(importance: Tensor, k: int, tolerance: float = 0.1) -> int:
    """How far a (features, C) matrix is from k columns in use: missing ones (each without an entry of 1 - tolerance), entries elsewhere.

    Columns are ordered by their sum. Each of the first k counts one error unless some entry reaches ``1 - tolerance``; in all others every
    entry above ``tolerance`` counts.
    """
    ordered = importance[:, dense_order(importance)]
    missing = (ordered[:, :k] >= 1 - tolerance).sum(dim=0) == 0
    return int(missing.sum() + (ordered[:, k:] > tolerance).sum())


def recovery(weight: Tensor, read: Tensor, write: Tensor, names: str = "rows") -> tuple[Tensor, Tensor]:
    """How well components carry a weight's known directions.

    Args:
        weight: (d_in, d_out).
        read: V (d_in, C).
        write: U (C, d_out).
        names: ``rows``: the direction of input i is ``weight[i]``, and component c carries ``V[i, c] U[c]`` of it; ``columns``: the
            transpose.

    Returns:
        (largest cosine similarity, ratio of the norm of that component's part to the direction's), one per direction: (n,), (n,).
    """
    if names == "columns":
        weight, read, write = weight.T, write.T, read.T
    parts = read[:, :, None] * write[None]
    norms = parts.norm(dim=-1)
    cosine = torch.einsum("nd,ncd->nc", weight, parts) / (norms * weight.norm(dim=-1)[:, None]).clamp_min(1e-12)
    best = cosine.max(dim=1)
    return best.values, norms.gather(1, best.indices[:, None])[:, 0] / weight.norm(dim=-1)


def _greedy_columns(importance: Tensor) -> list[int]:
    """Row after row, the free column with the largest entry."""
    free = importance.detach().clone()
    chosen: list[int] = []
    for row in range(min(importance.shape)):
        column = int(free[row].argmax())
        chosen.append(column)
        free[:, column] = -torch.inf
    return chosen
