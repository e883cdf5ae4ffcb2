"""Starts the ranks of a group as processes, and never leaves one behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_ranks(script: str, folder: Path, count: int, *arguments: str) -> None:
    """Run ``script folder count *arguments`` on ``count`` processes that form a group; their output goes to ``rank-<r>.txt``.

    Raises:
        AssertionError: A rank failed; the message ends with what every rank wrote.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(count)}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | shared
    children = []
    folder.mkdir(exist_ok=True, parents=True)
    try:
        for rank in range(count):
            log = open(folder / f"rank-{rank}.txt", "w")  # noqa: SIM115  (lives as long as the child)
            command = [sys.executable, script, str(folder), str(count), *arguments]
            children.append(subprocess.Popen(command, env=environment | {"LOCAL_RANK": str(rank)}, stdout=log, stderr=subprocess.STDOUT))
        codes = [child.wait(timeout=600) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert codes == [0] * count, "".join((folder / f"rank-{rank}.txt").read_text()[-2000:] for rank in range(count))
