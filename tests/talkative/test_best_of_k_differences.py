"""Paired differences between runs: against a bootstrap that repeats rows, and far narrower than the two bands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_describers import Table, TinyDescriber

from theodolite.best_of_k.candidates import Drawing
from theodolite.best_of_k.curves import Curves, Resampling
from theodolite.best_of_k.sweep import SweepPlan, run_stages
from theodolite.functional.bootstrap import bootstrap_counts, percentile_interval
from theodolite.reports.best_of_k import check_comparable, result_of, write_result
from theodolite.reports.best_of_k_differences import as_json, differences_of, replicates_file

ROWS, KS = 60, [1, 8]
SETTINGS = {"bootstrap_replicates": 300, "bootstrap_seed": 42, "confidence": 0.95}


def run(folder: Path, label: str, module: TinyDescriber, **changes: Any) -> tuple[Path, Curves]:
    settings = SETTINGS | changes
    done = run_stages(folder / "cache", Table(ROWS), module, SweepPlan(tuple(KS), 8, Drawing(1.0, 3, 0)))
    curves = Curves(done.scores, KS, Resampling(settings["bootstrap_replicates"], settings["bootstrap_seed"], settings["confidence"]))
    return write_result(folder, label, curves, result_of(curves, settings, None, label)), curves


def read(*files: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in files]


def test_intervals_are_those_of_a_bootstrap_that_repeats_rows(tmp_path: Path) -> None:
    first, other = run(tmp_path, "a", TinyDescriber()), run(tmp_path, "b", TinyDescriber(empty_share=0.3))
    found = differences_of(read(first[0], other[0]), [first[0], other[0]])
    assert [(each.label, each.against, each.reconstructor, each.role) for each in found] == [
        ("b", "a", "in_loop", "selects"),
        ("b", "a", "held_out", "held out"),
    ]
    target = first[1].target.numpy()
    documents = np.array([int(name[1:]) for name in first[1].documents])
    errors = [run[1].row_errors().numpy() * target.shape[1] for run in (first, other)]
    counts = bootstrap_counts(ROWS // 2, 300, 42).numpy().astype(int)
    replicates = []
    for count in counts:  # a plain loop over rows, each as often as its document was drawn
        rows = np.concatenate([np.repeat(np.flatnonzero(documents == d), n) for d, n in enumerate(count)])
        variance = np.square(target[rows] - target[rows].mean(0)).sum()
        replicates.append((errors[0][rows].sum(0) - errors[1][rows].sum(0)) / variance)
    low, high = percentile_interval(torch.tensor(np.array(replicates)), ROWS // 2)
    assert found[0].ci_lower == pytest.approx(low.tolist(), abs=1e-9)
    assert found[0].ci_upper == pytest.approx(high.tolist(), abs=1e-9)
    whole = np.square(target - target.mean(0)).sum()
    assert found[0].value == pytest.approx(((errors[0].sum(0) - errors[1].sum(0)) / whole).tolist(), abs=1e-12)


def test_pairing_narrows_the_interval_and_a_run_does_not_differ_from_itself(tmp_path: Path) -> None:
    first, _ = run(tmp_path, "a", TinyDescriber())
    other, _ = run(tmp_path, "b", TinyDescriber(empty_share=0.05))
    results = read(first, other, first)
    change, _, same, _ = differences_of(results, [first, other, first])
    bands = sum(result["curves"]["best_of_k.in_loop"]["fve"]["ci_upper"][1] for result in results[:2])
    bands -= sum(result["curves"]["best_of_k.in_loop"]["fve"]["ci_lower"][1] for result in results[:2])
    assert change.ci_upper[1] is not None
    assert change.ci_lower[1] is not None
    assert change.ci_upper[1] - change.ci_lower[1] < 0.3 * bands
    assert same.value == same.ci_lower == same.ci_upper == [0.0, 0.0]
    assert as_json([change], results[0]["run"])["documents"] == ROWS // 2


def test_what_cannot_be_paired_is_refused_or_has_no_interval(tmp_path: Path) -> None:
    first, _ = run(tmp_path, "a", TinyDescriber())
    other, _ = run(tmp_path, "b", TinyDescriber(), bootstrap_seed=1)
    with pytest.raises(ValueError, match="differ in bootstrap_seed"):
        check_comparable(read(first, other))  # type: ignore[arg-type]
    bare = [run(tmp_path, label, TinyDescriber(), bootstrap_replicates=0)[0] for label in ("c", "d")]
    assert differences_of(read(*bare), bare)[0].ci_lower == [None, None]
    replicates_file(first).unlink()
    with pytest.raises(FileNotFoundError, match="cannot be paired with other runs"):
        differences_of(read(first, first), [first, first])
