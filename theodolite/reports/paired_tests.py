"""Every comparison under every test: over seeds, by signs, over seeds and problems, and the literal test of publications beside them.

Problems and samples come from the rollout tables of the final evaluation; a comparison whose tables are missing has only the tests over
seeds. Holm's correction runs over all comparisons of one measure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from theodolite.functional.statistics import (
    PairedTest,
    crossed_bootstrap,
    holm,
    literal_paired_t_test,
    matched,
    seed_level_t_test,
    sign_flip_test,
)
from theodolite.reports.records import Run, Study
from theodolite.reports.samples import rollout_table
from theodolite.reports.statistics_table import Comparison, compare, matching_rate, measure, measured

COLUMNS = {"hack_rate": "hack", "pass_rate": "correct"}
"""Measures that are tested, and what the rates of these names count in a rollout table."""
RESAMPLES = 2000
SAME_RATE = 1e-4
"""A table that does not give the logged rate to so much (loggers keep single precision) is of another evaluation."""


@dataclass(frozen=True, slots=True)
class PairTests:
    """One comparison and what each test says of it; a test is ``None`` where it cannot be made.

    Attributes:
        comparison: Paired by seed.
        seeds: Student's test over seeds.
        holm_p: Its p-value after Holm's correction over all comparisons of the measure; NaN where there is none.
        signs: The sign-flip test.
        crossed: Bootstrap over seeds and problems.
        literal: The t-test over seeds x samples, whose pairs are not independent.
        matched: The arms' means of :func:`~theodolite.reports.statistics_table.matching_rate` differ by at most 5 points; None where it was
            not measured.
    """

    comparison: Comparison
    seeds: PairedTest | None
    holm_p: float
    signs: PairedTest | None
    crossed: PairedTest | None
    literal: PairedTest | None
    matched: bool | None


def comparison_tests(study: Study, pairs: list[tuple[str, str]], name: str) -> list[PairTests]:
    """All tests of all pairs in one measure of :data:`COLUMNS`."""
    found = {pair: compare(study, *pair, name) for pair in pairs}
    seed_tests = {pair: _seed_test(study, item) for pair, item in found.items()}
    p_values = holm({"\x1f".join(pair): math.nan if test is None else test.p_value for pair, test in seed_tests.items()})
    tables = {arm: _cells(study, arm, name) for arm in {arm for pair in pairs for arm in pair}}
    return [
        PairTests(
            item,
            seed_tests[pair],
            p_values["\x1f".join(pair)],
            _of_values(study, item, sign_flip_test),
            _of_cells(tables[pair[0]], tables[pair[1]], item),
            _literal(tables[pair[0]], tables[pair[1]], item),
            _matched(study, *pair),
        )
        for pair, item in found.items()
    ]


def _seed_test(study: Study, item: Comparison) -> PairedTest | None:
    return _of_values(study, item, seed_level_t_test)


def _of_values(study: Study, item: Comparison, test: Any) -> PairedTest | None:
    if item.n < 2:
        return None
    own, other = measured(study, item.arm, item.measure), measured(study, item.against, item.measure)
    return test([own[seed] for seed in item.seeds], [other[seed] for seed in item.seeds])


def _cells(study: Study, arm: str, name: str) -> dict[int, tuple[tuple[str, ...], NDArray[np.float64]]]:
    """Of every seed: the problems, and an array (problems, samples) of outcomes; seeds without a whole table are left out."""
    found = {}
    for run in study.of(arm):
        cells = _outcomes(study, run, name)
        if cells is not None:
            found[run.seed] = cells
    return found


def _outcomes(study: Study, run: Run, name: str) -> tuple[tuple[str, ...], NDArray[np.float64]] | None:
    """The cells behind a measure, from the table of the evaluation that logged it; None where no whole table gives that rate."""
    key, logged = study.plan.measures[name], measure(study, run, name)
    column, path = COLUMNS.get(key.rpartition("/")[2]), rollout_table(run, key)
    if column is None or path is None or logged is None:
        return None
    needed = ["problem", "sample", "label", "correct"]
    if not set(needed) <= set(pq.read_schema(path).names):
        return None
    by_problem: dict[str, dict[int, float]] = {}
    for row in pq.read_table(path, columns=needed).to_pylist():
        value = float(row["label"] == "reward_hack") if column == "hack" else float(row["correct"])
        by_problem.setdefault(str(row["problem"]), {})[int(row["sample"])] = math.nan if row["label"] == "ungraded" else value
    problems = tuple(sorted(by_problem))
    samples = sorted({sample for one in by_problem.values() for sample in one})
    values = np.array([[by_problem[problem].get(sample, math.nan) for sample in samples] for problem in problems])
    whole = values.size > 0 and not np.isnan(values).any() and abs(float(values.mean()) - logged) <= SAME_RATE
    return (problems, values) if whole else None


def _paired_cells(own: Any, other: Any, item: Comparison) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """(seeds, problems, samples) of both, or None where the tables do not hold the same problems and samples."""
    if item.n < 2 or any(seed not in own or seed not in other for seed in item.seeds):
        return None
    shapes = {(cells[seed][0], cells[seed][1].shape) for cells in (own, other) for seed in item.seeds}
    if len(shapes) > 1:
        return None
    first, second = (np.stack([cells[seed][1] for seed in item.seeds]) for cells in (own, other))
    return first, second


def _of_cells(own: Any, other: Any, item: Comparison) -> PairedTest | None:
    pair = _paired_cells(own, other, item)
    if pair is None or pair[0].shape[1] < 2:
        return None
    return crossed_bootstrap(pair[0].mean(2), pair[1].mean(2), n_resamples=RESAMPLES)


def _literal(own: Any, other: Any, item: Comparison) -> PairedTest | None:
    pair = _paired_cells(own, other, item)
    if pair is None or pair[0].shape[2] < 2:
        return None
    return literal_paired_t_test(pair[0].mean(1), pair[1].mean(1))


def _matched(study: Study, arm: str, against: str) -> bool | None:
    own, other = (list(measured(study, name, matching_rate(study)).values()) for name in (arm, against))
    if not own or not other:
        return None
    return matched(math.fsum(own) / len(own), math.fsum(other) / len(other))


def tests_record(item: PairTests) -> dict[str, Any]:
    """One line of ``summary.json``: p-values and intervals by test, ``null`` where a test could not be made."""

    def plain(test: PairedTest | None) -> dict[str, Any] | None:
        if test is None:
            return None
        p_value = None if math.isnan(test.p_value) else test.p_value
        return {"label": test.label, "n": test.n, "mean": test.mean, "low": test.low, "high": test.high, "p": p_value}

    record: dict[str, Any] = {"arm": item.comparison.arm, "against": item.comparison.against, "measure": item.comparison.measure}
    record |= {"refusal": item.comparison.refusal or None, "pass_rates_matched": item.matched}
    record |= {"seeds": plain(item.seeds), "holm_p": None if math.isnan(item.holm_p) else item.holm_p}
    return record | {"signs": plain(item.signs), "seeds_and_problems": plain(item.crossed), "literal": plain(item.literal)}
