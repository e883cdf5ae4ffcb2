"""Runs of a study as processes: a bounded number at once, one thread each, each with its own folder, log and record.

A run that has its ``run.json`` is finished and is not repeated, so an interrupted study continues where it was.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from theodolite.provenance import write_json_atomic

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
    """

    run_dir: Path
    args: tuple[str, ...]
    record: dict[str, Any]
    test: bool
    steps: int

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.run_dir.name

    @property
    def done(self) -> bool:
        """Whether an earlier call has finished it with the same arguments."""
        path = self.run_dir / RUN_RECORD
        return path.is_file() and json.loads(path.read_text())["args"] == list(self.args)

    def steps_done(self) -> int:
        """Training rows logged so far."""
        path = self.run_dir / "metrics.jsonl"
        return sum("train/loss" in line for line in path.read_text().splitlines()) if path.is_file() else 0


def run_job(job: Job) -> None:
    """Run one job in this process, then exit. Output goes to the run's log.

    Raises:
        SystemExit: Always; 0 when the run is complete.
    """
    _die_with_parent()
    job.run_dir.mkdir(parents=True, exist_ok=True)
    with open(job.run_dir / "log.txt", "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        _run(job)
    except Exception:  # the process boundary: the parent sees the exit code and points at the log
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


def _run(job: Job) -> None:
    from theodolite.cli import TheodoliteCLI, check_args, import_rooms

    start = time.perf_counter()
    import_rooms()
    args = [*job.args, f"--run_dir={job.run_dir}"]
    check_args(args)
    cli = TheodoliteCLI(args)
    if job.test:
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    record = job.record | {
        "args": list(job.args),
        "command": shlex.join(["theodolite", *args]),
        "seconds": round(time.perf_counter() - start, 3),
    }
    write_json_atomic(job.run_dir / RUN_RECORD, record)


def run_jobs(jobs: Sequence[Job], processes: int, watch: Callable[[Sequence[Job], Job | None], None]) -> list[str]:
    """Run jobs, ``processes`` at a time, in order.

    Modules are imported once, in a server from which every run is forked: a run is isolated, and starts without the seconds that
    importing takes.

    Args:
        jobs: What to run; those already done are skipped.
        processes: Most runs at once.
        watch: Called about five times a second with the running jobs, and with each job that has just finished.

    Returns:
        One sentence per failed job.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the server imports torch
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["theodolite.cli", "theodolite.reports"])
    waiting = [job for job in jobs if not job.done]
    running: dict[str, tuple[Job, ForkServerProcess]] = {}
    failures: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                clear_run(job.run_dir)
                process = context.Process(target=run_job, args=(job,), daemon=False)
                process.start()
                running[job.name] = (job, process)
            time.sleep(0.2)
            for name, (job, process) in list(running.items()):
                if process.exitcode is None:
                    continue
                del running[name]
                if process.exitcode != 0 or not job.done:
                    failures.append(f"{name} failed with exit code {process.exitcode}; see {job.run_dir / 'log.txt'}.")
                watch([j for j, _ in running.values()], job)
            watch([j for j, _ in running.values()], None)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    return failures


def clear_run(run_dir: Path) -> None:
    """Remove what an unfinished run left of its results, so that nothing of it is taken for the new one's."""
    for name in (RUN_RECORD, "config.yaml", "manifest.json", "metrics.jsonl", "timings.jsonl"):
        (run_dir / name).unlink(missing_ok=True)
    for path in (run_dir / "rollouts").glob("*.parquet"):
        path.unlink()


def _die_with_parent() -> None:
    """A run must not outlive the study that started it, not even after kill -9 (Linux; elsewhere it would)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
