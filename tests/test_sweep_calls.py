"""Calls on a study's folder, one after another: what each may repeat, submit and write down. Nothing is trained."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_sweep import CONFIGS, LAYER, options, written

from theodolite.experiment import main as experiment
from theodolite.experiment import study_and_report
from theodolite.launch import Request
from theodolite.study import Job, config_hashes
from theodolite.study_file import Phase, read_study_file
from theodolite.sweep import main, run_study, study_jobs
from theodolite.warm_start import cached_phases, warm_start


def finish(job: Job) -> None:
    """Leave what a run leaves that was done."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    record = {"args": list(job.args), "configs": config_hashes(job.args), "test": job.test, "seconds": 1.0}
    (job.run_dir / "run.json").write_text(json.dumps(record))


class Clock:
    """Runs that take ten seconds each on a clock of their own; Ctrl-C comes after so many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.most = 0.0, 9
        monkeypatch.setattr("theodolite.study_timings.time", Namespace(perf_counter=lambda: self.now))
        monkeypatch.setattr("theodolite.sweep.run_with_progress", self.runs)

    def runs(self, jobs: list[Job], processes: int, console: Console, gpus: int, ended: Any) -> list[str]:
        for count, job in enumerate(job for job in jobs if not job.done):
            if count == self.most:
                raise KeyboardInterrupt
            self.now += 10.0
            finish(job)
            ended()
        return []


def test_wall_time_is_that_of_all_calls_whose_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file, path = Clock(monkeypatch), tmp_path / "out" / "timings.json", written(tmp_path)

    def call() -> dict[str, float]:
        with contextlib.suppress(KeyboardInterrupt):
            run_study(read_study_file(path, tmp_path), options(tmp_path), Console(quiet=True))
        return json.loads(file.read_text())["seconds"] if file.is_file() else {}

    clock.most = 1
    assert call() == {"warm start": 0.0, "runs": 10.0}
    clock.most = 9
    assert call() == {"warm start": 0.0, "runs": 40.0}
    before = file.stat().st_mtime_ns
    assert call()["runs"] == 40.0
    assert file.stat().st_mtime_ns == before, "nothing ran, so nothing is written"
    (tmp_path / "quick.yaml").write_text("{}")
    assert call()["runs"] == 60.0, "two arms of four are kept"
    (tmp_path / "base.yaml").write_text(json.dumps(LAYER | {"seed_everything": 1}))
    assert call()["runs"] == 40.0, "all are repeated: what the old ones took is not what these took"
    file.unlink()
    (tmp_path / "out" / "plain-3" / "run.json").unlink()
    assert call() == {}, "nobody timed the kept runs: a sum without them would be wrong"


def test_a_call_that_does_nothing_leaves_the_report_s_cost_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, built = Clock(monkeypatch), list[float]()

    def build(out: Path, pdf: bool) -> dict[str, Any]:
        clock.now += 3.0
        built.append(sum(json.loads((out / "timings.json").read_text())["seconds"].values()))
        return {}

    monkeypatch.setattr("theodolite.reports.build_report", build)
    path = written(tmp_path)
    study_and_report(path, options(tmp_path), Console(quiet=True))
    study_and_report(path, options(tmp_path), Console(quiet=True))
    assert built == [40.0, 43.0, 43.0], "the second time the page states its own cost; a finished study is read once"


@pytest.mark.parametrize(("arms", "runs"), [
    ([], [("act_one", None), ("act_two", None)]),
    (["shuffled"], [("act_one", ["shuffled"])]),
    (["vanilla", "live_probe"], [("act_one", ["vanilla"]), ("act_two", ["vanilla", "live_probe"])]),
    (["vanilla", "shufled"], []),
])  # fmt: skip
def test_each_act_takes_those_of_the_arms_asked_for_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arms: list[str], runs: list[tuple[str, list[str] | None]]
) -> None:
    seen: list[tuple[str, list[str] | None]] = []

    def record(path: Path, own: Namespace, console: Console, extra: tuple[str, ...]) -> list[str]:
        assert all((tmp_path / act / "hypotheses.yaml").is_file() for act, _ in runs), "written before the first run of any act"
        seen.append((path.stem, own.arms))
        return []

    monkeypatch.setattr("theodolite.experiment.study_and_report", record)
    with pytest.raises(SystemExit) as stop:
        experiment(["--out", str(tmp_path), "--configs", str(CONFIGS), *(["--arms", *arms] if arms else [])])
    assert stop.value.code == (0 if runs else 2)
    assert seen == runs


class Cluster:
    """A queue that forgets nothing and runs nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[str, ...]] = []
        self.left: dict[str, str] = {}
        monkeypatch.setattr("theodolite.study_queue.submit", self.submit)
        monkeypatch.setattr("theodolite.study_queue.unfinished_jobs", lambda _, ids: {i: s for i, s in self.left.items() if i in ids})

    def submit(self, request: Request, executor: str) -> Namespace:
        self.sent.append(request.command)
        return Namespace(job_id=str(len(self.sent)), paths=Namespace(stdout=Path(f"{len(self.sent)}.out")))

    def sweep(self, folder: Path, *more: str) -> int:
        shared = ["--out", str(folder / "out"), "--configs", str(folder), "--cache", str(folder / "cache"), "--executor", "slurm"]
        with pytest.raises(SystemExit) as stop:
            main([str(folder / "study.yaml"), *shared, *more])
        return int(stop.value.code or 0)


def test_asking_how_far_a_queued_study_is_leaves_its_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, path = Cluster(monkeypatch), written(tmp_path)
    assert cluster.sweep(tmp_path) == 0
    assert [command[-5:-2] for command in cluster.sent] == [("--seeds", seed, "--processes") for seed in ("3", "3", "4", "4")]
    jobs = study_jobs(read_study_file(path, tmp_path), tmp_path, tmp_path / "out", None)
    cluster.left = {"1": "running", "2": "queued", "5": "queued"}
    for job in jobs[0], jobs[2]:
        job.run_dir.mkdir()
        (job.run_dir / "log.txt").write_text("step 1\n")
    finish(jobs[3])
    assert cluster.sweep(tmp_path) == 0
    assert len(cluster.sent) == 5, "only the run that failed is sent again"
    assert cluster.sent[4] == cluster.sent[2]
    records = json.loads((tmp_path / "out" / "runs.json").read_text())["runs"]
    assert [record["state"] for record in records] == ["running", "queued", "queued", "done"]
    assert [record["error"] for record in records] == [None] * 4


def test_a_run_of_a_sweep_is_one_process_on_one_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster(monkeypatch)
    written(tmp_path)
    assert cluster.sweep(tmp_path, "--slurm", "--gpus 2") == 2
    assert "ask for --gpus 1" in capsys.readouterr().err
    assert cluster.sent == []


def test_the_warm_start_is_a_job_only_where_the_cache_lacks_it_and_its_failure_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster(monkeypatch)
    written(tmp_path, warm_start=[{"name": "w", "layers": ["base.yaml"], "steps": 4}])
    monkeypatch.setattr("theodolite.sweep.check_runs", lambda jobs: None)  # the tiny model takes no policy
    monkeypatch.setattr("theodolite.sweep.time", Namespace(monotonic=itertools.count(0, 20).__next__, sleep=lambda seconds: None))
    assert cluster.sweep(tmp_path) == 1
    assert "job of the warm start ended without a policy; see 1.out" in capsys.readouterr().err
    assert [command[-1] for command in cluster.sent] == ["--only-warm-start"]
    monkeypatch.setattr("theodolite.sweep.cached_phases", lambda *_: 1)
    assert cluster.sweep(tmp_path) == 0
    assert [command[-1] for command in cluster.sent[1:]] == ["--part"] * 4


def test_a_warm_start_in_shards_is_cached_by_all_of_them_and_one_without_weights_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, trained = list[str](), list[str]()

    def train(jobs: list[Job], processes: int, console: Console) -> list[str]:
        trained.append(jobs[0].name)
        (jobs[0].run_dir / "policy").mkdir(parents=True, exist_ok=True)
        for name in names:
            (jobs[0].run_dir / "policy" / name).write_text("weights")
        return []

    monkeypatch.setattr("theodolite.warm_start.run_with_progress", train)
    (tmp_path / "a.yaml").write_text("a: 1\n")
    asked = ((Phase("w", ("a.yaml",), 5),), tmp_path, tmp_path / "cache")
    policy, failures = warm_start(*asked, Console(quiet=True))
    assert policy is not None
    assert failures == [f"w ended without a policy: there are no *.safetensors in {policy}."]
    names += ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [warm_start(*asked, Console(quiet=True)) for _ in range(2)] == [(policy, [])] * 2
    assert (len(trained), cached_phases(*asked)) == (2, 1)
    (policy / names[1]).write_text("other weights")
    assert cached_phases(*asked) == 0
