"""Collectives that do nothing on one process, so that callers need no branch on the world size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def world_size() -> int:
    """Number of processes in the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. All ranks must call it."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def on_every_rank(make: Callable[[], T]) -> T:
    """What ``make`` returns on this rank; where it fails on one, all ranks fail, and none waits for it. All ranks must call it.

    Raises:
        RuntimeError: Another rank failed; the message says which, and of what.
        Exception: Whatever ``make`` raised on this rank.
    """
    if world_size() == 1:
        return make()
    made: list[T] = []
    error: Exception | None = None
    try:
        made.append(make())
    except Exception as raised:  # the other ranks have to hear of it first
        error = raised
    texts = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise RuntimeError(f"rank {rank} failed ({text}).")
    return made[0]


def concatenate_over_ranks(tensor: Tensor) -> Tensor:
    """Every rank's tensor of the same shape, one after the other in rank order. All ranks must call it."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, the same on all; changes ``tensor`` itself. All ranks must call it, with one shape and dtype."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its sum over ranks, in one flat all-reduce per dtype.

    A missing gradient counts as zero, also on one process: a rank without any signal takes part like the others, and an optimizer with
    moments moves the same way whatever the number of ranks.

    Args:
        parameters: The same parameters in the same order on every rank; those that need no gradient are left out.
    """
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    if world_size() == 1:
        return
    for group in by_dtype.values():
        gradients: list[Tensor] = [parameter.grad for parameter in group if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def leave_process_group() -> None:
    """End the default group on all ranks together; nothing without one.

    A rank that ends while another one's background threads still talk to it makes them abort, and the launcher reports a run that
    finished as failed.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
