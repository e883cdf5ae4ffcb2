"""Interpreters that start warm: scripts and command lines in processes forked from a server that has imported what they need.

Importing torch, Lightning and transformers takes seconds of processor time, more than all else that most ranks of a test do. What is
forked is isolated like a process of its own: it has its own arguments, environment, folder, output and exit code, and can be killed. Only
functions registered with ``atexit`` do not run. Starts from a cold interpreter are tested in ``test_cli.py`` and ``test_dead_rank.py``.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from theodolite.cli import RUN_DIR_VARIABLE

IMPORTED = (
    "theodolite.cli",
    "theodolite.reports",
    "theodolite.callbacks.gradient_projection",
    "theodolite.datamodules.leetcode",
    "theodolite.lightning_modules.decomposition",
    "theodolite.lightning_modules.grpo",
    "theodolite.lightning_modules.talkative",
    "theodolite.lightning_modules.transcoder",
    "transformers.models.auto.modeling_auto",
    "pandas",
)
"""By the server, once. Nothing of it differentiates or uses a GPU, so forking afterwards is safe."""
NOT_INHERITED = (RUN_DIR_VARIABLE, "PL_GLOBAL_SEED", "LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> ForkServerProcess:
    """Start what ``python *arguments`` would, in the current folder.

    Args:
        arguments: A script or ``-m`` and a module, then theirs.
        log: File of everything it prints.
        environment: Added to this process's own, which has none of :data:`NOT_INHERITED`, one thread and no GPU.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    own = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    whole = own | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | dict(environment or {})
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the server imports torch
    process = context.Process(target=_become, args=(list(arguments), str(log), whole))
    process.start()
    return process


def finish(processes: Sequence[ForkServerProcess], seconds: float = 200.0) -> list[int | None]:
    """Exit codes, negative signals included; None for what had to be killed after ``seconds``. None of the processes is left."""
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def run(arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, seconds: float = 200.0) -> int | None:
    """The exit code of :func:`start`'s process."""
    return finish([start(arguments, log, environment)], seconds)[0]


def run_ranks(
    arguments: Sequence[str], folder: Path, count: int = 2, seconds: float = 200.0, environment: Mapping[str, str] | None = None
) -> None:
    """Run ``python *arguments`` on ``count`` processes that form a group; what they print goes to ``folder/rank-<r>.txt``.

    Raises:
        AssertionError: A rank failed or did not end in time; the message ends with what every rank wrote.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(count)} | dict(environment or {})
    logs = [folder / f"rank-{rank}.txt" for rank in range(count)]
    ranks = [start(arguments, log, group | {"LOCAL_RANK": str(rank), "RANK": str(rank)}) for rank, log in enumerate(logs)]
    codes = finish(ranks, seconds)
    assert codes == [0] * count, f"{codes} {''.join(log.read_text(errors='replace')[-3000:] for log in logs)}"


def _become(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
