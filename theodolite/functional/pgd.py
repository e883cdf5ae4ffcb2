r"""Projected gradient ascent on masks: the worst reconstruction that bounded sources can bring about.

Sources are numbers in [0, 1], one per channel of every site; a loss turns them into masks. One step moves every source against the
reconstruction and clips it to its box, as adversarial examples are made (Madry et al., arXiv 1706.06083) with the masks of parameter
decompositions (arXiv 2506.20790) in the place of pixels:

.. math:: r \leftarrow \mathrm{clip}_{[0,1]}\bigl(r + \alpha\,\mathrm{sign}\,\nabla_r \textstyle\sum_{i \in \text{batch}} L_i(r)\bigr)

**A shared source attacks a batch, and which batch decides the number.** Rows with opposite gradients cancel in the sum, so one source
against 64 rows does less harm than one against 8. Here the attack batch is explicit: rows carry the *group* whose source attacks them,
and gradients are summed over a group's rows, of all ranks, in float64: neither microbatches nor processes change a sign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from theodolite.functional.row_noise import uniform_rows

MaskScope: TypeAlias = Literal["unique_per_datapoint", "unique_per_row", "shared_across_batch", "shared_across_batch_per_position"]
MASK_SCOPES: tuple[MaskScope, ...] = ("unique_per_datapoint", "unique_per_row", "shared_across_batch", "shared_across_batch_per_position")
SourceInit: TypeAlias = Literal["random", "zeroes", "ones"]
SOURCE_INITS: tuple[SourceInit, ...] = ("random", "zeroes", "ones")
Sources: TypeAlias = dict[str, Tensor]
LossSum: TypeAlias = Callable[[Mapping[str, Tensor]], tuple[Tensor, int]]
"""Sources by site, broadcastable to the rows' leading shape, to a summed loss and the count it is a sum over."""
Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""Sum of a tensor over ranks."""


def is_shared(scope: MaskScope) -> bool:
    """Whether one source attacks several rows, so that the attack batch matters."""
    return scope.startswith("shared")


def source_shape(scope: MaskScope, leading: Sequence[int]) -> tuple[int, ...]:
    """Leading shape of the sources of rows with leading shape ``(rows,)`` or ``(rows, positions, ...)``.

    ``unique_per_datapoint``: every row and position its own; ``unique_per_row``: a row's positions share one; ``shared_across_batch``: one
    for all rows and positions; ``shared_across_batch_per_position``: one per position for all rows.
    """
    rows, positions = (1 if is_shared(scope) else leading[0]), tuple(leading[1:])
    per_position = scope in ("unique_per_datapoint", "shared_across_batch_per_position")
    return (rows, *(positions if per_position else (1,) * len(positions)))


def initial_sources(
    channels: Mapping[str, int],
    shape: Sequence[int],
    init: SourceInit,
    seed: Sequence[int | str],
    slots: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Sources:
    """Where an attack starts.

    Args:
        channels: Number of channels by site.
        shape: Leading shape, from :func:`source_shape`.
        init: ``random`` = uniform on [0, 1); ``zeroes``; ``ones``.
        seed: What the draw is for: parts of :func:`~theodolite.seeds.derive_seed`.
        slots: Places of the rows in the global batch, which name their random numbers; by default 0, 1, ...
        dtype: Of the sources.
        device: Where they end up; random numbers are drawn on the CPU, so that every machine starts alike.
    """
    if init != "random":
        return {name: torch.full((*shape, count), float(init == "ones"), dtype=dtype, device=device) for name, count in channels.items()}
    rows = range(shape[0]) if slots is None else slots
    flat = uniform_rows(rows, (*shape[1:], sum(channels.values())), "pgd", *seed, dtype=dtype).to(device)
    # each in memory of its own: every step passes over it several times
    return {name: part.contiguous() for name, part in zip(channels, flat.split(list(channels.values()), dim=-1), strict=True)}


@dataclass(slots=True)
class AttackCurve:
    """What one attack did to the rows it was given.

    Attributes:
        sums: Summed loss after n steps, by n.
        counts: What it is a sum over, by n.
        agreement: Mean over sources of |sum of the rows' gradients| / sum of |rows' gradients|, after n steps: 1 where all rows pull the
            same way, 0 where they cancel. Only for a source shared by all rows, and steps that another step followed.
    """

    sums: dict[int, float] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    agreement: dict[int, float] = field(default_factory=dict)

    def loss(self, n_steps: int) -> float:
        """Mean loss after ``n_steps``."""
        return self.sums[n_steps] / self.counts[n_steps]

    def add(self, other: AttackCurve) -> None:
        """Count another attack's rows in; agreements are not a mean over rows and stay this one's."""
        for n, value in other.sums.items():
            self.sums[n] = self.sums.get(n, 0.0) + value
            self.counts[n] = self.counts.get(n, 0) + other.counts[n]


def attack_each(loss: LossSum, sources: Sources, n_steps: Sequence[int], step_size: float, slope: LossSum | None = None) -> AttackCurve:
    """Attack rows that each have sources of their own, in place, and report the loss at several numbers of steps of this one attack.

    A loss is measured by the forward pass of the step that follows it, so a curve costs no more than its last point. Parameters should be
    frozen by the caller: only sources are differentiated, but whatever asks for a gradient is kept for the backward pass. Nothing crosses
    rows here, so every microbatch and rank can be attacked by itself. (Training losses may share a source over what ``loss`` sees, too.)

    Args:
        loss: Of the rows.
        sources: By site; changed in place.
        n_steps: Numbers of steps at which the loss is wanted; the largest decides how many are taken.
        step_size: Of the ascent, in units of the box.
        slope: Has the gradient of ``loss`` and any value, NaN for one: taken in steps whose loss is not wanted, where it is cheaper.

    Raises:
        ValueError: If a site's sources do not reach the loss, or a number of steps is negative.
    """
    curve = AttackCurve()
    for step, differentiate in _steps(n_steps):
        evaluated = loss if step in n_steps else slope or loss
        total, count = _move(evaluated, sources, step_size) if differentiate else _measure(evaluated, sources)
        if step in n_steps:
            curve.sums[step], curve.counts[step] = float(total), count
    return curve


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows under attack by shared sources.

    Attributes:
        loss: Their summed loss under sources of leading shape ``(count, ...)``.
        groups: (count,) whose source attacks each row: an index into the sources' first axis.
        slope: See :func:`attack_each`.
    """

    loss: LossSum
    groups: Tensor
    slope: LossSum | None = None


def attack_groups(
    parts: Sequence[Rows], sources: Sources, n_steps: Sequence[int], step_size: float, average: bool = False, reduce: Reduce | None = None
) -> AttackCurve:
    """Attack groups of rows, each with one shared source, in place. As :func:`attack_each`, but gradients are summed over rows.

    Args:
        parts: Microbatches, in which every row appears once.
        sources: (groups, ..., C) by site; changed in place.
        n_steps: See :func:`attack_each`.
        step_size: See :func:`attack_each`.
        average: Move all groups by the mean of their mean gradients, as ranks that average gradients do, instead of each by its own.
        reduce: Sums a tensor over ranks; every rank must then call this, with its own rows (perhaps none) and the same sources.

    Returns:
        Sums over the rows of all ranks.

    Raises:
        ValueError: See :func:`attack_each`.
    """
    curve = AttackCurve()
    for step, differentiate in _steps(n_steps):
        sums = _GroupSums.over(parts, sources, step in n_steps, differentiate, reduce)
        if step in n_steps:
            curve.sums[step], curve.counts[step] = float(sums.total), round(float(sums.counts.sum()))
            if differentiate and len(sums.counts) == 1:
                curve.agreement[step] = sums.agreement()
        if differentiate:
            for source, gradient in zip(sources.values(), sums.directions(average, sources), strict=True):
                ascend(source, gradient, step_size)
    return curve


def ascend(source: Tensor, gradient: Tensor, step_size: float) -> None:
    """One step of projected sign ascent, in place."""
    _climb(source, gradient.sign(), step_size)


def _climb(source: Tensor, signs: Tensor, step_size: float) -> None:
    source.add_(signs.to(source.dtype), alpha=step_size).clamp_(0.0, 1.0)


def _steps(n_steps: Sequence[int]) -> list[tuple[int, bool]]:
    """Every step of an attack and whether another follows it."""
    if not n_steps or min(n_steps) < 0:
        raise ValueError(f"n_steps is {list(n_steps)}; give at least one number of steps, none below 0.")
    return [(step, step < max(n_steps)) for step in range(max(n_steps) + 1)]


def _measure(loss: LossSum, sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Loss and count."""
    with torch.no_grad():
        return loss({name: source.detach() for name, source in sources.items()})


def _move(loss: LossSum, sources: Mapping[str, Tensor], step_size: float) -> tuple[Tensor, int]:
    """Loss and count, and one step of every source as soon as its gradient is known: it is then at hand, and is let go before the next."""
    leaves, still = _leaves(sources), set(sources)

    def step(leaf: Tensor, name: str) -> None:
        assert leaf.grad is not None
        _climb(sources[name], leaf.grad.sign_(), step_size)
        leaf.grad = None
        still.discard(name)

    for name, leaf in leaves.items():
        leaf.register_post_accumulate_grad_hook(partial(step, name=name))
    with torch.enable_grad():
        total, count = loss(leaves)
    total.backward(inputs=list(leaves.values()))
    _check_reached(still)
    return total.detach(), count


def _slopes(loss: LossSum, sources: Mapping[str, Tensor]) -> tuple[Tensor, int, list[Tensor]]:
    """Loss, count and gradients."""
    leaves = _leaves(sources)
    with torch.enable_grad():
        total, count = loss(leaves)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    _check_reached({name for name, gradient in zip(leaves, gradients, strict=True) if gradient is None})
    return total.detach(), count, [gradient for gradient in gradients if gradient is not None]


def _leaves(sources: Mapping[str, Tensor]) -> Sources:
    return {name: source.detach().requires_grad_() for name, source in sources.items()}


def _check_reached(missed: set[str]) -> None:
    if missed:
        raise ValueError(f"The sources of {min(missed)!r} do not reach the loss, so there is nothing to attack there; leave that site out.")


@dataclass(slots=True)
class _GroupSums:
    """Float64 sums over rows: the loss (), if wanted, its counts (G,), gradients (G, N) by group, and gradients without their sign (N,)."""

    total: Tensor
    counts: Tensor
    gradients: Tensor
    magnitudes: Tensor

    @staticmethod
    def over(parts: Sequence[Rows], sources: Sources, valued: bool, differentiate: bool, reduce: Reduce | None) -> _GroupSums:
        some = next(iter(sources.values()))
        numbers = sum(source[0].numel() for source in sources.values()) if differentiate else 0
        groups = some.shape[0]
        flat = torch.zeros(1 + groups + (groups + 1) * numbers, dtype=torch.float64, device=some.device)
        sums = _GroupSums._view(flat, groups, numbers)
        for part in parts:
            sums._add(part, sources, valued, differentiate)
        return sums if reduce is None else _GroupSums._view(reduce(flat), groups, numbers)

    @staticmethod
    def _view(flat: Tensor, groups: int, numbers: int) -> _GroupSums:
        total, counts, gradients, magnitudes = flat.split([1, groups, groups * numbers, numbers])
        return _GroupSums(total, counts, gradients.view(groups, numbers), magnitudes)

    def _add(self, part: Rows, sources: Sources, valued: bool, differentiate: bool) -> None:
        # one leaf per row: what crosses rows is then summed here, in float64, and not inside the backward pass
        rows = {name: source[part.groups] for name, source in sources.items()}
        evaluated = part.loss if valued else part.slope or part.loss
        total, count, gradients = _slopes(evaluated, rows) if differentiate else (*_measure(evaluated, rows), [])
        self.total += total
        per_row = torch.full(part.groups.shape, count / len(part.groups), dtype=torch.float64, device=part.groups.device)
        self.counts.index_add_(0, part.groups, per_row)
        if gradients:
            wide = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1).to(torch.float64)
            self.gradients.index_add_(0, part.groups, wide)
            self.magnitudes += wide.abs_().sum(dim=0)

    def directions(self, average: bool, sources: Sources) -> list[Tensor]:
        """Gradients as the sources are shaped; only their signs matter."""
        gradients = self.gradients
        if average:
            gradients = (gradients / self.counts[:, None]).mean(dim=0, keepdim=True).expand_as(gradients)
        parts = gradients.split([source[0].numel() for source in sources.values()], dim=1)
        return [part.reshape(source.shape) for part, source in zip(parts, sources.values(), strict=True)]

    def agreement(self) -> float:
        moved = self.magnitudes > 0
        return float((self.gradients[0][moved].abs() / self.magnitudes[moved]).mean()) if bool(moved.any()) else 0.0
