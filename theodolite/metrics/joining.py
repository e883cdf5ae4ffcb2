"""Joins the states of ranks by additive reduces: independent of their order, and right for ranks of unequal size or without any row."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from theodolite.functional.fvu import FvuSums
from theodolite.functional.row_sample import NO_KEY


def summed(values: Tensor, group: Any) -> Tensor:
    """A new tensor: the sum over ranks."""
    values = values.clone()
    dist.all_reduce(values, op=dist.ReduceOp.SUM, group=group)
    return values


def largest_shape(state: Tensor, dimensions: int, group: Any) -> list[int]:
    """The shape of the ranks that have rows; zeros if none has."""
    shape = torch.tensor([*state.shape] if state.ndim == dimensions else [0] * dimensions, device=state.device)
    dist.all_reduce(shape, op=dist.ReduceOp.MAX, group=group)
    return shape.tolist()


def join_sums(sums: FvuSums, group: Any) -> FvuSums:
    """Sums over all ranks' rows: first their means, then everything around the common mean."""
    first = summed(torch.cat([sums.count[:, None], sums.count[:, None] * sums.mean], 1), group)
    count, mean = first[:, 0], first[:, 1:] / first[:, :1].clamp_min(1)
    scatter = sums.scatter + sums.count[:, None] * (sums.mean - mean).square()
    second = summed(torch.cat([scatter[None], sums.residual]), group)
    return FvuSums(count, mean, second[0], second[1:])


def join_sample(keys: Tensor, target: Tensor, error: Tensor, size: tuple[int, int, int], group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The rows with the smallest keys of all ranks.

    Args:
        keys: (s,) int64, ascending.
        target: (s, d) float64.
        error: (s, G) float64.
        size: Rows to keep, d and G: a rank without rows cannot know them.
        group: Process group.
    """
    kept, width, groups = size
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    table = torch.zeros(world, kept, dtype=torch.int64, device=keys.device)
    table[rank] = NO_KEY
    table[rank, : len(keys)] = keys
    order = summed(table, group).flatten().sort(stable=True)
    chosen = order.indices[:kept][order.values[:kept] < NO_KEY]
    rows = torch.zeros(len(chosen), width + groups, dtype=torch.float64, device=keys.device)
    mine = chosen // kept == rank
    if bool(mine.any()):
        rows[mine] = torch.cat([target, error], 1)[chosen[mine] % kept]
    rows = summed(rows, group)
    return order.values[: len(chosen)], rows[:, :width], rows[:, width:]
