"""Runs of a study as processes: a bounded number at once, one thread each, each with its own folder, log and record.

A run that has its ``run.json`` is finished and is not repeated, so an interrupted study continues where it was. A run that was interrupted
goes on at its last checkpoint where the study asks for that (``theodolite/study_restart.py``); otherwise it begins again, without anything
that it left.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from theodolite.provenance import file_hash, write_json_atomic
from theodolite.study_restart import BEGUN, Attempt, Restart, find_restart, identity

RUN_RECORD = "run.json"
"""Written last: its presence says that the run is complete."""

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the command line in a process of its own.

    Attributes:
        run_dir: The run's folder; ``log.txt`` in it holds everything the run printed.
        args: Arguments of ``theodolite``, without ``--run_dir``.
        record: What ``run.json`` says beside the command and the seconds.
        test: Also run the test protocol on the trained module, in the same process.
        steps: Expected optimizer steps, for the progress bar.
        resume: Where it was interrupted, go on at its last checkpoint.
    """

    run_dir: Path
    args: tuple[str, ...]
    record: dict[str, Any]
    test: bool
    steps: int
    resume: bool = False

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.run_dir.name

    @property
    def done(self) -> bool:
        """Whether an earlier call has finished it with the same arguments and the same content of the configs that they name.

        A run that was tested is also one that need not be; not the other way round.
        """
        path = self.run_dir / RUN_RECORD
        if not path.is_file():
            return False
        record = json.loads(path.read_text())
        same = (record.get("args"), record.get("configs")) == (list(self.args), config_hashes(self.args))
        return same and (not self.test or _tested(record, self.run_dir))

    def restart(self) -> Restart | None:
        """Where it goes on; None = at its first step."""
        return find_restart(self.run_dir, identity(self.args, config_hashes(self.args))) if self.resume else None

    def steps_done(self) -> int:
        """Training batches done, as far as they are logged."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # the last is empty, or still being written
        return max((json.loads(line)["step"] + 1 for line in lines if '"train/' in line), default=0)


def _tested(record: dict[str, Any], run_dir: Path) -> bool:
    """Whether a finished run went through the test protocol; where an older record does not say, its logged rows do."""
    if "test" in record:
        return bool(record["test"])
    metrics = run_dir / "metrics.jsonl"
    return metrics.is_file() and '"test' in metrics.read_text(encoding="utf-8")


def config_hashes(args: Sequence[str]) -> dict[str, str]:
    """Content hash of every file that a ``--config=`` of a command line names."""
    return {arg: file_hash(Path(arg.removeprefix("--config="))) for arg in args if arg.startswith("--config=")}


def run_job(job: Job, gpu: str | None = None, restart: Restart | None = None) -> None:
    """Run one job in this process, then exit. Output goes to the run's log.

    Args:
        job: What to run.
        gpu: The only GPU that it sees, as CUDA names it; None = whatever this process sees.
        restart: Where it goes on; None = at its first step.

    Raises:
        SystemExit: Always; 0 when the run is complete.
    """
    _die_with_study()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA is first used, which is in this process
    job.run_dir.mkdir(parents=True, exist_ok=True)
    with open(job.run_dir / "log.txt", "w" if restart is None else "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        _run(job, restart)
    except Exception:  # the process boundary: the parent sees the exit code and points at the log
        (job.run_dir / BEGUN).unlink(missing_ok=True)
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


def _run(job: Job, restart: Restart | None) -> None:
    from theodolite.cli import TheodoliteCLI, check_args

    start, configs = time.perf_counter(), config_hashes(job.args)
    args = [*job.args, f"--run_dir={job.run_dir}"]
    here = args if restart is None else [*args, f"--ckpt_path={restart.checkpoint}"]
    check_args(here)
    attempt = Attempt(job.run_dir, identity(job.args, configs), restart) if job.resume else None
    cli = TheodoliteCLI(here)
    if attempt is not None:
        attempt.fitted()
    if job.test:
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    record = job.record | {
        "args": list(job.args),
        "configs": configs,
        "test": job.test,
        "command": shlex.join(["theodolite", *args]),
        "seconds": round(time.perf_counter() - start, 3),
    }
    write_json_atomic(job.run_dir / RUN_RECORD, record | ({} if attempt is None else attempt.told()))
    if attempt is not None:
        attempt.ended()


def visible_gpus(count: int) -> list[str]:
    """CUDA's names of the first ``count`` GPUs that this process may use: the entries of ``CUDA_VISIBLE_DEVICES`` where it is set.

    Raises:
        ValueError: It names fewer.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(gpu) for gpu in range(count)] if given is None else [name.strip() for name in given.split(",") if name.strip()]
    if len(names) < count:
        raise ValueError(f"--gpus {count} is more than CUDA_VISIBLE_DEVICES={given!r} names; ask for at most {len(names)}, or name more.")
    return names[:count]


def run_jobs(jobs: Sequence[Job], processes: int, watch: Callable[[Sequence[Job], Job | None], None], gpus: int = 0) -> list[str]:
    """Run jobs, ``processes`` at a time, in order.

    Modules are imported once, in a server from which every run is forked: a run is isolated, and starts without the seconds that
    importing takes.

    Args:
        jobs: What to run; those already done are skipped.
        processes: Most runs at once.
        watch: Called about five times a second with the running jobs, and with each job that has just finished.
        gpus: Give each run one of so many GPUs (of those in ``CUDA_VISIBLE_DEVICES``), the one that fewest others use; 0 = leave devices to
            the configs.

    Returns:
        One sentence per failed job.

    Raises:
        ValueError: If two jobs share a folder, or there are fewer GPUs.
    """
    if len({job.run_dir for job in jobs}) < len(jobs):
        raise ValueError("Two runs of the study have the same folder; give each its own run_dir.")
    names = visible_gpus(gpus)
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the server imports torch
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["theodolite.cli", "theodolite.reports"])
    waiting = [job for job in jobs if not job.done]
    running: dict[Path, tuple[Job, ForkServerProcess]] = {}
    on_gpu: dict[Path, str] = {}
    failures: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                restart = job.restart()
                if restart is None:
                    clear_run(job.run_dir)
                if names:
                    on_gpu[job.run_dir] = min(names, key=lambda gpu: [on_gpu[run] for run in running].count(gpu))
                process = context.Process(target=run_job, args=(job, on_gpu.get(job.run_dir), restart), daemon=False)
                process.start()
                running[job.run_dir] = (job, process)
            time.sleep(0.2)
            for run_dir, (job, process) in list(running.items()):
                if process.exitcode is None:
                    continue
                del running[run_dir]
                if process.exitcode != 0 or not job.done:
                    failures.append(f"{job.name} failed with exit code {process.exitcode}; see {job.run_dir / 'log.txt'}.")
                watch([j for j, _ in running.values()], job)
            watch([j for j, _ in running.values()], None)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    return failures


def clear_run(run_dir: Path) -> None:
    """Remove what an unfinished run left of its results, so that nothing of it is taken for the new one's, by the report or another run."""
    for name in (RUN_RECORD, BEGUN, "config.yaml", "manifest.json", "metrics.jsonl", "timings.jsonl"):
        (run_dir / name).unlink(missing_ok=True)
    for path in (*(run_dir / "rollouts").glob("*.parquet"), *(run_dir / "completions").glob("*.parquet")):
        path.unlink()
    for path in sorted((run_dir / "checkpoints").rglob("*.ckpt")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)  # one that is sharded is a folder


def _die_with_study() -> None:
    """A run must not outlive the study that started it, not even after kill -9: neither the study itself nor the server between them."""
    study = multiprocessing.parent_process()
    if study is not None:
        threading.Thread(target=_wait_and_die, args=(study.sentinel,), daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _wait_and_die(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
