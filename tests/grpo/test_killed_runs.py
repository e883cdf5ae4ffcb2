"""kill -9 at moments drawn at random, inside of every phase, and what a resumed run leaves: the bytes of the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from lightning.pytorch import Callback
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_policies import callback, config, grpo, prompts

PHASES = ("rollouts", "grading", "microbatch", "update", "checkpoint")
STEPS, EVERY = 6, 2
Moment = tuple[str, int, int, int]
"""Phase, optimizer steps before, the rank that dies, and how many tokens, completions or microbatches of the phase it completes."""


def drawn(seed: int, ranks: int) -> list[Moment]:
    """Ten moments; only rank 0 writes checkpoints."""
    rng = random.Random(seed)
    steps = range(EVERY, STEPS)
    places = [(phase, step, rank) for phase in PHASES for step in steps for rank in range(1 if phase == "checkpoint" else ranks)]
    return [(*place, rng.randint(1, 2 if place[0] == "microbatch" else 4)) for place in rng.sample(places, 10)]


MOMENTS, MOMENTS_ON_TWO = drawn(5, 1), drawn(11, 2)
LIMIT_S = 280.0
HERE = Path(__file__).resolve().parent


class KillAt(Callback):
    """Kills its process inside of a phase.

    Args:
        phase: ``rollouts`` (between two decoded tokens), ``grading`` (between two completions), ``microbatch`` (after one),
            ``update`` (after it) or ``checkpoint`` (half of the file is written).
        step: Optimizer steps taken before.
        rank: Which process dies.
        after: Tokens, completions or microbatches that it completes.
    """

    def __init__(self, phase: str, step: int, rank: int = 0, after: int = 1) -> None:
        super().__init__()
        self.at, self.step, self.rank, self.left = phase, step, rank, after

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.step or trainer.global_rank != self.rank:
            return
        if self.at == "rollouts":
            pl_module.causal_lm.register_forward_pre_hook(lambda *arguments: self._begin())
        elif self.at == "grading":
            environment = trainer.datamodule.environment
            grade = environment.one
            environment.one = lambda *arguments: (self._begin(), grade(*arguments))[1]
        elif self.at == "checkpoint":
            checkpoint_io = trainer.strategy.checkpoint_io
            self._save, checkpoint_io.save_checkpoint = checkpoint_io.save_checkpoint, self._half_a_file

    def _half_a_file(self, *arguments: Any, **keywords: Any) -> None:
        os.fsync = self._halve_and_die
        self._save(*arguments, **keywords)

    def _halve_and_die(self, descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        self._die()

    def on_microbatch_gradients(self, trainer: Any, pl_module: Any, window: Any, part: str) -> None:
        if self.at == "microbatch" and trainer.global_step == self.step and trainer.global_rank == self.rank:
            self.left -= 1
            if not self.left:
                self._die()

    def on_after_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.at == "update" and trainer.global_step == self.step + 1 and trainer.global_rank == self.rank:
            self._die()

    def _begin(self) -> None:
        if not self.left:
            self._die()
        self.left -= 1

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def newest_checkpoint(run_dir: Path) -> Path:
    """What a person would resume from: the latest file with a checkpoint's name."""
    return max((run_dir / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))


def written(folder: Path, name: str, *more: dict[str, Any]) -> str:
    checkpoint = callback("lightning.pytorch.callbacks.ModelCheckpoint", every_n_train_steps=EVERY, save_top_k=-1, filename="{step}")
    witness = callback("tiny_policies.Witness", folder=str(folder / f"witness-{name}"))
    model = grpo(
        warmup_steps=3, schedule="cosine", micro_batch_size=8, beta=0.05, split_backward=True, table_every=1, zero_variance="refill"
    )
    callbacks = [*more, checkpoint, witness]
    return config(folder, name, model, prompts(rewards="nan"), max_steps=STEPS, val_check_interval=EVERY, callbacks=callbacks)


def run(folder: Path, ranks: int, config_file: str, run_dir: Path, *more: str) -> list[int | None]:
    """Exit codes of a fit on one or two processes. When one dies the others, whose code is then None, are ended, as a launcher does."""
    kept = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK", "PL_GLOBAL_SEED")}
    path = os.pathsep.join([str(HERE), str(HERE.parent), kept.get("PYTHONPATH", "")])
    environment = kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "theodolite", "fit", f"--config={config_file}", f"--run_dir={run_dir}", *more]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
        command += [f"--trainer.devices={ranks}", "--trainer.strategy=ddp"]
    files = [open(folder / f"log-{rank}.txt", "w") for rank in range(ranks)]  # noqa: SIM115  (they live as long as the children)
    processes = [
        subprocess.Popen(command, env=environment | {"LOCAL_RANK": str(rank)}, stdout=files[rank], stderr=subprocess.STDOUT)
        for rank in range(ranks)
    ]
    deadline = time.monotonic() + LIMIT_S
    try:
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]
            if any(codes) or None not in codes:
                return codes
            time.sleep(0.1)
        pytest.fail(f"no end after {LIMIT_S} s: {(folder / 'log-0.txt').read_text()[-3000:]}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for file in files:
            file.close()


def assert_same_run(one: Path, other: Path) -> None:
    first, second = ((folder / "metrics.jsonl").read_bytes() for folder in (one, other))
    assert first == second
    for kind in ("completions", "rollouts"):
        names = sorted(path.name for path in (one / kind).iterdir())
        assert names == sorted(path.name for path in (other / kind).iterdir())
        for name in names:
            pd.testing.assert_frame_equal(pd.read_parquet(one / kind / name), pd.read_parquet(other / kind / name), check_exact=True)


def same_weights(one: Path, other: Path, ranks: int) -> bool:
    pairs = [[load_file(folder / f"weights-{rank}.safetensors") for folder in (one, other)] for rank in range(ranks)]
    return all(bool((a[name] == b[name]).all()) for a, b in pairs for name in a)


def logs(folder: Path, ranks: int) -> str:
    return "".join((folder / f"log-{rank}.txt").read_text()[-3000:] for rank in range(ranks))


def kill_and_resume(folder: Path, ranks: int, moments: list[Moment]) -> None:
    whole = folder / "run-whole"
    assert run(folder, ranks, written(folder, "whole"), whole) == [0] * ranks, logs(folder, ranks)
    for number, (phase, step, rank, after) in enumerate(moments):
        name = f"killed-{number}"
        killer = callback("test_killed_runs.KillAt", phase=phase, step=step, rank=rank, after=after)
        killed = folder / f"run-{name}"
        codes = run(folder, ranks, written(folder, name, killer), killed)
        assert codes[rank] == -signal.SIGKILL, f"{phase} {step} {rank}: {codes} {logs(folder, ranks)}"
        checkpoint = newest_checkpoint(killed)
        assert checkpoint.name == f"step={step // EVERY * EVERY}.ckpt", "half of a later one must not look like a checkpoint"
        assert bool(list(checkpoint.parent.glob(".*.part"))) == (phase == "checkpoint")
        assert run(folder, ranks, written(folder, name), killed, f"--ckpt_path={checkpoint}") == [0] * ranks, logs(folder, ranks)
        assert_same_run(whole, killed)
        assert same_weights(folder / "witness-whole", folder / f"witness-{name}", ranks), (phase, step, rank)
        said = {"ranks": ranks, "phase": phase, "step": step, "rank": rank, "after": after, "resumed_from": checkpoint.stem}
        print(json.dumps(said | {"identical": True}), flush=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_random_kills_on_one_rank_leave_the_bytes_of_the_uninterrupted_run(tmp_path: Path) -> None:
    assert {phase for phase, *_ in MOMENTS} == set(PHASES)
    kill_and_resume(tmp_path, 1, MOMENTS)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_ten_random_kills_on_two_ranks_leave_the_bytes_of_the_uninterrupted_run(tmp_path: Path) -> None:
    assert {phase for phase, *_ in MOMENTS_ON_TWO} == set(PHASES)
    assert {rank for _, _, rank, _ in MOMENTS_ON_TWO} == {0, 1}
    kill_and_resume(tmp_path, 2, MOMENTS_ON_TWO)
