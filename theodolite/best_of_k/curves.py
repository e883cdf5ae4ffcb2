"""Stage 4: curves over K with intervals and controls, from scores alone. No model, no GPU, seconds.

All curves of a run, and of all runs over the same rows, are resampled with the same counts of documents, so differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from theodolite.best_of_k.scores import Scores
from theodolite.functional.best_of_k import expected_best_of_k, expected_error_of_mean, expected_of_selected
from theodolite.functional.bootstrap import bca_interval, bootstrap_counts, jackknife_counts, percentile_interval
from theodolite.functional.reconstruction_metrics import ErrorSums, TargetSums, group_sums, resampled_metrics

ELEMENTS_AT_ONCE = 20_000_000
"""Of a matrix of bootstrap counts: replicates are taken in turns beyond that."""


@dataclass(frozen=True, slots=True)
class Resampling:
    """How intervals are made.

    Attributes:
        replicates: Bootstrap samples; 0 = no intervals (they are then null, never zero).
        seed: Of the samples.
        level: Coverage aimed at.
    """

    replicates: int = 2000
    seed: int = 42
    level: float = 0.95

    def __post_init__(self) -> None:
        """Refuse what cannot be resampled."""
        if self.replicates == 1 or self.replicates < 0 or not 0 < self.level < 1:
            raise ValueError(f"bootstrap needs 0 or at least 2 replicates and a level in (0, 1), got {self.replicates} and {self.level}.")


@dataclass(slots=True)
class Curve:
    """One quantity against K (a constant control has one column), and what resampling made of it.

    Attributes:
        errors: Sums per document.
        estimate: Metric -> (C,).
        replicates: Metric -> (B, C), empty without bootstrap.
    """

    errors: ErrorSums
    estimate: dict[str, Tensor] = field(default_factory=dict)
    replicates: dict[str, Tensor] = field(default_factory=dict)


class Curves:
    """Every curve of one run.

    Args:
        scores: Complete scores.
        ks: The K to report, each one of ``scores.grid``.
        resampling: How intervals are made.
        norm_share: Share of rows with the largest norms that the robust companion leaves out.

    Raises:
        ValueError: If a K is not in the grid.
    """

    def __init__(self, scores: Scores, ks: Sequence[int], resampling: Resampling, norm_share: float = 0.01) -> None:
        absent = [k for k in ks if k not in scores.grid]
        if absent:
            raise ValueError(f"Scores were made for K = {scores.grid}, not for {absent[0]}.")
        self.scores, self.ks, self.resampling, self.norm_share = scores, list(ks), resampling, norm_share
        rows = scores.table.rows(range(scores.rows))
        self.ids, self.documents, self.target = rows.ids, rows.documents, rows.activations.double().cpu()
        numbers = {document: number for number, document in enumerate(dict.fromkeys(rows.documents))}
        self.group, self.groups = torch.tensor([numbers[document] for document in rows.documents]), len(numbers)
        self.sums = TargetSums.of(self.target, self.group, self.groups)
        self.curves = self._curves()
        self._resample()

    @property
    def selecting(self) -> str:
        """The reconstructor that selects."""
        return self.scores.names[0]

    def row_errors(self) -> Tensor:
        """(rows, len(ks)) expected squared error per dimension of the selected candidate."""
        return expected_best_of_k(self.scores.column(f"error.{self.selecting}"), self.ks) / self.target.shape[1]

    def interval(self, replicates: Tensor) -> tuple[list[float | None], list[float | None]]:
        """Lower and upper ends for each column of (B, C) replicates; None without bootstrap or where one is not a number."""
        if not len(replicates):
            return [None] * replicates.shape[1], [None] * replicates.shape[1]
        low, high = percentile_interval(replicates, self.groups, self.resampling.level)
        return finite(low), finite(high)

    def bca(self, name: str, metric: str) -> tuple[list[float | None], list[float | None]]:
        """BCa ends of one curve's metric; None without bootstrap."""
        curve = self.curves[name]
        if not self.resampled:
            empty: list[float | None] = [None] * len(curve.estimate[metric])
            return empty, empty
        leave_one_out = torch.cat([self._metrics(part, curve)[metric] for part in jackknife_counts(self.groups).split(self._turn())])
        low, high = bca_interval(curve.estimate[metric], curve.replicates[metric], leave_one_out, self.resampling.level)
        return finite(low), finite(high)

    @property
    def resampled(self) -> bool:
        """Whether there are intervals: asked for, and more than one document to resample."""
        return self.resampling.replicates > 0 and self.groups > 1

    def without_largest_norms(self) -> list[float | None]:
        """FVE against K without the rows of largest norm, about the mean of the rows that stay."""
        keep = len(self.target) - math.ceil(self.norm_share * len(self.target))
        if keep < 2:
            return [None] * len(self.ks)
        rows = self.target.norm(dim=1).argsort()[:keep]
        kept = self.target[rows]
        variance = (kept - kept.mean(0)).square().sum()
        return finite(1 - self.row_errors()[rows].sum(0) * self.target.shape[1] / variance)

    def _curves(self) -> dict[str, Curve]:
        """Sums per document of every curve and control."""
        column, first, at = self.scores.column, self.selecting, [self.scores.grid.index(k) for k in self.ks]
        selects = column(f"error.{first}")
        found: dict[str, Curve] = {}
        for name in self.scores.names:
            error, aim = (expected_of_selected(column(f"{kind}.{name}"), selects, self.ks) for kind in ("error", "directional"))
            found[f"best_of_k.{name}"] = self._curve(error, aim, column(f"residual.{name}")[:, at])
            found[f"greedy.{name}"] = self._curve(column(f"greedy.{name}")[:, None], column(f"greedy_directional.{name}")[:, None])
        found["mean_of_k"] = self._curve(expected_error_of_mean(selects, column("error_of_mean"), self.ks))
        if not bool(column("null").isnan().any()):  # with one document there is no text about another
            found["null"] = self._curve(expected_best_of_k(column("null"), self.ks))
            found["shuffled"] = self._curve(column("shuffled")[:, None])
        return found

    def _curve(self, errors: Tensor, directional: Tensor | None = None, residuals: Tensor | None = None) -> Curve:
        parts = [None if part is None else group_sums(part, self.group, self.groups) for part in (directional, residuals)]
        return Curve(ErrorSums(group_sums(errors, self.group, self.groups), *parts))

    def _metrics(self, counts: Tensor, curve: Curve) -> dict[str, Tensor]:
        return resampled_metrics(counts, self.sums, curve.errors)

    def _turn(self) -> int:
        return max(1, ELEMENTS_AT_ONCE // self.groups)

    def _resample(self) -> None:
        ones = torch.ones(1, self.groups, dtype=torch.float64)
        for curve in self.curves.values():
            curve.estimate = {metric: value[0] for metric, value in self._metrics(ones, curve).items()}
            curve.replicates = {metric: value.new_empty(0, len(value)) for metric, value in curve.estimate.items()}
        if not self.resampled:
            return
        counts = bootstrap_counts(self.groups, self.resampling.replicates, self.resampling.seed)
        for curve in self.curves.values():
            parts = [self._metrics(part, curve) for part in counts.split(self._turn())]
            curve.replicates = {metric: torch.cat([part[metric] for part in parts]) for metric in curve.estimate}


def finite(values: Tensor) -> list[float | None]:
    """Numbers for JSON, which has none for NaN and infinity."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def summary_of(curve: Curve, curves: Curves) -> dict[str, Any]:
    """Each metric's values with their intervals: ``{metric: {"value": [...], "ci_lower": [...], "ci_upper": [...]}}``."""
    found: dict[str, Any] = {}
    for metric, value in curve.estimate.items():
        low, high = curves.interval(curve.replicates[metric])
        found[metric] = {"value": finite(value), "ci_lower": low, "ci_upper": high}
    return found


def gains(curve: Curve, curves: Curves, metric: str = "fve") -> dict[str, Any]:
    """What K buys over the first K reported, with paired intervals (the variance between documents cancels)."""
    value, replicates = curve.estimate[metric], curve.replicates[metric]
    low, high = curves.interval(replicates - replicates[:, :1])
    return {"over_k": curves.ks[0], "value": finite(value - value[0]), "ci_lower": low, "ci_upper": high}
