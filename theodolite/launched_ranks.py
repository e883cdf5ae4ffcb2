"""Processes that a run has started for its other ranks: none of them may outlive it."""

from __future__ import annotations

import atexit
import subprocess
import sys
import time
from typing import Any

GRACE_S = 10.0
"""Time for a rank that fails as well to end by itself, and to say why."""


def end_with_this_process(launcher: Any) -> None:
    """When this process ends, after its stack trace, end the ranks that it has started: those that still run :data:`GRACE_S` later.

    A rank that hangs outside of a collective does not hear of the others' failure, and nobody else would end it.

    Args:
        launcher: Of the trainer's strategy; one that has started no processes, and None, are fine.
    """
    started: list[subprocess.Popen[Any]] | None = getattr(launcher, "procs", None)
    if not started:
        return
    atexit.register(end, dict(enumerate(started, start=1)))
    started.clear()  # the launcher's own watch over them would kill this process in the middle of its stack trace


def end(processes: dict[int, subprocess.Popen[Any]]) -> None:
    """Wait for processes to end, :data:`GRACE_S` in all, then kill what is left and say which rank it was.

    Args:
        processes: By the rank on this machine.
    """
    deadline = time.monotonic() + GRACE_S
    for rank, process in processes.items():
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            print(f"theodolite: rank {rank} of this machine did not end by itself, and was ended.", file=sys.stderr, flush=True)
