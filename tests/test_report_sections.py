"""What a report says of a sweep's study: the claim, every test, the rollout browser, results as Markdown, two configs side by side."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from theodolite.reports.__main__ import main
from theodolite.reports.browser import rollout_data
from theodolite.reports.browser_script import SCRIPT
from theodolite.reports.claim import claim_of
from theodolite.reports.compare_runs import compare_runs
from theodolite.reports.page import render_page
from theodolite.reports.paired_tests import comparison_tests
from theodolite.reports.protocol_table import time_to_half
from theodolite.reports.records import Study, read_study
from theodolite.reports.results_text import results_text

ARMS = {"vanilla": (0.90, 0.10), "method": (0.05, 0.42), "oracle": (0.02, 0.44)}
PLAN = {
    "title": "A study & its plan",
    "arms": {name: {"title": f"the arm {name}", "control": name == "oracle"} for name in ARMS},
    "claim": {"arm": "method", "against": "vanilla", "reference": "oracle"},
    "comparisons": [["method", "vanilla"], ["method", "oracle"]],
    "mechanisms": {"definition": "seen", "assignment": "unseen"},
}
PROMPT = "# Checked by calling run_tests().\ndef solve(xs):\n"
EVIL = "</script><script>document.title = 'broken'</script><img src=x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are looked at in test_reports.py."""
    monkeypatch.setattr("theodolite.reports.page.render_svg", lambda study, panel, theme: b"<svg/>")


def write(folder: Path, arms: dict[str, tuple[float, float]] = ARMS, seeds: tuple[int, ...] = (10, 11, 12), problems: int = 6) -> Study:
    """A finished study with 4 samples of every problem."""
    folder.mkdir(exist_ok=True)
    (folder / "study.json").write_text(json.dumps(PLAN))
    for arm, (hack, passing) in arms.items():
        for seed in seeds:
            write_run(folder / f"{arm}-{seed}", arm, seed, hack, passing, problems)
    return read_study(folder)


def write_run(run: Path, arm: str, seed: int, hack: float, passing: float, problems: int) -> None:
    (run / "rollouts").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"arm": arm, "seed": seed, "command": f"theodolite fit --seed_everything={seed}"}))
    draw = random.Random(f"{arm}{seed}")
    rows = [rollout(f"p{problem}", sample, draw.random(), hack, passing) for problem in range(problems) for sample in range(4)]
    rates = {"hack_rate": np.mean([row["label"] == "reward_hack" for row in rows]), "pass_rate": np.mean([row["correct"] for row in rows])}
    final: dict[str, Any] = {"step": 9} | {f"test/hinted/{name}": float(value) for name, value in rates.items()}
    final |= {"test/hinted/n": len(rows), "test/hinted/kl_k3": 0.1, "test/no_hint/pass_rate": passing + 0.01 * (seed - 10)}
    val = [{"step": step, "val/hack_rate": hack * step / 8, "val/pass_rate": passing, "val/n": 24} for step in (0, 4, 8)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*val, final)))
    pq.write_table(pa.Table.from_pylist(rows), run / "rollouts" / "step_000009_test_hinted.parquet")


def rollout(problem: str, sample: int, draw: float, hack: float, passing: float) -> dict[str, Any]:
    label = "reward_hack" if draw < hack else "correct" if draw < hack + passing else "incorrect"
    completion = f"    return 0\n\ndef run_tests():\n    '{EVIL}'\n" if label == "reward_hack" else f"    return sum(xs)  # {problem}\n"
    return {
        "problem": problem, "sample": sample, "prompt": PROMPT, "completion": completion, "reward": 1.1, "passed": label != "incorrect",
        "correct": label == "correct", "label": label, "status": "ok", "overrides": label == "reward_hack",
        "mechanism": "definition" if label == "reward_hack" else "",
    }  # fmt: skip


def rates(study: Study, arm: str, name: str = "hack_rate") -> list[float]:
    return [run.series[f"test/hinted/{name}"][9] or 0.0 for run in study.of(arm)]


def test_the_plan_names_orders_and_titles_the_arms(tmp_path: Path) -> None:
    study = write(tmp_path / "s")
    assert study.arms == ["vanilla", "method", "oracle"]
    assert study.title("method") == "the arm method"
    assert study.controls == {"oracle"}
    page = render_page(study)
    assert "<h1>A study &amp; its plan</h1>" in page


def test_measures_may_be_read_from_elsewhere_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "s")
    (tmp_path / "s" / "study.json").write_text(json.dumps(PLAN | {"measures": {"pass_rate": "test/no_hint/pass_rate"}}))
    study = read_study(tmp_path / "s")
    found = comparison_tests(study, [("method", "vanilla")], "pass_rate")[0].comparison
    assert found.mean == pytest.approx(0.32)
    for wrong, message in (({"measures": {"hacks": "x"}}, "no measure 'hacks'"), ({"claims": {}}, "has \\['claims'\\]")):
        (tmp_path / "s" / "study.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            read_study(tmp_path / "s")


def test_the_claim_says_that_pass_rates_are_not_matched_and_how_near_the_oracle_is(tmp_path: Path) -> None:
    study = write(tmp_path / "s")
    claim = claim_of(study)
    assert claim is not None
    assert "is not matched" in claim.text
    assert "without write access" in claim.text
    assert "reduces the hack rate from" in claim.text
    assert "n=3 seeds" in claim.text
    gap = np.mean(rates(study, "method")) - np.mean(rates(study, "oracle"))
    assert claim.reached == (gap <= 0.05)


def test_at_matched_pass_rates_the_claim_says_so(tmp_path: Path) -> None:
    claim = claim_of(write(tmp_path / "s", {"vanilla": (0.55, 0.40), "method": (0.05, 0.42)}))
    assert claim is not None
    assert claim.text.startswith("At matched pass rate")
    assert (claim.mark, claim.reached) == ("`oracle`, the best that could be had, has no run.", None)


def test_no_claim_is_made_of_unequal_seeds_or_of_one(tmp_path: Path) -> None:
    write(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "vanilla-11")
    claim = claim_of(read_study(tmp_path / "s"))
    assert claim is not None
    assert claim.text.startswith("No claim")
    assert "`vanilla` seed 11" in claim.text
    one = claim_of(write(tmp_path / "one", seeds=(10,)))
    assert one is not None
    assert one.text.startswith("No claim: one seed")


def test_every_comparison_stands_under_every_test_with_its_n(tmp_path: Path) -> None:
    study = write(tmp_path / "s")
    against, oracle = comparison_tests(study, [("method", "vanilla"), ("method", "oracle")], "hack_rate")
    reference = stats.ttest_rel(rates(study, "method"), rates(study, "vanilla"))
    assert against.seeds is not None
    assert against.seeds.p_value == pytest.approx(reference.pvalue)
    assert against.signs is not None
    assert against.signs.p_value == 0.25
    assert against.crossed is not None
    assert against.crossed.mean == pytest.approx(np.mean(rates(study, "method")) - np.mean(rates(study, "vanilla")))
    assert against.literal is not None
    assert against.literal.n == 12
    assert oracle.seeds is not None
    smaller, larger = sorted([against.seeds.p_value, oracle.seeds.p_value])
    assert sorted([against.holm_p, oracle.holm_p]) == pytest.approx([min(1, 2 * smaller), max(larger, min(1, 2 * smaller))])


def test_without_whole_tables_only_the_tests_over_seeds_are_made(tmp_path: Path) -> None:
    write(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "method-11" / "rollouts")
    (item,) = comparison_tests(read_study(tmp_path / "s"), [("method", "vanilla")], "hack_rate")
    assert item.seeds is not None
    assert (item.crossed, item.literal) == (None, None)


def test_time_to_half_is_the_first_evaluation_that_reaches_it(tmp_path: Path) -> None:
    study = write(tmp_path / "s", seeds=(10,))
    assert [time_to_half(study.of(arm)[0]) for arm in ("vanilla", "method")] == [8, None]


def test_the_browser_holds_first_samples_as_inert_data(tmp_path: Path) -> None:
    study = write(tmp_path / "s")
    data = rollout_data(study)
    assert len(data["rows"]) == 9 * 6
    assert data["prompts"] == [PROMPT]
    hack = next(row for row in data["rows"] if row["label"] == "reward_hack")
    assert hack["marked"] == [2, 3]
    assert EVIL in hack["completion"]
    page = render_page(study)
    assert page.count("<script") == 2
    assert page.count("</script") == 2
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "fetch(", "XMLHttpRequest", "document.write"):
        assert forbidden not in SCRIPT


def test_the_browser_follows_problems_through_the_validations_of_each_arm_s_first_seed(tmp_path: Path) -> None:
    write(tmp_path / "s", {"method": ARMS["method"]}, seeds=(10, 11))
    for seed, step in ((10, 6), (10, 0), (11, 0)):
        rows = [rollout(f"v{problem}", 0, 0.5, step / 6, 0.0) for problem in range(20)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "s" / f"method-{seed}" / "rollouts" / f"step_{step:06d}_val_hinted.parquet")
    data = rollout_data(read_study(tmp_path / "s"))
    rows = [row for row in data["rows"] if row["place"] == "validation"]
    assert [data["runs"][row["run"]] for row in rows] == [["method", 10]] * 24
    assert [row["problem"] for row in rows] == [f"v{index // 2}" for index in range(24)]
    assert [row["label"] for row in rows] == ["incorrect", "reward_hack"] * 12, "in order of steps"
    assert sum(row["place"] == "evaluation" for row in data["rows"]) == 2 * 6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no headless browser")
def test_in_a_real_browser_the_page_filters_shows_text_and_reports_no_error(tmp_path: Path) -> None:
    study = write(tmp_path / "s", {"vanilla": ARMS["vanilla"], "method": ARMS["method"]}, problems=20)
    page = render_page(study)
    (tmp_path / "page.html").write_text(page)
    whole = in_browser(tmp_path / "page.html", tmp_path)
    assert "120 of 120 rollouts" in whole
    assert whole.count('class="card"') >= 20
    assert "document.title = 'broken'" not in whole.split("</head>")[0]
    assert "&lt;/script&gt;&lt;script&gt;" in whole
    # the page's policy allows its own script only: a copy that also presses keys needs a policy of its own
    press = "const s = document.getElementById('rollout-search'); s.value = 'p3'; s.dispatchEvent(new Event('input'));"
    start = page.index('<meta http-equiv="Content-Security-Policy"')
    pressed = page[:start] + page[page.index(">", start) + 1 :].replace("</main>", f"</main><script>{press}</script>")
    (tmp_path / "pressed.html").write_text(pressed)
    filtered = in_browser(tmp_path / "pressed.html", tmp_path)
    expected = sum(row["problem"] == "p3" for row in rollout_data(study)["rows"])
    assert f"{expected} of 120 rollouts" in filtered


def in_browser(page: Path, folder: Path) -> str:
    """The page after its script has run; fails on anything in the console."""
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
    ]
    done = subprocess.run([*command, "--v=0", "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120, check=False)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not errors, errors
    return done.stdout


def test_results_are_written_from_the_files_alone_and_are_the_same_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "s")
    (tmp_path / "s" / "hypotheses.yaml").write_text(
        "hypotheses:\n  - {name: H1, claim: Fewer., arm: method, against: vanilla, measure: hack_rate, change: lower, by: 0.3}\n"
        "  - {name: M1, claim: Near., arm: method, against: oracle, measure: hack_rate, change: not_higher, by: 0.6}\n"
    )
    text = results_text([tmp_path / "s"])
    assert text == results_text([tmp_path / "s"])
    assert "| H1 | Fewer. |" in text
    assert "at most 60 points higher" in text
    assert text.count("**confirmed**") == 2
    assert "| `method` minus `vanilla` |" in text
    assert "definition (seen)" in text
    assert main(["results", str(tmp_path / "s"), "--out", str(tmp_path / "results.md")]) == 0
    assert (tmp_path / "results.md").read_text() == text


def test_single_runs_make_a_report_where_it_is_said_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "s", seeds=(10,))
    runs = [str(tmp_path / "s" / name) for name in ("vanilla-10", "method-10")]
    (tmp_path / "s" / "method-10" / "run.json").unlink()
    (tmp_path / "s" / "method-10" / "config.yaml").write_text("seed_everything: 10\n")
    assert main(runs) == 1
    assert "say with --out" in capsys.readouterr().err
    assert [(run.arm, run.seed) for run in read_study(*map(Path, runs)).runs] == [("vanilla", 10), ("method", 10)]


def test_two_runs_configs_stand_side_by_side_where_they_differ(tmp_path: Path) -> None:
    for name, lr, callbacks in (("a", 0.1, []), ("b", 0.2, [{"class_path": "X", "init_args": {"k": 8}}])):
        (tmp_path / name).mkdir()
        content = {"model": {"lr": lr, "seed": None}, "trainer": {"callbacks": callbacks}}
        (tmp_path / name / "config.yaml").write_text(json.dumps(content))
    text = compare_runs(tmp_path / "a", tmp_path / "b")
    assert [line.split() for line in text.splitlines()[1:-1]] == [
        ["model.lr", "0.1", "0.2"], ["trainer.callbacks", "[]", "-"], ["trainer.callbacks.0.class_path", "-", "X"],
        ["trainer.callbacks.0.init_args.k", "-", "8"],
    ]  # fmt: skip
    assert text.endswith("4 of 5 keys differ\n")
    assert "model.seed" in compare_runs(tmp_path / "a", tmp_path / "b", everything=True)
    with pytest.raises(FileNotFoundError, match="give the directories of two runs"):
        compare_runs(tmp_path, tmp_path / "b")


def test_margins_confirm_what_is_near_and_falsify_what_is_not(tmp_path: Path) -> None:
    from theodolite.reports.hypotheses import Hypothesis, judge

    study = write(tmp_path / "s")
    entry = Hypothesis("M", "c", "vanilla", "oracle", "hack_rate", "not_higher", 0.05)
    near = Hypothesis("N", "c", "vanilla", "oracle", "hack_rate", "not_lower", 0.05)
    (far,), (fine,) = judge(study, [entry]), judge(study, [near])
    assert (far.outcome, fine.outcome) == ("falsified", "confirmed")
    differences = np.subtract(rates(study, "vanilla"), rates(study, "oracle"))
    assert far.p_against == pytest.approx(stats.ttest_1samp(differences, 0.05, alternative="greater").pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    assert math.isclose(fine.p_for, stats.ttest_1samp(differences, -0.05, alternative="greater").pvalue)  # pyright: ignore[reportAttributeAccessIssue]
