"""Runs as processes: finished ones are skipped, failed ones reported, and none outlives the study."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))

from theodolite.study import Job, clear_run, config_hashes, run_jobs, visible_gpus  # noqa: E402

BASE: dict[str, Any] = {
    "model": {"class_path": "tiny_modules.TinyModel"},
    "data": {"class_path": "tiny_modules.TinyData"},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False},
}


def job(folder: Path, name: str, *args: str, test: bool = False) -> Job:
    (folder / "tiny.yaml").write_text(json.dumps(BASE)) if not (folder / "tiny.yaml").exists() else None
    return Job(folder / name, ("fit", f"--config={folder}/tiny.yaml", *args), {"arm": name}, test=test, steps=4)


def nobody(running: Any, finished: Any) -> None: ...


@pytest.mark.distributed
def test_finished_runs_are_skipped_and_a_failing_one_is_reported_without_stopping_the_others(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "good", test=True), job(tmp_path, "bad", "--model.width=0"), job(tmp_path, "last", "--model.lr=0.05")]
    ended: list[str] = []
    failures = run_jobs(jobs, 2, lambda running, finished: ended.append(finished.name) if finished else None)
    assert [failure.split()[0] for failure in failures] == ["bad"]
    assert "log.txt" in failures[0]
    assert "width must be at least 1, got 0." in (tmp_path / "bad" / "log.txt").read_text()
    assert sorted(ended) == ["bad", "good", "last"]
    assert [j.done for j in jobs] == [True, False, True]
    record = json.loads((tmp_path / "good" / "run.json").read_text())
    assert record["arm"] == "good"
    assert record["command"].startswith("theodolite fit --config=")
    assert any("test_loss" in line for line in (tmp_path / "good" / "metrics.jsonl").read_text().splitlines())

    stamps = {name: (tmp_path / name / "run.json").stat().st_mtime_ns for name in ("good", "last")}
    again: list[str] = []
    run_jobs(jobs, 2, lambda running, finished: again.append(finished.name) if finished else None)
    assert again == ["bad"]
    assert stamps == {name: (tmp_path / name / "run.json").stat().st_mtime_ns for name in ("good", "last")}
    assert not job(tmp_path, "last", "--model.lr=0.06").done, "other arguments are another run"
    (tmp_path / "tiny.yaml").write_text(json.dumps(BASE | {"seed_everything": 1}))
    assert not jobs[0].done, "an edited config is another run"


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="same folder"):
        run_jobs([job(tmp_path, "one"), job(tmp_path, "one", "--model.lr=0.2")], 1, nobody)


def test_nothing_of_an_unfinished_run_is_taken_for_the_new_one_s(tmp_path: Path) -> None:
    files = ["run.json", "config.yaml", "manifest.json", "metrics.jsonl", "timings.jsonl", "rollouts/step_000001_val_hinted.parquet"]
    files += ["completions/step_000001.parquet", "checkpoints/last.ckpt", "checkpoints/sharded.ckpt/0.distcp"]
    for name in [*files, "notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    clear_run(tmp_path)
    clear_run(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notes.txt"]


@pytest.mark.parametrize(("record", "rows", "tested"), [
    ({"test": True}, "", True),
    ({"test": False}, '{"step": 4, "test/n": 3}\n', False),
    ({}, '{"step": 4, "val/n": 3}\n', False),
    ({}, '{"step": 4, "test/hinted/n": 3}\n', True),  # written before records said it
])  # fmt: skip
def test_a_run_without_the_test_protocol_is_not_done_where_it_is_asked_for(
    tmp_path: Path, record: dict[str, Any], rows: str, tested: bool
) -> None:
    plain, full = job(tmp_path, "one"), job(tmp_path, "one", test=True)
    plain.run_dir.mkdir()
    (plain.run_dir / "metrics.jsonl").write_text(rows)
    same = {"args": list(plain.args), "configs": config_hashes(plain.args), "seconds": 1.0}
    (plain.run_dir / "run.json").write_text(json.dumps(same | record))
    assert plain.done, "a run that was tested is also one that need not be"
    assert full.done == tested


def test_gpus_are_those_that_this_process_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5,GPU-7")
    assert visible_gpus(3) == ["4", "5", "GPU-7"]
    assert visible_gpus(1) == ["4"]
    with pytest.raises(ValueError, match="--gpus 4 is more than CUDA_VISIBLE_DEVICES='4, 5,GPU-7' names; ask for at most 3"):
        visible_gpus(4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus(0) == []


def test_progress_is_the_last_logged_training_step_whatever_the_logging_interval(tmp_path: Path) -> None:
    one = job(tmp_path, "one")
    assert one.steps_done() == 0
    one.run_dir.mkdir()
    lines = [{"step": 0, "val/n": 3}, {"step": 9, "train/loss": 1.0}, {"step": 19, "train/loss": 1.0}, {"step": 20, "val/n": 3}]
    (one.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 29, "train/lo')
    assert one.steps_done() == 20


STUDY = """
import sys
from pathlib import Path
from theodolite.study import Job, run_jobs
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    args = ("fit", f"--config={folder}/tiny.yaml", "--trainer.max_epochs=1000000", "--trainer.log_every_n_steps=1")
    run_jobs([Job(folder / name, args, {}, False, 4) for name in ("a", "b")], 2, lambda running, finished: None)
"""


def marked(mark: str) -> set[int]:
    """Processes whose environment holds the mark."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes() and "\nState:\tZ" not in (path.parent / "status").read_text():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(condition: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="a run is tied to its study by a Linux signal")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_killed_study_leaves_no_process_behind(tmp_path: Path, name: str) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(BASE))
    (tmp_path / "study_script.py").write_text(STUDY)
    mark = f"mark-{uuid.uuid4()}"
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "STUDY_MARK": mark}
    study = subprocess.Popen(
        [sys.executable, str(tmp_path / "study_script.py"), str(tmp_path)],
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job starts with it ignored
    )
    try:
        assert wait_for(lambda: all((tmp_path / run / "metrics.jsonl").is_file() for run in "ab"), 120), "the runs never started"
        assert len(marked(mark)) >= 4
        study.send_signal(getattr(signal, name))
        study.wait(timeout=60)
        assert wait_for(lambda: not marked(mark), 60), "processes outlived the study"
        assert not (tmp_path / "a" / "run.json").exists()
    finally:
        study.kill()
        study.wait()
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
