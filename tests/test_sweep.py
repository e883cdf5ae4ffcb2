"""Studies as files: what cannot work is refused before anything runs, and every run's command is a function of the file alone."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))

from theodolite.cli import check_args  # noqa: E402
from theodolite.launch import LaunchError, parse_request  # noqa: E402
from theodolite.reports.hypotheses import read_hypotheses  # noqa: E402
from theodolite.reports.plan import MEASURES, read_plan  # noqa: E402
from theodolite.study_file import Phase, StudyFile, read_study_file  # noqa: E402
from theodolite.sweep import chosen, main, run_study, study_jobs, table_of, write_plan, write_table  # noqa: E402
from theodolite.warm_start import phase_key  # noqa: E402

CONFIGS = TESTS.parent / "configs"
STUDIES = sorted(path for path in (CONFIGS / "experiment").glob("*.yaml") if not path.stem.endswith("_hypotheses"))
LAYER = {
    "model": {"class_path": "tiny_modules.TinyModel"},
    "data": {"class_path": "tiny_modules.TinyData"},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1},
}


def written(folder: Path, **changes: Any) -> Path:
    """A study of two arms over a tiny model."""
    (folder / "base.yaml").write_text(json.dumps(LAYER))
    (folder / "quick.yaml").write_text(json.dumps({"model": {"init_args": {"lr": 0.5}}}))
    arms = {"plain": {"title": "nothing"}, "quick": {"title": "a large step", "layers": ["quick.yaml"], "control": True}}
    content: dict[str, Any] = {"title": "tiny", "base": ["base.yaml"], "arms": arms, "seeds": [3, 4], "steps": 4, "test": False}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def options(folder: Path, **changes: Any) -> Namespace:
    given = {"configs": folder, "out": folder / "out", "cache": folder / "cache", "seeds": None, "arms": None, "processes": 1, "gpus": 0}
    return Namespace(**(given | changes))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_repository_names_what_exists(path: Path, tmp_path: Path) -> None:
    study = read_study_file(path, CONFIGS)
    write_plan(study, tmp_path)
    plan = read_plan(tmp_path)
    assert list(plan.arms) == study.arm_names
    assert {arm for pair in plan.comparisons or () for arm in pair} <= set(study.arm_names)
    assert plan.claim is None or {plan.claim.arm, plan.claim.against, plan.claim.reference} <= {*study.arm_names, None}
    if study.hypotheses is not None:
        entries = read_hypotheses(tmp_path / "hypotheses.yaml")
        assert {entry.arm for entry in entries} <= set(study.arm_names)
        assert {entry.against for entry in entries if isinstance(entry.against, str)} <= set(study.arm_names)
        assert {entry.measure for entry in entries} <= set(MEASURES)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_run_of_the_repository_s_studies_has_a_command_line_that_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    study = read_study_file(path, Path("configs"))
    arms = [arm for arm in study.arms if arm.options or arm is study.arms[0]]  # the arms' layers are read in test_arm_configs.py
    for job in study_jobs(replace(study, arms=tuple(arms), seeds=study.seeds[:1]), Path("configs"), Path("out"), Path("policy")):
        check_args(job.args)


def test_the_experiment_runs_on_seeds_that_nothing_was_tuned_on() -> None:
    for act, arms in (("act_one", 8), ("act_two", 6)):
        study = read_study_file(CONFIGS / "experiment" / f"{act}.yaml", CONFIGS)
        assert study.seeds == (10, 11, 12, 13, 14)
        assert len(study.arms) >= arms
        assert study.hypotheses is not None


@pytest.mark.parametrize(("changes", "message"), [
    ({"seed": [1]}, "unknown key 'seed'; the closest is 'seeds'"),
    ({"arms": {}}, "hold at least one"),
    ({"arms": {"a": {"layers": []}}}, "arm a lacks title"),
    ({"arms": {"a/b": {"title": "t"}}}, "names folders"),
    ({"arms": {"a": {"title": "t", "layers": ["quik.yaml"]}}}, "the closest is 'quick.yaml'"),
    ({"arms": {"a": {"title": "t", "layers": "quick.yaml"}}}, "must be a list of texts"),
    ({"seeds": [1, 1]}, "different whole numbers"),
    ({"hypotheses": "none.yaml"}, "does not exist"),
    ({"warm_start": [{"name": "w", "layers": []}]}, "lacks steps"),
])  # fmt: skip
def test_a_file_that_cannot_work_is_refused_in_one_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_study_file(written(tmp_path, **changes), tmp_path)


def test_rebound_s_sweep_holds_both_forms_at_every_published_alpha_and_a_random_direction() -> None:
    study = read_study_file(CONFIGS / "experiment" / "rebound_alpha.yaml", CONFIGS)
    published = [f"{form}_{alpha}" for form in ("additive", "multiplicative") for alpha in ("0.5", "1", "2", "5")]
    assert study.arm_names == ["vanilla", *published, "multiplicative_random"]
    for arm in study.arms[1:-1]:
        form, alpha = arm.name.split("_")
        (layer,) = arm.layers
        (callback,) = yaml.safe_load((CONFIGS / layer).read_text())["trainer"]["callbacks"]
        found = [float(option.rpartition("=")[2]) for option in arm.options] or [callback["init_args"]["alpha"]]
        assert (callback["init_args"]["mode"], found) == (form, [float(alpha)])


def test_arms_of_a_seed_differ_in_their_layers_and_nothing_else(tmp_path: Path) -> None:
    study = read_study_file(written(tmp_path, options=["--model.width=3"]), tmp_path)
    jobs = study_jobs(study, tmp_path, tmp_path / "out", tmp_path / "policy")
    assert [job.name for job in jobs] == ["plain-3", "quick-3", "plain-4", "quick-4"]
    assert all(job.resume for job in jobs), "what is interrupted goes on"
    without = [[arg for arg in job.args if "quick.yaml" not in arg] for job in jobs]
    assert without[0] == without[1]
    assert without[2] == without[3]
    assert [a for a, b in zip(without[0], without[2], strict=True) if a != b] == ["--seed_everything=3"]
    assert f"--model.policy={tmp_path / 'policy'}" in jobs[0].args


def test_what_is_asked_for_must_exist_and_options_reach_every_run(tmp_path: Path) -> None:
    path = written(tmp_path)
    study = chosen(path, options(tmp_path, arms=["quick"], seeds=[9]), ("--model.width=2",))
    (job,) = study_jobs(study, tmp_path, tmp_path, None)
    assert job.args[-3] == "--model.width=2"
    assert "--seed_everything=9" in job.args
    assert set(study.plan["arms"]) == {"plain", "quick"}, "the plan is that of the whole file"
    with pytest.raises(ValueError, match="no arm 'slow'; there are plain, quick"):
        chosen(path, options(tmp_path, arms=["slow"]))
    with pytest.raises(ValueError, match="written --key=value"):
        chosen(path, options(tmp_path), ("--model.width", "2"))


def test_hypotheses_may_not_change_under_runs_that_were_made_for_others(tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text("hypotheses: []\n")
    study = read_study_file(written(tmp_path, hypotheses="h.yaml"), tmp_path)
    write_plan(study, tmp_path / "out")
    write_plan(study, tmp_path / "out")
    (tmp_path / "h.yaml").write_text("hypotheses: []\n# and another thought\n")
    with pytest.raises(ValueError, match="written before the runs"):
        write_plan(study, tmp_path / "out")


def test_the_table_says_what_is_done_failed_and_missing_and_keeps_other_runs(tmp_path: Path) -> None:
    study = read_study_file(written(tmp_path), tmp_path)
    jobs = study_jobs(study, tmp_path, tmp_path / "out", None)
    (tmp_path / "out" / "quick-3").mkdir(parents=True)
    (tmp_path / "out" / "quick-3" / "log.txt").write_text("loading\nValueError: width must be at least 1.\n\n")
    records = write_table(jobs[:2], tmp_path / "out")
    assert [(record["state"], record["error"]) for record in records] == [
        ("missing", None), ("failed", "ValueError: width must be at least 1."),
    ]  # fmt: skip
    write_table(jobs[2:], tmp_path / "out")
    folders = [record["folder"] for record in json.loads((tmp_path / "out" / "runs.json").read_text())["runs"]]
    assert sorted(folders) == ["plain-3", "plain-4", "quick-3", "quick-4"]
    table = table_of(write_table(jobs, tmp_path / "out"), study)
    assert [list(column.cells) for column in table.columns] == [["plain", "quick"], ["MISSING", "FAILED"], ["MISSING", "MISSING"]]


def test_a_warm_start_is_known_by_its_phases_and_configs_and_shared_as_far_as_they_agree(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\n")
    first, second, other = Phase("one", ("a.yaml",), 5), Phase("two", ("a.yaml",), 5), Phase("three", ("a.yaml",), 5)
    keys = [phase_key(phases, tmp_path) for phases in ((first,), (first, second), (first, other))]
    assert len(set(keys)) == 3
    assert keys[0] == phase_key((Phase("one", ("a.yaml",), 7),), tmp_path), "the progress bar's steps decide no weight"
    (tmp_path / "a.yaml").write_text("a: 2\n")
    assert keys[0] != phase_key((first,), tmp_path)


def test_jobs_of_a_queue_run_one_part_and_take_the_launcher_s_options(tmp_path: Path) -> None:
    request = parse_request(["--gpus", "2", "--time", "01:00:00"], ["study.yaml", "--arms", "plain"], "theodolite.sweep")
    assert request.arguments() == [sys.executable, "-m", "theodolite.sweep", "study.yaml", "--arms", "plain"]
    assert (request.gpus, request.minutes()) == (2, 60)
    with pytest.raises(LaunchError, match="no place"):
        parse_request(["--direct"], ["study.yaml"], "theodolite.sweep")


@pytest.mark.parametrize(("changes", "message"), [
    ({"report": {"measures": {"hack_rat": "val/hack_rate"}}}, "study.yaml, report: there is no measure 'hack_rat'"),
    ({"report": {"claims": {"arm": "quick"}}}, "study.yaml, report has"),
    ({"report": {"claim": {"arm": "quik", "against": "plain"}}}, "claim names the arm 'quik', .* the closest is 'quick'"),
    ({"report": {"comparisons": [["quick", "vanilla"]]}}, "comparisons names the arm 'vanilla'"),
    ({"hypotheses": "h.yaml"}, "h.yaml names the arm 'slow', which the study does not have; there are plain, quick"),
    ({"hypotheses": "g.yaml"}, "measure is 'hack_rat'"),
])  # fmt: skip
def test_what_the_report_could_not_read_is_refused_before_anything_runs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    entry = {"name": "H", "claim": "c", "arm": "quick", "against": "plain", "measure": "hack_rate", "change": "lower"}
    (tmp_path / "h.yaml").write_text(yaml.safe_dump({"hypotheses": [entry | {"against": "slow"}]}))
    (tmp_path / "g.yaml").write_text(yaml.safe_dump({"hypotheses": [entry | {"measure": "hack_rat"}]}))
    study = read_study_file(written(tmp_path, **changes), tmp_path)
    with pytest.raises(ValueError, match=message):
        run_study(study, options(tmp_path), Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_an_option_that_no_run_could_take_is_refused_before_the_warm_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("theodolite.sweep.warm_start", lambda *_: pytest.fail("trained for runs that cannot start"))
    arms = {"plain": {"title": "nothing"}, "quick": {"title": "a large step", "options": ["--model.widht=3"]}}
    study = read_study_file(written(tmp_path, arms=arms), tmp_path)
    with pytest.raises(ValueError, match=r"arm quick: .*'widht'.* the closest is 'width'"):
        run_study(study, options(tmp_path), Console(quiet=True))
    assert not list((tmp_path / "out").glob("*-3"))


def test_the_command_line_ends_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "nowhere.yaml"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "There is no study file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_study_runs_once_and_continues_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    study: StudyFile = read_study_file(written(tmp_path), tmp_path)
    failures, timings = run_study(study, options(tmp_path), Console(quiet=True))
    assert failures == []
    assert set(timings.seconds) == {"warm start", "runs"}
    rows = {name: (tmp_path / "out" / name / "metrics.jsonl").read_bytes() for name in ("plain-3", "quick-3", "plain-4")}
    assert rows["plain-3"] != rows["quick-3"] != rows["plain-4"]
    stamp = (tmp_path / "out" / "plain-3" / "run.json").stat().st_mtime_ns
    run_study(study, options(tmp_path), Console(quiet=True))
    assert (tmp_path / "out" / "plain-3" / "run.json").stat().st_mtime_ns == stamp
    again = options(tmp_path, out=tmp_path / "again", seeds=[3])
    run_study(chosen(tmp_path / "study.yaml", again), again, Console(quiet=True))
    assert (tmp_path / "again" / "plain-3" / "metrics.jsonl").read_bytes() == rows["plain-3"], "same seed, same arm, same numbers"
