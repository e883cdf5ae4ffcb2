"""An interrupted run of a sweep goes on at its last checkpoint and leaves the bytes of the uninterrupted one; another run begins anew."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))

from tiny_policies import callback, config, grpo, prompts  # noqa: E402

from theodolite.study import Job, run_job, run_jobs  # noqa: E402
from theodolite.study_restart import BEGUN, Attempt, find_restart, identity  # noqa: E402

SAME = {"args": ["fit"], "configs": {"--config=a.yaml": "1"}, "sources": "2", "libraries": {"torch": "3"}}
TRAINER = {"max_steps": 6, "max_epochs": -1, "max_time": None}


def begun(folder: Path, trainer: dict[str, Any] | None = None, steps: tuple[int, ...] = (4,), rows: int = 3) -> Path:
    """What a run of six steps leaves that was interrupted after so many rows, with checkpoints of two rows each."""
    (folder / "checkpoints").mkdir()
    for number, step in enumerate(steps):
        path = folder / "checkpoints" / f"step={step}.ckpt"
        torch.save({"global_step": step, "theodolite_metrics": {"rows": 2}}, path)
        os.utime(path, ns=(number, number))
    (folder / "config.yaml").write_text(json.dumps({"trainer": TRAINER | (trainer or {})}))
    (folder / "metrics.jsonl").write_text('{"step": 0}\n' * rows)
    Attempt(folder, SAME, None)
    return folder


def test_a_run_goes_on_at_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = begun(tmp_path, steps=(2, 4))
    (run / "checkpoints" / "step=5.ckpt").write_bytes(b"half of a checkpoint")
    found = find_restart(run, SAME)
    assert found is not None
    assert (found.checkpoint.name, found.step, found.fitted_rows, found.earlier) == ("step=4.ckpt", 4, None, ())
    Attempt(run, SAME, found)
    again = find_restart(run, SAME)
    assert again is not None
    assert again.earlier == (4,)


@pytest.mark.parametrize("key", ["args", "configs", "sources", "libraries"])
def test_a_run_that_is_another_one_begins_at_its_first_step(tmp_path: Path, key: str) -> None:
    run = begun(tmp_path)
    assert find_restart(run, SAME) is not None
    assert find_restart(run, SAME | {key: "other"}) is None


def test_where_going_on_would_not_be_exact_a_run_begins_at_its_first_step(tmp_path: Path) -> None:
    def started(name: str, **what: Any) -> Path:
        (tmp_path / name).mkdir()
        return begun(tmp_path / name, **what)

    assert find_restart(started("lost", rows=1), SAME) is None, "rows that the checkpoint counts on are gone"
    assert find_restart(started("epochs", trainer={"max_steps": -1, "max_epochs": 3}), SAME) is None
    assert find_restart(started("clock", trainer={"max_time": "00:01:00:00"}), SAME) is None
    assert find_restart(started("end", steps=(6,)), SAME) is None, "training had not ended, so nothing was exported"
    complete = started("complete")
    Attempt(complete, SAME, None).ended()
    assert find_restart(complete, SAME) is None


def test_when_training_had_ended_only_the_test_is_repeated_and_its_rows_are_cut(tmp_path: Path) -> None:
    run = begun(tmp_path, steps=(6,))
    Attempt(run, SAME, None).fitted()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "test/n": 1}\n')
    found = find_restart(run, SAME)
    assert found is not None
    assert (found.step, found.fitted_rows) == (6, 3)
    attempt = Attempt(run, SAME, found)
    attempt.fitted()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    (run / "manifest.json").write_text('{"schema_version": 1}')
    assert attempt.told() == {"continued_from_steps": [6]}
    assert json.loads((run / "manifest.json").read_text()) == {"schema_version": 1, "continued_from_steps": [6]}


def test_a_run_is_known_by_its_arguments_configs_sources_and_libraries() -> None:
    one = identity(("fit", "--config=a.yaml"), {"--config=a.yaml": "1"})
    assert one == identity(("fit", "--config=a.yaml"), {"--config=a.yaml": "1"})
    assert set(one) == set(SAME)
    assert "torch" in one["libraries"]
    assert json.loads(json.dumps(one)) == one, "it is compared with what was read from a file"


class KillOnce(Callback):
    """Kills its process in the middle of a window and, in a later life of the run, in the middle of the test.

    Args:
        folder: Where it remembers that it did.
        step: Optimizer steps before that window.
    """

    def __init__(self, folder: str, step: int) -> None:
        super().__init__()
        self.folder, self.step = Path(folder), step

    def on_advantages(self, trainer: Trainer, pl_module: LightningModule, window: Any) -> None:
        if window.step == self.step:
            self._die("window")

    def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == 1:
            self._die("test")

    def _die(self, where: str) -> None:
        if not (self.folder / where).exists():
            self.folder.mkdir(exist_ok=True)
            (self.folder / where).touch()
            os.kill(os.getpid(), signal.SIGKILL)


def life(job: Job) -> list[str]:
    return run_jobs([job], 1, lambda running, finished: None)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_run_killed_in_a_window_and_again_in_its_test_leaves_the_bytes_of_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    queue = {"capacity": 6, "refresh_every": 2, "detector": "[a-m]", "seed": 1}
    direction = {"class_path": "theodolite.callbacks.live_direction.LiveGradientDifference", "init_args": queue}
    projection = callback("theodolite.callbacks.GradientProjectionCallback", gate="two_sided", direction=direction)

    def job(name: str) -> Job:
        # five windows per epoch: the continued part crosses into the second; Lightning's own checkpoint, at every validation
        killer = callback("test_study_restart.KillOnce", folder=str(tmp_path / f"kills-{name}"), step=5)
        model = grpo(warmup_steps=3, schedule="cosine", micro_batch_size=8, eval_drift=True, table_every=2)
        path = config(tmp_path, name, model, prompts(rewards="nan"), max_steps=6, val_check_interval=2, callbacks=[projection, killer])
        return Job(tmp_path / f"run-{name}", ("fit", f"--config={path}"), {"arm": name}, test=True, steps=6, resume=True)

    (tmp_path / "kills-whole").mkdir()
    for where in ("window", "test"):
        (tmp_path / "kills-whole" / where).touch()
    whole, killed = job("whole"), job("killed")
    assert life(whole) == [], (whole.run_dir / "log.txt").read_text()[-3000:]
    assert "exit code -9" in life(killed)[0]
    assert killed.restart() is not None
    assert "exit code -9" in life(killed)[0]
    assert '"test' not in (killed.run_dir / "metrics.jsonl").read_text()
    exported = (killed.run_dir / "policy" / "model.safetensors").stat().st_mtime_ns
    assert life(killed) == [], (killed.run_dir / "log.txt").read_text()[-3000:]
    assert (killed.run_dir / "policy" / "model.safetensors").stat().st_mtime_ns == exported, "the third life only tests"
    same_results(whole.run_dir, killed.run_dir)
    assert all("continued_from_steps" not in json.loads((whole.run_dir / name).read_text()) for name in ("run.json", "manifest.json"))
    for name in ("run.json", "manifest.json"):
        assert json.loads((killed.run_dir / name).read_text())["continued_from_steps"] == [4, 6]
    assert "ckpt_path: null" in (killed.run_dir / "config.yaml").read_text(), "what was done, however many lives it took"
    assert not (killed.run_dir / BEGUN).exists()


def same_results(one: Path, other: Path) -> None:
    """Every logged number, the weights, and every table of rollouts."""
    for name in ("metrics.jsonl", "policy/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert '"test/hinted/n"' in (one / "metrics.jsonl").read_text()
    for kind in ("completions", "rollouts"):
        names = sorted(path.name for path in (one / kind).iterdir())
        assert names == sorted(path.name for path in (other / kind).iterdir())
        for name in names:
            pd.testing.assert_frame_equal(pd.read_parquet(one / kind / name), pd.read_parquet(other / kind / name), check_exact=True)


def test_a_run_that_failed_by_itself_begins_at_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path)
    monkeypatch.setattr("theodolite.study._run", lambda job, restart: 1 / 0)
    monkeypatch.setattr("theodolite.study._die_with_study", lambda: None)
    monkeypatch.setattr("theodolite.study.os.dup2", lambda *_: None)
    with pytest.raises(SystemExit, match="1"):
        run_job(Job(run, ("fit",), {}, test=False, steps=6, resume=True))
    assert find_restart(run, SAME) is None
