"""Spread over seeds and differences paired by seed: the numbers behind the table and the sentences of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from theodolite.functional.statistics import Spread, spread, t_interval
from theodolite.reports.plan import RATES
from theodolite.reports.records import Run, Study

Direction = Literal["lower", "higher", "unresolved", "single", "none"]
"""What a comparison shows: the interval lies below 0, above 0, contains 0; both arms have one seed; they cannot be compared."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """``arm`` minus ``against``, paired by seed. Arms with unequal seeds are not compared: a mean over others is another quantity.

    Attributes:
        arm: The arm of interest.
        against: What it is compared with.
        measure: One of :data:`~theodolite.reports.plan.MEASURES`.
        seeds: The seeds of both.
        differences: One per seed.
        mean: Their mean.
        low: Lower end of the two-sided 95 % t interval of the mean; ``None`` below two seeds.
        high: Upper end.
        refusal: Why they are not compared, naming the runs that are missing; empty where they are.
    """

    arm: str
    against: str
    measure: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float | None
    low: float | None
    high: float | None
    refusal: str = ""

    @property
    def n(self) -> int:
        """Number of seeds."""
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


def measure(study: Study, run: Run, name: str) -> float | None:
    """A final measure of a run by its name in :data:`~theodolite.reports.plan.MEASURES`."""
    return run.final(study.plan.measures[name])


def measured(study: Study, arm: str, name: str) -> dict[int, float]:
    """The seeds of an arm for which a final measure exists, and its values."""
    return {run.seed: value for run in study.of(arm) if (value := measure(study, run, name)) is not None}


def compare(study: Study, arm: str, against: str, name: str) -> Comparison:
    """``arm`` minus ``against`` in the measure ``name``; refused, in one sentence, where their seeds are not the same."""
    values, others = measured(study, arm, name), measured(study, against, name)
    missing = [f"`{against}` seed {seed}" for seed in sorted(values.keys() - others.keys())]
    missing += [f"`{arm}` seed {seed}" for seed in sorted(others.keys() - values.keys())]
    if missing or not values:
        what = ", ".join(missing) if missing else f"both `{arm}` and `{against}`"
        return Comparison(arm, against, name, (), (), None, None, None, f"not compared: {name.replace('_', ' ')} of {what} is missing")
    seeds = sorted(values)
    differences = [values[seed] - others[seed] for seed in seeds]
    low, high = t_interval(differences)
    return Comparison(arm, against, name, tuple(seeds), tuple(differences), spread(differences).mean, low, high)


def arm_spread(study: Study, arm: str, name: str) -> Spread:
    """Spread of a final measure over the seeds of an arm."""
    return spread(list(measured(study, arm, name).values()))


def matching_rate(study: Study) -> str:
    """The pass rate by which arms count as matched: without write access where the study measured it, else the one under the hint.

    Without write access nothing can be overwritten, so what is solved there is ability alone.
    """
    return "no_hint_pass_rate" if any(measured(study, arm, "no_hint_pass_rate") for arm in study.arms) else "pass_rate"


def n_rollouts(study: Study, arm: str) -> int | None:
    """Rollouts behind the final rates of an arm, over its finished seeds; ``None`` when no run says."""
    known = [value for run in study.of(arm) if run.finished and (value := run.final(study.plan.count_key)) is not None]
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
        "refusal": item.refusal or None,
    }
