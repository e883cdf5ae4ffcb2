"""A rank that fails or is killed ends the whole job within the process group's timeout, and its stack trace is there to read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_policies import callback, config, grpo, prompts

from theodolite.cli import RUN_DIR_VARIABLE
from theodolite.protocols import Window

TESTS = Path(__file__).resolve().parent
TIMEOUT_S = 60


class FailOnRank(Callback):
    """Ends one rank in the middle of its second window.

    Args:
        rank: Which.
        how: ``raise`` or ``kill``.
    """

    def __init__(self, rank: int, how: str) -> None:
        super().__init__()
        self.rank, self.how = rank, how

    def on_advantages(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        if trainer.global_rank == self.rank and window.step == 1:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("this rank cannot go on")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("rank", "how"), [(1, "raise"), (0, "raise"), (1, "kill")])
def test_a_rank_that_dies_ends_the_job_within_the_timeout(rank: int, how: str, tmp_path: Path) -> None:
    strategy = {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "init_args": {"timeout": f"0:{TIMEOUT_S // 60:02}:{TIMEOUT_S % 60:02}", "process_group_backend": "gloo"},
    }
    failing = callback("test_dead_rank.FailOnRank", rank=rank, how=how)
    path = config(tmp_path, "dying", grpo(), prompts(), max_steps=4, devices=2, strategy=strategy, callbacks=[failing])
    inherited = {key: value for key, value in os.environ.items() if key not in (RUN_DIR_VARIABLE, "PL_GLOBAL_SEED")}
    environment = inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "theodolite", "fit", f"--config={path}", f"--run_dir={tmp_path}/run"]
    log = tmp_path / "log.txt"
    started = time.monotonic()
    with open(log, "wb") as output:  # a pipe would stay open as long as any rank lives
        job = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True)
        try:
            code = job.wait(timeout=240)
            seconds = time.monotonic() - started
            _await_empty(job.pid)
        finally:
            if _alive(job.pid):
                os.killpg(job.pid, signal.SIGKILL)
    text = log.read_text(errors="replace")
    print(f"rank {rank}, {how}: exit code {code} after {seconds:.0f} s, start included")
    assert code != 0, text[-2000:]
    if how == "raise":
        assert "ArithmeticError: this rank cannot go on" in text, text[-3000:]
        assert "in on_advantages" in text


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _await_empty(group: int) -> None:
    """No process of the job may outlive it by more than the timeout."""
    deadline = time.monotonic() + TIMEOUT_S
    while _alive(group):
        assert time.monotonic() < deadline, "a rank outlived the job"
        time.sleep(0.5)
