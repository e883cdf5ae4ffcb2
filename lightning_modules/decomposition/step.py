"""One training step's losses and gradients, the same for every split of the global batch into ranks and microbatches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from theodolite.distributed import sum_over_ranks, world_size
from theodolite.functional.decomposition_losses import importance_minimality, importance_weights

from .decomposition import Decomposition, Prepared
from .draws import Draws
from .objectives import BatchObjective, Faithfulness, ImportanceMinimality, Objective, WholeBatchObjective


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of a global batch.

    Attributes:
        parts: (rows, their global slots) of each microbatch.
        global_rows: Rows over all ranks.
        seed: Parts of the seed of every draw: run seed, phase, step.
        step: Optimizer steps before this one.
        fraction: Of training that has passed.
    """

    parts: Sequence[tuple[Tensor, Sequence[int]]]
    global_rows: int
    seed: tuple[int | str, ...]
    step: int
    fraction: float

    def draws(self, index: int, purpose: str) -> Draws:
        """Draws of a microbatch."""
        rows, slots = self.parts[index]
        return Draws((*self.seed, purpose), slots, device=rows.device)


def microbatches(rows: Tensor, rank: int, ranks: int, size: int | None) -> list[tuple[Tensor, list[int]]]:
    """Cut a rank's rows into microbatches; its ``i``-th row has the global slot ``rank + i * ranks``."""
    slots = list(range(rank, rank + len(rows) * ranks, ranks))
    size = size or max(1, len(rows))
    return [(rows[i : i + size], slots[i : i + size]) for i in range(0, len(rows), size)]


def look_at(parts: Decomposition, batch: StepBatch, index: int, training: bool) -> Prepared:
    """Clean pass and importances of a microbatch, jittered in training under binomial sampling."""
    rows = batch.parts[index][0]
    jitter = None
    if training and parts.binomial:
        leading = parts.leading_shape(rows)
        jitter = batch.draws(index, "jitter").uniform((*leading[1:], sum(parts.model.counts.values())), "importances")
    prepared = parts.look(rows, jitter)
    prepared.index = index
    return prepared


def step_gradients(
    parts: Decomposition,
    objectives: Sequence[Objective],
    batch: StepBatch,
    backward: Callable[[Tensor], Any],
    without_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Tensor]:
    """Accumulate this rank's share of the gradient of ``sum of coeff * loss`` over the global batch.

    Gradients must then be *summed* over ranks.

    Args:
        parts: The decomposition.
        objectives: Losses with coefficients.
        batch: This rank's rows.
        backward: Called with each scalar to differentiate.
        without_sync: Context in which ``backward`` runs.

    Returns:
        By label, this rank's share of each loss, without graph: summed over ranks they are the losses; and ``total`` likewise.
    """
    whole = [o for o in objectives if isinstance(o, WholeBatchObjective)]
    # without its logarithm the penalty is a sum over rows like any other
    minimality = [o for o in objectives if isinstance(o, ImportanceMinimality) and o.beta]
    single = len(batch.parts) == 1
    prepared = [look_at(parts, batch, 0, training=True)] if single else _looks(parts, batch) if whole or minimality else []
    seen = [each.detached() for each in prepared]
    for objective in whole:
        pairs = [(each, batch.draws(each.index, objective.label)) for each in seen]
        objective.begin(parts, pairs, batch.step, training=True)
    weights = {o.label: _Minimality.of(o, seen, batch) for o in minimality}
    shares: dict[str, Tensor] = {}
    for index in range(len(batch.parts)):
        live = prepared[0] if single else look_at(parts, batch, index, training=True)
        terms = _batch_terms(parts, objectives, live, batch, weights)
        if index == 0:
            terms |= {o.label: (_coeff(o), o.value(parts) / world_size()) for o in objectives if isinstance(o, Faithfulness)}
        total = torch.stack([coeff * value for coeff, value in terms.values()]).sum()
        with without_sync():
            backward(total)
        for label, (_, value) in terms.items():
            shares[label] = shares.get(label, torch.zeros_like(value)) + value.detach()
    for objective in whole:
        objective.finish(batch.step)
    for label, minimal in weights.items():  # what was differentiated has the loss's gradient, not its value
        shares[label] = minimal.value / world_size()
    shares["total"] = torch.stack([_coeff(o) * shares[o.label].to(torch.float64) for o in objectives]).sum()
    return shares


def _looks(parts: Decomposition, batch: StepBatch) -> list[Prepared]:
    with torch.no_grad():
        return [look_at(parts, batch, index, training=True) for index in range(len(batch.parts))]


def _batch_terms(
    parts: Decomposition, objectives: Sequence[Objective], live: Prepared, batch: StepBatch, minimal: Mapping[str, _Minimality]
) -> dict[str, tuple[float, Tensor]]:
    """(coefficient, share) of each loss of one microbatch."""
    share = len(live.batch) / batch.global_rows
    terms: dict[str, tuple[float, Tensor]] = {}
    for objective in objectives:
        if isinstance(objective, ImportanceMinimality) and objective.label in minimal:
            terms[objective.label] = (_coeff(objective), minimal[objective.label].surrogate(objective, live, batch.fraction))
        elif isinstance(objective, ImportanceMinimality):
            sums = objective.component_sums(live.upper, batch.fraction)
            terms[objective.label] = (_coeff(objective), importance_minimality(sums, live.positions) * share)
        elif isinstance(objective, BatchObjective):
            total, count = objective.sums(parts, live, batch.draws(live.index, objective.label))
            terms[objective.label] = (_coeff(objective), total / count * share)
    return terms


@dataclass(frozen=True)
class _Minimality:
    """Importance minimality of the global batch, and the derivative by its sums."""

    value: Tensor
    weights: dict[str, Tensor]

    @staticmethod
    def of(objective: ImportanceMinimality, seen: Sequence[Prepared], batch: StepBatch) -> _Minimality:
        sums, positions = global_sums(objective, seen, batch.fraction)
        return _Minimality(importance_minimality(sums, positions, objective.beta), importance_weights(sums, positions, objective.beta))

    def surrogate(self, objective: ImportanceMinimality, live: Prepared, fraction: float) -> Tensor:
        """A linear function of the microbatch's sums with the loss's gradient."""
        sums = objective.component_sums(live.upper, fraction)
        return torch.stack([(self.weights[name].to(s.dtype) * s).sum() for name, s in sums.items()]).sum()


def global_sums(objective: ImportanceMinimality, seen: Sequence[Prepared], fraction: float) -> tuple[dict[str, Tensor], int]:
    """Sums of importances over the microbatches of all ranks in float64, and the number of positions. A collective."""
    with torch.no_grad():
        each = [objective.component_sums(prepared.upper, fraction) for prepared in seen]
        names = list(each[0])
        flat = torch.stack([torch.cat([sums[name].to(torch.float64) for name in names]) for sums in each]).sum(dim=0)
        positions = flat.new_tensor([sum(prepared.positions for prepared in seen)])
        flat = sum_over_ranks(torch.cat([flat, positions]))
        columns = flat[:-1].split([each[0][name].numel() for name in names])
        return dict(zip(names, columns, strict=True)), round(float(flat[-1]))


def _coeff(objective: Objective) -> float:
    assert objective.coeff is not None
    return objective.coeff
