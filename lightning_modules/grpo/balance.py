"""Deal a window's groups out to ranks again before gradients are computed, so that no rank waits for the one with the most work.

Every rank samples its own prompts, but how many tokens of them carry a gradient is known only afterwards: groups without signal cost
nothing, and completions end when they like. Denominators are global and gradients are summed, so it makes no difference which rank
computes which group, except to how long the longest takes. Groups stay whole: their prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from theodolite.distributed import gather_objects, world_size
from theodolite.protocols import Reward, Rollout, Verdict, Window

from .anchors import Anchors
from .window import part_of


@dataclass(slots=True)
class Share:
    """What gradients are computed from, on one rank.

    Attributes:
        window: Whole groups, those that this rank computes.
        verdicts: One per rollout, for callbacks that use the oracle.
        repeats: (n,) see :meth:`~.gradients.PolicyGradientModule.merge_repeats`.
        anchors: By index in ``window``; None = not computed yet.
        loads: Work of the heaviest rank over the mean of all, as sampled and as dealt out; 1 = all ranks end together.
    """

    window: Window
    verdicts: list[Verdict]
    repeats: Tensor
    anchors: Anchors | None
    loads: tuple[float, float] = (1.0, 1.0)


@dataclass(slots=True)
class _Group:
    """One group on its way to another rank; plain data and tensors on the CPU."""

    slot: int
    row: Any
    rollouts: list[Rollout]
    rewards: list[Reward]
    verdicts: list[Verdict]
    columns: dict[str, Tensor]
    features: dict[str, Tensor]
    parts: list[str]
    anchors: tuple[list[Tensor | None], list[Tensor | None]] | None


def deal(work: Sequence[int], owners: Sequence[int], ranks: int) -> list[int]:
    """Which rank computes which group: the longest first, each to the rank with least work so far.

    Args:
        work: Of each group; one without work stays where it is.
        owners: Rank that sampled each group.
        ranks: Their number.

    Returns:
        A rank per group; the owners themselves where dealing out makes the heaviest rank no lighter.
    """
    dealt, loads = list(owners), [0] * ranks
    for k in sorted(range(len(work)), key=lambda k: (-work[k], k)):
        if work[k]:
            dealt[k] = min(range(ranks), key=lambda rank: (loads[rank], rank != owners[k], rank))
            loads[dealt[k]] += work[k]
    return dealt if max(loads) < max(_loads(work, owners, ranks)) else list(owners)


def balance(share: Share, active: Sequence[int], slots: Sequence[int], rank: int, device: torch.device | str) -> Share:
    """This rank's part of the window of all ranks, evened out. All ranks must call it.

    Args:
        share: What this rank sampled.
        active: Indices of its rollouts that are computed.
        slots: Global slot of each of its groups.
        rank: This rank.
        device: Where anchors go.
    """
    if world_size() == 1:
        return share
    work = _work(share.window, active)
    told = sorted((slot, owner, w) for owner, pairs in enumerate(gather_objects(list(zip(slots, work, strict=True)))) for slot, w in pairs)
    every_work, owners = [w for _, _, w in told], [owner for _, owner, _ in told]
    dealt = deal(every_work, owners, world_size())
    share.loads = (_imbalance(every_work, owners), _imbalance(every_work, dealt))
    if dealt == owners:
        return share
    target = {slot: to for (slot, _, _), to in zip(told, dealt, strict=True)}
    local = {slot: _take(share, g, slot) for g, slot in enumerate(slots)}
    moved = gather_objects([group for slot, group in local.items() if target[slot] != rank])
    mine = [group for slot, group in local.items() if target[slot] == rank]
    mine += [group for groups in moved for group in groups if target[group.slot] == rank]
    return _put_together(share, sorted(mine, key=lambda group: group.slot), device)


def _work(window: Window, active: Sequence[int]) -> list[int]:
    """Tokens to compute per group: the completions that carry a gradient, and their prompt once."""
    work = [0] * len(window.rows)
    for i in active:
        rollout, g = window.rollouts[i], i // window.group_size
        work[g] += len(rollout.tokens.completion_ids) + (0 if work[g] else len(rollout.tokens.prompt_ids))
    return work


def _loads(work: Sequence[int], owners: Sequence[int], ranks: int) -> list[int]:
    return [sum(w for w, owner in zip(work, owners, strict=True) if owner == rank) for rank in range(ranks)]


def _imbalance(work: Sequence[int], owners: Sequence[int]) -> float:
    loads = _loads(work, owners, world_size())
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def _take(share: Share, g: int, slot: int) -> _Group:
    """One group with every column filled: another rank's callbacks may have set one that this rank's left empty."""
    window, part = share.window, slice(g * share.window.group_size, (g + 1) * share.window.group_size)
    weights = window.weights if window.weights.numel() else torch.ones(len(window.rollouts), dtype=torch.float64)
    columns = {"values": window.values, "advantages": window.advantages, "weights": weights, "repeats": share.repeats}
    indices = range(part.start, part.stop)
    anchors = share.anchors
    return _Group(
        slot,
        window.rows[g],
        window.rollouts[part],
        window.rewards[part],
        share.verdicts[part],
        {name: values[part].cpu() for name, values in columns.items()},
        {name: values[part].cpu() for name, values in window.features.items()},
        [part_of(window, i) for i in indices],
        None if anchors is None else (_anchors_of(anchors.old, indices), _anchors_of(anchors.reference, indices)),
    )


def _anchors_of(found: dict[int, Tensor], indices: range) -> list[Tensor | None]:
    return [found[i].cpu() if i in found else None for i in indices]


def _put_together(share: Share, groups: list[_Group], device: torch.device | str) -> Share:
    lengths = [max(len(rollout.tokens.completion_ids) for rollout in group.rollouts) for group in groups]

    def column(name: str) -> Tensor:
        return _stack([group.columns[name] for group in groups], lengths)

    old = share.window
    window = Window(
        old.step,
        [group.row for group in groups],
        [rollout for group in groups for rollout in group.rollouts],
        [reward for group in groups for reward in group.rewards],
        old.group_size,
        column("values"),
        column("advantages"),
        old.metrics,
        _features(list(old.features), groups),
        column("weights"),
        [part for group in groups for part in group.parts],
    )
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    anchors = None if share.anchors is None else Anchors(_by_index(groups, 0, device), _by_index(groups, 1, device))
    return Share(window, verdicts, column("repeats"), anchors, share.loads)


def _stack(columns: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Columns of several groups as one, a value per token where one of them has it.

    Values per token may be of different width on different ranks; nothing is read beyond a row.

    Args:
        columns: (group size,) or (group size, T) of each group.
        lengths: Tokens of each group's longest completion.
    """
    if not columns:
        return torch.empty(0, dtype=torch.float64)
    if any(column.ndim == 2 for column in columns):
        columns = [c if c.ndim == 2 else c[:, None].expand(-1, n) for c, n in zip(columns, lengths, strict=True)]
        width = max(column.shape[1] for column in columns)
        columns = [pad(column, (0, width - column.shape[1])) for column in columns]
    return torch.cat(list(columns))


def _features(known: Sequence[str], groups: Sequence[_Group]) -> dict[str, Tensor]:
    """What callbacks measured on any of the groups; NaN where they did not."""

    def measured(group: _Group, name: str) -> Tensor:
        return group.features.get(name, torch.full((len(group.rollouts),), torch.nan, dtype=torch.float64))

    names = dict.fromkeys([*known, *(name for group in groups for name in group.features)])
    return {name: _stack([measured(group, name) for group in groups], ()) for name in names}


def _by_index(groups: Sequence[_Group], which: int, device: torch.device | str) -> dict[int, Tensor]:
    rows = [row for group in groups for row in (group.anchors or ([], []))[which]]
    return {i: row.to(device) for i, row in enumerate(rows) if row is not None}
