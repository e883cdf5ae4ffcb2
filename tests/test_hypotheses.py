"""Pre-registered hypotheses are judged from the runs' files, all of them, in whichever direction the data point."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from theodolite.reports import build_report
from theodolite.reports.hypotheses import Hypothesis, judge, read_hypotheses
from theodolite.reports.records import Study, read_study

HACKS = {
    "vanilla": {0: 0.90, 1: 0.94, 2: 0.88, 3: 0.93, 4: 0.91},
    "projected_live": {0: 0.12, 1: 0.20, 2: 0.15, 3: 0.18, 4: 0.10},
    "shuffled": {0: 0.91, 1: 0.93, 2: 0.90, 3: 0.91, 4: 0.94},
    "short": {0: 0.1, 1: 0.1, 2: 0.1},
}


def study(folder: Path, passes: dict[str, float] | None = None) -> Study:
    for arm, values in HACKS.items():
        for seed, hack in values.items():
            run = folder / f"{arm}-{seed}"
            run.mkdir(parents=True)
            (run / "run.json").write_text(json.dumps({"arm": arm, "seed": seed}))
            final = {"step": 9, "test/hinted/hack_rate": hack, "test/hinted/pass_rate": (passes or {}).get(arm, 0.4), "test/hinted/n": 100}
            (run / "metrics.jsonl").write_text(json.dumps(final) + "\n")
    return read_study(folder)


def hypothesis(name: str = "H1", arm: str = "projected_live", against: str | float = "vanilla", **settings: object) -> Hypothesis:
    return Hypothesis(name, "A claim.", arm, against, "hack_rate", **({"change": "lower", "by": 0.15} | settings))  # pyright: ignore[reportArgumentType]


def test_a_large_drop_is_confirmed_and_its_reverse_falsified_with_one_sided_p_values(tmp_path: Path) -> None:
    (confirmed,) = judge(study(tmp_path), [hypothesis()])
    differences = [HACKS["projected_live"][s] - HACKS["vanilla"][s] for s in range(5)]
    expected = stats.ttest_1samp(differences, -0.15, alternative="less").pvalue  # pyright: ignore[reportAttributeAccessIssue]
    assert (confirmed.outcome, confirmed.n) == ("confirmed", 5)
    assert confirmed.p_for == pytest.approx(expected)
    assert confirmed.mean == pytest.approx(sum(differences) / 5)
    (falsified,) = judge(read_study(tmp_path), [hypothesis(change="higher", by=0.0)])
    assert falsified.outcome == "falsified"


def test_a_null_is_undecided_against_zero_and_falsified_against_a_size(tmp_path: Path) -> None:
    shuffled = study(tmp_path)
    (zero,) = judge(shuffled, [hypothesis(arm="shuffled", by=0.0)])
    (sized,) = judge(shuffled, [hypothesis(arm="shuffled", by=0.15)])
    assert (zero.outcome, sized.outcome) == ("undecided", "falsified")


def test_an_arm_is_set_against_a_number(tmp_path: Path) -> None:
    (above, below) = judge(
        study(tmp_path),
        [hypothesis("H4", "vanilla", 0.3, change="higher", by=0.0), hypothesis("H5", "projected_live", 0.3, change="higher", by=0.0)],
    )
    assert (above.outcome, below.outcome) == ("confirmed", "falsified")


def test_p_values_are_corrected_over_all_hypotheses_of_the_file(tmp_path: Path) -> None:
    runs = study(tmp_path)
    (alone,) = judge(runs, [hypothesis()])
    together = judge(runs, [hypothesis(f"H{index}") for index in range(4)])
    assert together[0].p_for == pytest.approx(4 * alone.p_for)


def test_arms_with_unequal_seeds_are_not_compared(tmp_path: Path) -> None:
    (refused, absent) = judge(study(tmp_path), [hypothesis(arm="short"), hypothesis("H2", arm="nobody")])
    assert (refused.outcome, refused.n, refused.mean) == ("undecided", 0, None)
    assert "unequal seeds" in refused.reason
    assert "not measured" in absent.reason


@pytest.mark.parametrize(("rule", "passes", "outcome"), [
    ("matched", 0.44, "confirmed"), ("matched", 0.50, "undecided"), ("at_least", 0.50, "confirmed"), ("at_least", 0.30, "undecided"),
    ("any", 0.0, "confirmed"),
])  # fmt: skip
def test_a_claim_counts_only_where_the_pass_rate_does_what_it_must(tmp_path: Path, rule: str, passes: float, outcome: str) -> None:
    (judged,) = judge(study(tmp_path, {"projected_live": passes}), [hypothesis(pass_rate=rule)])
    assert judged.outcome == outcome


@pytest.mark.parametrize(("text", "message"), [
    ("- a\n", "must hold a list under 'hypotheses:'"),
    ("hypotheses: [{name: H1}]\n", "hypothesis 1 lacks"),
    ("hypotheses: [{name: H1, claim: c, arm: a, against: b, measure: hack_rate, change: lower, size: 3}]\n", "has \\['size'\\]"),
    ("hypotheses: [{name: H1, claim: c, arm: a, against: b, measure: hacks, change: lower}]\n", "measure is 'hacks'; choose one of"),
    ("hypotheses: [{name: H1, claim: c, arm: a, against: b, measure: hack_rate, change: lower, by: -1}]\n", "must not be negative"),
])  # fmt: skip
def test_a_file_that_cannot_be_judged_is_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "h.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_hypotheses(tmp_path / "h.yaml")


def test_the_report_prints_every_hypothesis_and_escapes_its_claim(tmp_path: Path) -> None:
    study(tmp_path)
    entries = [
        {"name": "H1", "claim": "Less <script>alert(1)</script>.", "arm": "projected_live", "against": "vanilla", "measure": "hack_rate",
         "change": "lower", "by": 0.15},
        {"name": "H2", "claim": "Never run.", "arm": "nobody", "against": "vanilla", "measure": "hack_rate", "change": "lower"},
    ]  # fmt: skip
    (tmp_path / "hypotheses.yaml").write_text(json.dumps({"hypotheses": entries}))
    summary = build_report(tmp_path)
    assert [item["outcome"] for item in summary["hypotheses"]] == ["confirmed", "undecided"]
    assert summary["hypotheses"][1]["p_for"] is None
    assert math.isfinite(summary["hypotheses"][0]["p_for"])
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Less &lt;script&gt;" in page
    assert "<script" not in page
    assert "Never run." in page
