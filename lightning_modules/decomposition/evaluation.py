"""One evaluation: every measure over all batches and ranks, without a trace in the model or in any random state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from theodolite.distributed import gather_objects
from theodolite.functional.decomposition_losses import importance_minimality

from .attention import AttentionPatterns
from .decomposition import Decomposition, Prepared
from .ground_truth import ComponentRecovery, IdentityCIError
from .measures import CIL0, CEAndKL, ComponentDensity, Measure, SubsetCEAndKL, Sums, ratios
from .objectives import BatchObjective, Faithfulness, ImportanceMinimality, Objective, WholeBatchObjective
from .persistent_pgd import PersistentPGDEval
from .registry import OBJECTIVES, build_entry
from .step import StepBatch, global_sums, look_at, microbatches
from .targets.build import Target


@runtime_checkable
class OnceMeasure(Protocol):
    """Something that is measured once per evaluation, of the model itself."""

    @property
    def label(self) -> str:
        """Name in logs."""
        ...

    def measure(self, parts: Decomposition, target: Target | None) -> dict[str, float]:
        """Numbers to log, by name."""
        ...


MEASURES: dict[str, type[Any]] = {
    kind.name: kind
    for kind in (CIL0, ComponentDensity, CEAndKL, SubsetCEAndKL, AttentionPatterns, IdentityCIError, ComponentRecovery, PersistentPGDEval)
}

AnyMeasure = Objective | Measure | OnceMeasure


def build_measures(specs: Sequence[Mapping[str, Any]]) -> list[AnyMeasure]:
    """Measures and losses of a configured list.

    Raises:
        ValueError: If an entry is unknown, has a coefficient, or two have the same name.
    """
    found: list[AnyMeasure] = [build_entry(spec, OBJECTIVES | MEASURES, "model.metrics") for spec in specs]
    labels = [each.label for each in found]
    for each in found:
        if getattr(each, "coeff", None) is not None:
            raise ValueError(f"model.metrics: {each.label} is evaluated, not trained; leave its coeff out.")
        if labels.count(each.label) > 1:
            raise ValueError(f"model.metrics: two entries are called {each.label!r}; give one of them another key.")
    return found


class Evaluation:
    """Running sums of one pass over the evaluation data.

    Args:
        parts: The decomposition.
        measures: What is measured.
        seed: Run seed; draws are a function of it, of the batch and of the row, and not of the training step.
        fraction: Of training that has passed, for annealed losses.
        micro: Rows per forward pass; None = all of a batch.
    """

    def __init__(self, parts: Decomposition, measures: Sequence[AnyMeasure], seed: int, fraction: float, micro: int | None) -> None:
        self.parts, self.measures, self.seed, self.fraction, self.micro = parts, measures, seed, fraction, micro
        self.totals: dict[str, Sums] = {each.label: {} for each in measures}

    def add(self, rows: Tensor, index: int, rank: int, ranks: int) -> None:
        """Add this rank's rows of a global batch. All ranks must call it for every batch.

        Raises:
            ValueError: If there are no rows.
        """
        if not len(rows):
            raise ValueError(
                f"Evaluation batch {index} leaves rank {rank} of {ranks} without rows; use a smaller eval batch or fewer ranks."
            )
        batch = StepBatch(microbatches(rows, rank, ranks, self.micro), len(rows) * ranks, (self.seed, "eval", index), 0, self.fraction)
        seen = [look_at(self.parts, batch, i, training=False) for i in range(len(batch.parts))]
        for each in self.measures:
            if isinstance(each, WholeBatchObjective):
                pairs = [(prepared, batch.draws(prepared.index, each.label)) for prepared in seen]
                each.begin(self.parts, pairs, 0, training=False)
            if isinstance(each, ImportanceMinimality):
                self._add_minimality(each, seen)
            for prepared in seen:
                self._add(each, self._sums(each, prepared, batch))

    def _sums(self, each: AnyMeasure, prepared: Prepared, batch: StepBatch) -> Sums:
        draws = batch.draws(prepared.index, each.label)
        if isinstance(each, Measure):
            return each.update(self.parts, prepared, draws)
        if isinstance(each, PerModule):
            return {name: (total.to(torch.float64), count) for name, (total, count) in each.by_module(self.parts, prepared, draws).items()}
        if isinstance(each, BatchObjective):
            total, count = each.sums(self.parts, prepared, draws)
            return {"": (total.to(torch.float64), count)}
        return {}

    def _add_minimality(self, each: ImportanceMinimality, seen: Sequence[Prepared]) -> None:
        """A global batch's value, counted by its positions: each rank adds the part of its own rows."""
        sums, positions = global_sums(each, seen, self.fraction)
        own = sum(prepared.positions for prepared in seen)
        self._add(each, {"": (importance_minimality(sums, positions, each.beta) * own, own)})

    def _add(self, each: AnyMeasure, sums: Sums) -> None:
        totals = self.totals[each.label]
        for key, (total, count) in sums.items():
            before = totals.get(key)
            totals[key] = (total, count) if before is None else (before[0] + total, before[1] + count)

    def compute(self, target: Target | None) -> dict[str, float]:
        """Numbers by name, over all ranks. A collective."""
        totals = merge(gather_objects({label: {k: (t.cpu(), n) for k, (t, n) in s.items()} for label, s in self.totals.items()}))
        numbers: dict[str, float] = {}
        for each in self.measures:
            for key, value in self._compute_one(each, totals[each.label], target).items():
                section = "loss/" if isinstance(each, Objective) else ""
                numbers[f"{section}{each.label}" + (f"/{key}" if key else "")] = value
        return numbers

    def _compute_one(self, each: AnyMeasure, totals: Sums, target: Target | None) -> dict[str, float]:
        if isinstance(each, OnceMeasure):
            return each.measure(self.parts, target)
        if isinstance(each, Faithfulness):
            return {"": float(each.value(self.parts))}
        if isinstance(each, Measure):
            return each.compute(totals)
        numbers = ratios(totals)
        if isinstance(each, PerModule):
            numbers[""] = sum(float(total) for total, _ in totals.values()) / sum(count for _, count in totals.values())
        return numbers


@runtime_checkable
class PerModule(Protocol):
    """A loss that has a value for each module, and one over all their entries."""

    label: ClassVar[str]

    def by_module(self, parts: Decomposition, prepared: Prepared, draws: Any) -> dict[str, tuple[Tensor, int]]:
        """Sum and count of each module."""
        ...


def merge(ranks: Sequence[Mapping[str, Sums]]) -> dict[str, Sums]:
    """Add the sums of all ranks."""
    merged: dict[str, Sums] = {label: {} for label in ranks[0]}
    for rank in ranks:
        for label, sums in rank.items():
            for key, (total, count) in sums.items():
                before = merged[label].get(key)
                merged[label][key] = (total, count) if before is None else (before[0] + total, before[1] + count)
    return merged
