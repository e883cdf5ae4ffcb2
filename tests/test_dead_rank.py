"""A rank that fails, is killed or hangs ends the whole job within the process group's timeout, and a stack trace says where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_policies import Row, TextGrader, TinyPrompts, callback, config, grpo, prompts

from theodolite.cli import RUN_DIR_VARIABLE
from theodolite.launched_ranks import GRACE_S, end
from theodolite.protocols import Grade, Window

TESTS = Path(__file__).resolve().parent
TIMEOUT_S = 90
"""Of the process group: longer than a busy machine needs to start both ranks."""
START_S = 400
"""What two ranks need at most until one is over."""
LAUNCHER_S = 90
"""What launchers take on top, with time for a stack trace on a busy machine: torchrun gives a rank 30 s to end."""


class FailOnRank(Callback):
    """Notes each rank's process, and ends one in the middle of its second window.

    Args:
        rank: Which.
        how: ``raise`` or ``kill``; anything else only takes notes.
    """

    def __init__(self, rank: int, how: str) -> None:
        super().__init__()
        self.rank, self.how = rank, how

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Path(f"pid-{trainer.global_rank}").write_text(str(os.getpid()))

    def on_advantages(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        if trainer.global_rank == self.rank and window.step == 1:
            Path("over").touch()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "raise":
                raise ArithmeticError("this rank cannot go on")


class HangingGrader(TextGrader):
    """Never answers in one rank's second window."""

    def __init__(self, data: HangingPrompts, rank: int) -> None:
        super().__init__()
        self.data, self.rank = data, rank

    def grade(self, rows: Sequence[Row], completions: Sequence[str]) -> list[Grade]:
        trainer: Any = self.data.trainer
        if trainer.global_rank == self.rank and trainer.global_step == 1:
            Path("over").touch()
            wait_for_ever()
        return super().grade(rows, completions)


class HangingPrompts(TinyPrompts):
    """The tiny prompts with an environment that hangs.

    Args:
        rank: Where.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.environment = HangingGrader(self, rank)


def wait_for_ever() -> None:
    while True:
        time.sleep(1000)


def launched(launcher: str, arguments: Sequence[str]) -> list[str]:
    """The command that starts two ranks."""
    if launcher == "lightning":
        return [sys.executable, "-m", "theodolite", *arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*torchrun, str(TESTS.parent / "train.py"), *arguments]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(800)
@pytest.mark.parametrize(
    ("launcher", "rank", "how"),
    [
        ("lightning", 1, "raise"),
        ("lightning", 0, "raise"),
        ("lightning", 1, "kill"),
        ("lightning", 1, "hang"),
        ("lightning", 0, "hang"),
        ("torchrun", 1, "raise"),
        ("torchrun", 1, "hang"),
        ("torchrun", 0, "hang"),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_the_job_within_the_timeout(launcher: str, rank: int, how: str, tmp_path: Path) -> None:
    strategy = callback(
        "lightning.pytorch.strategies.DDPStrategy", timeout=f"0:{TIMEOUT_S // 60:02}:{TIMEOUT_S % 60:02}", process_group_backend="gloo"
    )
    failing = callback("test_dead_rank.FailOnRank", rank=rank, how=how)
    beating = callback("theodolite.callbacks.heartbeat.Heartbeat", every_s=1, limit_s=5)
    data = {"class_path": "test_dead_rank.HangingPrompts", "rank": rank} if how == "hang" else prompts()
    path = config(tmp_path, "dying", grpo(), data, max_steps=4, devices=2, strategy=strategy, callbacks=[failing, beating])
    code = run_to_its_end(launched(launcher, ["fit", f"--config={path}", f"--run_dir={tmp_path}/run"]), tmp_path)
    text = (tmp_path / "log.txt").read_text(errors="replace")
    assert code != 0, text[-2000:]
    if how == "raise":
        assert "ArithmeticError: this rank cannot go on" in text, text[-3000:]
        assert "in on_advantages" in text
    if how == "hang":
        assert "in wait_for_ever" in (tmp_path / "run" / f"stacks-{rank}.txt").read_text(), "the stacks say where it hangs"
        assert "in gather_objects" in text, "and the other rank's say what it waited for"


def run_to_its_end(command: Sequence[str], folder: Path) -> int:
    """The exit code of a job whose ranks were all gone in time after one of them was over, as :class:`FailOnRank` noted."""
    inherited = {key: value for key, value in os.environ.items() if key not in (RUN_DIR_VARIABLE, "PL_GLOBAL_SEED")}
    environment = inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "log.txt", "wb") as output:  # a pipe would stay open as long as any rank lives
        job = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output)
    try:
        code = job.wait(timeout=START_S + TIMEOUT_S + LAUNCHER_S)
        assert len(_ranks(folder)) == 2, (folder / "log.txt").read_text(errors="replace")[-3000:]
        _await_all_gone(_ranks(folder))
        seconds = time.time() - (folder / "over").stat().st_mtime
    finally:
        for process in filter(_alive, {job.pid, *_ranks(folder)}):
            os.kill(process, signal.SIGKILL)
    print(f"exit code {code}, all ranks gone {seconds:.0f} s after one was over")
    assert seconds < TIMEOUT_S + LAUNCHER_S
    return code


def _ranks(folder: Path) -> list[int]:
    """Processes that :class:`FailOnRank` noted."""
    return [int(file.read_text()) for file in folder.glob("pid-*")]


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _await_all_gone(processes: Sequence[int]) -> None:
    deadline = time.monotonic() + TIMEOUT_S + LAUNCHER_S
    while any(map(_alive, processes)):
        assert time.monotonic() < deadline, "a rank outlived the job"
        time.sleep(0.5)


def test_ranks_that_end_by_themselves_are_waited_for_and_others_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("theodolite.launched_ranks.GRACE_S", 0.2)
    assert GRACE_S >= 5, "a rank that fails as well needs time to say why"
    processes = {1: subprocess.Popen(["true"]), 2: subprocess.Popen(["sleep", "100"])}
    end(processes)
    assert [process.returncode for process in processes.values()] == [0, -signal.SIGKILL]
    assert capsys.readouterr().err == "theodolite: rank 2 of this machine did not end by itself, and was ended.\n"
