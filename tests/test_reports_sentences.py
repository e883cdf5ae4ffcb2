"""Sentences, columns and refusals of a report say what its numbers show: no more, and with the key that was read."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_report_sections import ARMS, PLAN, quick_pictures, write  # noqa: F401  # pyright: ignore[reportUnusedImport]

from theodolite.reports.browser import rollout_data
from theodolite.reports.claim import claim_of
from theodolite.reports.hypotheses import Hypothesis, judge
from theodolite.reports.oracle_use import oracle_arms
from theodolite.reports.page import render_page
from theodolite.reports.paired_tests import comparison_tests
from theodolite.reports.records import Study, read_study
from theodolite.reports.remarks import caveats, lead, missing, resolution
from theodolite.reports.results_text import results_text
from theodolite.reports.verdict import against_other, dropped

PAIR = ("method", "vanilla")


def rewritten(study: Study, **changes: Any) -> Study:
    """The study with keys of its plan replaced; None removes one."""
    plan = {key: value for key, value in (PLAN | changes).items() if value is not None}
    (study.directory / "study.json").write_text(json.dumps(plan))
    return read_study(study.directory)


def logged(study: Study, arm: str, **values: float | None) -> Study:
    """The study with values of an arm's final evaluation replaced, ``__`` for slashes; None removes one."""
    for run in study.of(arm):
        rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
        changed = rows[-1] | {f"test/{name.replace('__', '/')}": value for name, value in values.items()}
        rows[-1] = {key: value for key, value in changed.items() if value is not None}
        (run.directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_study(study.directory)


def test_every_test_of_a_measure_is_made_on_the_table_that_it_was_counted_in(tmp_path: Path) -> None:
    study = rewritten(write(tmp_path / "s"), measures={"pass_rate": "test/no_hint/pass_rate"})
    (bare,) = comparison_tests(study, [PAIR], "pass_rate")
    assert bare.seeds is not None
    assert (bare.crossed, bare.literal) == (None, None), "only the hinted tables exist, and they hold another quantity"
    for run in study.runs:
        shutil.copy(
            run.directory / "rollouts" / "step_000009_test_hinted.parquet", run.directory / "rollouts" / "step_000009_test_no_hint.parquet"
        )
    assert comparison_tests(study, [PAIR], "pass_rate")[0].crossed is None, "a table that does not give the logged rate is another's"
    for arm in ARMS:
        for run in study.of(arm):
            hinted = run.series["test/hinted/pass_rate"]
            run.series["test/no_hint/pass_rate"] = dict(hinted)
    whole = comparison_tests(study, [PAIR], "pass_rate")[0].crossed
    assert whole is not None
    assert bare.comparison.measure == "pass_rate"


def test_one_pass_rate_decides_what_is_matched_and_is_named(tmp_path: Path) -> None:
    study = write(tmp_path / "s", {"vanilla": (0.5, 0.4), "method": (0.1, 0.41)})
    study = logged(study, "method", hinted__pass_rate=0.9)
    assert comparison_tests(study, [PAIR], "hack_rate")[0].matched is True
    claim = claim_of(study)
    assert claim is not None
    assert claim.text.startswith("At matched pass rate")
    assert "`test/no_hint/pass_rate`" in claim.text
    assert "Pass rates matched (test/no_hint/pass_rate)" in render_page(study)
    for arm in ("vanilla", "method"):
        study = logged(study, arm, no_hint__pass_rate=None)
    assert comparison_tests(study, [PAIR], "hack_rate")[0].matched is False
    assert "Pass rates matched (test/hinted/pass_rate)" in render_page(study)


@pytest.mark.parametrize(("hack", "lost"), [(0.05, True), (0.97, False)])
def test_a_lower_pass_rate_is_read_as_lost_ability_only_where_hacks_fell(tmp_path: Path, hack: float, lost: bool) -> None:
    study = write(tmp_path / "s", {"vanilla": (0.5, 0.4), "method": (hack, 0.0)}, problems=20)
    text = against_other(study, *PAIR).text
    claim = claim_of(study)
    assert claim is not None
    assert "solves fewer problems" in text
    assert ("may be ability" in text) == lost
    assert ("lost ability" in claim.text) == lost


def test_an_arm_that_never_finished_a_run_is_missing_and_not_passed_over(tmp_path: Path) -> None:
    study = write(tmp_path / "s", {"vanilla": (0.9, 0.1), "oracle": (0.1, 0.4)}, seeds=(10, 11))
    (tmp_path / "s" / "method-10").mkdir()
    (tmp_path / "s" / "method-10" / "metrics.jsonl").write_text('{"step": 0}\n')
    study = read_study(tmp_path / "s")
    assert study.absent == (("method", 10, "directory without run.json"), ("method", 11, "no such run"))
    assert dropped(study) == [("method", "vanilla"), ("method", "oracle")]
    claim = claim_of(study)
    assert claim is not None
    assert claim.text == "No claim: `method` has no run."
    assert "`method` seed 10 (directory without run.json); `method` seed 11 (no such run)" in missing(study)
    page = render_page(study)
    assert "not made because an arm has no run: <code>method</code> minus <code>vanilla</code>" in page
    assert missing(study) in results_text([tmp_path / "s"])
    failed = {"arm": "method", "seed": 11, "state": "failed", "error": "ValueError: no.", "folder": "method-11", "seconds": None}
    (tmp_path / "s" / "runs.json").write_text(json.dumps({"runs": [failed]}))
    assert "`method` seed 11 (failed: ValueError: no.)" in missing(read_study(tmp_path / "s"))


def test_near_the_reference_means_within_the_mark_or_better(tmp_path: Path) -> None:
    claim = claim_of(write(tmp_path / "s", {"vanilla": (0.9, 0.1), "method": (0.0, 0.9), "oracle": (0.3, 0.2)}))
    assert claim is not None
    assert claim.reached
    assert "is within 5 points of it, or better, on both axes" in claim.mark


@pytest.mark.parametrize(("change", "outcome"), [("lower", "undecided"), ("higher", "falsified")])
def test_a_pass_condition_that_is_not_met_is_printed_and_falsifies_nothing(tmp_path: Path, change: str, outcome: str) -> None:
    study = write(tmp_path / "s", {"vanilla": (0.9, 0.1), "method": (0.0, 0.0)})
    study = logged(logged(study, "vanilla", hinted__pass_rate=0.3), "method", hinted__pass_rate=0.1)
    (item,) = judge(study, [Hypothesis("H", "c", *PAIR, "hack_rate", change, 0.1, "at_least")])  # pyright: ignore[reportArgumentType]
    assert item.outcome == outcome
    assert "pass condition not met: `test/hinted/pass_rate` differs by -20.0 points, asked is at most 5 points lower" in item.reason
    assert "pass rate at most 5 points lower" in item.hypothesis.asked


def test_the_browser_shows_training_with_its_scores_and_filters_by_the_verdict_s_overrides(tmp_path: Path) -> None:
    study = write(tmp_path / "s", {"vanilla": (1.0, 0.0)}, seeds=(10,))
    folder = study.runs[0].directory / "completions"
    folder.mkdir()
    row = {
        "problem": "t1",
        "sample": 0,
        "prompt": "p",
        "completion": "run_tests = 1",
        "reward": math.nan,
        "passed": True,
        "overrides": False,
    }
    rows = [row | {"label": "correct", "feature/flagged": 1.0, "feature/rebound_score": math.nan}]
    for step in (0, 50):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"step_{step:06d}.parquet")
    (shown,) = [item for item in rollout_data(study)["rows"] if item["place"] == "training"]
    assert (shown["file"], shown["scores"], shown["reward"]) == ("step_000050", {"flagged": 1.0}, None)
    assert (shown["marked"], shown["overrides"]) == ([0], False)
    assert {item["overrides"] for item in rollout_data(study)["rows"] if item["place"] == "evaluation"} == {True}
    render_page(study)


def test_results_tell_what_was_not_measured_from_what_never_happened_and_print_no_nan(tmp_path: Path) -> None:
    study = write(tmp_path / "s", {"vanilla": (0.4, 0.1), "method": (0.1, 0.4)}, seeds=(10, 11))
    for arm, rate in (("vanilla", 0.5), ("method", 0.25)):
        study = logged(study, arm, hinted__hack_rate=rate, random_names__hack_rate=rate)
    for run in study.of("method"):
        kept = [line for line in (run.directory / "metrics.jsonl").read_text().splitlines() if "val/" not in line]
        (run.directory / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    text = results_text([tmp_path / "s"])
    lines = {line.split(" | ")[0]: line for line in text.split("### By mechanism")[0].splitlines() if line.startswith("| `")}
    assert lines["| `vanilla`"].endswith("never (0 of n=2) |")
    assert lines["| `method`"].endswith("not measured |")
    assert "hack, random name" in text
    assert "p = nan" not in text
    assert "\N{MINUS SIGN}25.0 [\N{MINUS SIGN}25.0, \N{MINUS SIGN}25.0], no spread, n = 2" in text
    assert "are the same on every seed" in resolution(read_study(tmp_path / "s"))
    assert "Hack, random name, %" in render_page(read_study(tmp_path / "s"))


@pytest.mark.parametrize(("changes", "message"), [
    ({"mechanisms": {"magic": "x"}}, "no mechanism 'magic'; choose among definition, assignment, other"),
    ({"claim": {"arm": "method", "versus": "vanilla"}}, "claim has the unknown key 'versus'"),
    ({"claim": {"against": "vanilla"}}, "claim names no arm"),
    ({"comparisons": [["method"]]}, "is no pair"),
    ({"arms": ["method"]}, "arms must be an object"),
])  # fmt: skip
def test_a_plan_that_no_report_can_read_is_refused_in_one_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    study = write(tmp_path / "s", {"vanilla": (0.4, 0.1)}, seeds=(10,))
    with pytest.raises(ValueError, match=message):
        rewritten(study, **changes)


def test_arms_that_saw_the_oracle_s_labels_are_told_by_their_runs(tmp_path: Path) -> None:
    study = write(tmp_path / "s", seeds=(10,))
    (tmp_path / "s" / "oracle-10" / "config.yaml").write_text("  - class_path: theodolite.callbacks.oracle.OraclePenalty\n")
    (tmp_path / "s" / "method-10" / "log.txt").write_text("x\nuses_oracle: Mine, Other may see the oracle's labels in this run.\n")
    assert oracle_arms(study) == {"method": ["Mine", "Other"], "oracle": ["OraclePenalty"]}
    assert any(item.startswith("`oracle` was trained with the oracle's labels (`OraclePenalty`)") for item in caveats(study))
    assert render_page(study).count('<small class="note">trained with the oracle&#x27;s labels</small>') == 2
    assert "trained with the oracle's labels: Mine, Other" in results_text([tmp_path / "s"])


def test_what_is_said_of_detectors_and_seeds_fits_the_study(tmp_path: Path) -> None:
    study = rewritten(write(tmp_path / "s", seeds=(10, 11)), mechanisms=None)
    assert not any("sees every hack" in item for item in caveats(study))
    assert any("not told apart by kind" in item for item in caveats(study))
    three = rewritten(study, mechanisms={"definition": "a", "assignment": "b", "other": "c"})
    assert any("definition (a), assignment (b) and other (c). Every kind" in item for item in caveats(three))
    assert "The final hack rates count 144 graded programs" in lead(study)
    shutil.rmtree(tmp_path / "s" / "vanilla-11")
    assert "No arm was run with the same two or more seeds as `vanilla`" in resolution(read_study(tmp_path / "s"))
