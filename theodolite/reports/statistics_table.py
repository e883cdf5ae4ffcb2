"""Spread over seeds and differences paired by seed: the numbers behind the table and the sentences of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from theodolite.functional.statistics import Spread, spread, t_interval
from theodolite.reports.records import RATES, Run, Study

Direction = Literal["lower", "higher", "unresolved", "single", "none"]
"""What a comparison shows: the interval lies below 0, above 0, contains 0; only one common seed; no common seed."""

MEASURES = {rate: f"test/hinted/{rate}" for rate in RATES} | {"unseen_pass_rate": "test/unseen/pass_rate"}
"""Final measures of a run and the keys that they are logged under."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """``arm`` minus ``against``, paired by seed over the seeds that both finished.

    Attributes:
        arm: The arm of interest.
        against: What it is compared with.
        measure: One of :data:`MEASURES`.
        seeds: The common seeds.
        differences: One per common seed.
        mean: Their mean.
        low: Lower end of the two-sided 95 % t interval of the mean; ``None`` below two seeds.
        high: Upper end.
    """

    arm: str
    against: str
    measure: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float | None
    low: float | None
    high: float | None

    @property
    def n(self) -> int:
        """Number of common seeds."""
        return len(self.seeds)

    @property
    def below(self) -> int:
        """Number of seeds on which ``arm`` is lower."""
        return sum(value < 0 for value in self.differences)

    @property
    def above(self) -> int:
        """Number of seeds on which ``arm`` is higher."""
        return sum(value > 0 for value in self.differences)

    @property
    def direction(self) -> Direction:
        """See :data:`Direction`."""
        if self.n == 0:
            return "none"
        if self.low is None or self.high is None:
            return "single"
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "unresolved"


def measure(run: Run, name: str) -> float | None:
    """A final measure of a run by its name in :data:`MEASURES`."""
    return run.final(MEASURES[name])


def compare(study: Study, arm: str, against: str, name: str) -> Comparison:
    """``arm`` minus ``against`` in the measure ``name``, over the seeds for which both were measured."""
    values = {run.seed: measure(run, name) for run in study.of(arm)}
    others = {run.seed: measure(run, name) for run in study.of(against)}
    seeds, differences = [], []
    for seed in sorted(values.keys() & others.keys()):
        value, other = values[seed], others[seed]
        if value is not None and other is not None:
            seeds.append(seed)
            differences.append(value - other)
    low, high = t_interval(differences)
    return Comparison(arm, against, name, tuple(seeds), tuple(differences), spread(differences).mean, low, high)


def arm_spread(study: Study, arm: str, name: str) -> Spread:
    """Spread of a final measure over the seeds of an arm."""
    return spread([measure(run, name) for run in study.of(arm)])


def n_rollouts(study: Study, arm: str) -> int | None:
    """Rollouts behind the final rates of an arm, over its finished seeds; ``None`` when no run says."""
    known = [value for run in study.of(arm) if run.finished and (value := run.final("test/hinted/n")) is not None]
    return int(sum(known)) if known else None


def base_by_seed(study: Study, name: str) -> dict[int, float]:
    """Rate of the untrained policy per seed, averaged over the arms (which start from the same weights and should agree)."""
    gathered: dict[int, list[float]] = {}
    for run in study.runs:
        value = run.base(name)
        if value is not None:
            gathered.setdefault(run.seed, []).append(value)
    return {seed: math.fsum(values) / len(values) for seed, values in sorted(gathered.items())}


def base_disagreement(study: Study) -> float:
    """Largest difference in base rates between arms of the same seed; 0 when all start from the same policy."""
    widest = 0.0
    for name in RATES:
        for seed in study.seeds:
            values = [value for run in study.runs if run.seed == seed and (value := run.base(name)) is not None]
            widest = max(widest, max(values) - min(values)) if values else widest
    return widest


def base_rollouts(study: Study) -> int | None:
    """Rollouts behind the base rates, counted once per seed; ``None`` when no run says."""
    per_seed = {run.seed: int(value) for run in reversed(study.runs) if (value := run.base("n")) is not None}
    return sum(per_seed.values()) if per_seed else None


def pooled_difference_sd(comparisons: Sequence[Comparison]) -> float | None:
    r"""Root mean variance :math:`\sqrt{\sum_c s_c^2 / C}` of paired differences over comparisons with at least two seeds."""
    variances = [sd**2 for item in comparisons if (sd := spread(item.differences).sd) is not None]
    return math.sqrt(math.fsum(variances) / len(variances)) if variances else None


def comparison_record(item: Comparison) -> dict[str, Any]:
    """A comparison as plain JSON."""
    return {
        "arm": item.arm,
        "against": item.against,
        "measure": item.measure,
        "n": item.n,
        "seeds": list(item.seeds),
        "mean": item.mean,
        "low": item.low,
        "high": item.high,
        "n_lower": item.below,
        "n_higher": item.above,
        "shows": item.direction,
    }
