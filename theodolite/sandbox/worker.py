"""The trusted side of one zygote: start it, hand it one job at a time, collect what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from . import zygote
from .jobs import Limits, Outcome
from .messages import Expected, judge
from .tiers import ConcreteTier, wrapper

_SCRIPT = Path(zygote.__file__).resolve()


def _environment() -> dict[str, str]:
    """The zygote's whole environment.

    The order of a set must not differ between workers, the interpreter must find its libraries, and a function that is linked when it is
    first called would be linked anew in every child.
    """
    libraries = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {"PYTHONHASHSEED": "0", "LD_BIND_NOW": "1"} | libraries


class WorkerDied(Exception):
    """The zygote is gone or does not answer."""


@dataclass
class _Running:
    limits: Limits
    expected: Expected
    deadline: float


class _Files:
    """Where a zygote's jobs and answers lie, one at a time; in memory, without a name. Closed with the worker.

    They are used again for the next program, and nothing of what the last one did to them may be left: it has ended, the content is cut
    off, the positions are put back, and the filter allowed it nothing else.
    """

    def __init__(self) -> None:
        self.job, self.answer = os.memfd_create("job"), os.memfd_create("answer")

    def put(self, job: bytes) -> None:
        for file in (self.job, self.answer):
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
        written = 0
        while written < len(job):
            written += os.pwrite(self.job, job[written:] if written else job, written)

    def take(self, most: int) -> bytes:
        return os.pread(self.answer, min(os.fstat(self.answer).st_size, most), 0)

    def close(self) -> None:
        os.close(self.job)
        os.close(self.answer)


class Worker:
    """One zygote process and the job it is running.

    Args:
        tier: How the zygote is isolated; see ``tiers.py``.
        preload: Import :data:`zygote.FULL_MODULES` rather than :data:`zygote.LEAN_MODULES`.
        reading: Folders that programs may read.
        cpu: Core to stay on; ``None`` = any.
        start_timeout_s: Seconds of wall time in which the interpreter must be up.
        grace_s: Seconds beyond a job's wall limit after which the zygote itself counts as stuck.
    """

    def __init__(
        self,
        tier: ConcreteTier = "seccomp",
        preload: bool = True,
        reading: tuple[str, ...] = (),
        cpu: int | None = None,
        start_timeout_s: float = 60.0,
        grace_s: float = 10.0,
    ) -> None:
        self._tier: ConcreteTier = tier
        self._modules, self._reading, self._cpu = "full" if preload else "lean", list(reading), cpu
        self._start_timeout_s, self._grace_s = start_timeout_s, grace_s
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._files: _Files | None = None
        self._running: _Running | None = None
        self._preludes: dict[bytes, int] = {}
        self.in_force: dict[str, Any] = {}
        """What the zygote said of itself when it came up: the version of Landlock (0: none)."""

    @property
    def alive(self) -> bool:
        """The zygote process exists."""
        return self._process is not None and self._process.poll() is None

    @property
    def busy(self) -> bool:
        """A job has been handed over and not been collected."""
        return self._running is not None

    @property
    def pid(self) -> int:
        """Process id of the zygote, or of the wrapper that holds it; its process group too."""
        if self._process is None:
            raise RuntimeError("this sandbox worker is not started; call start() first")
        return self._process.pid

    @property
    def deadline(self) -> float:
        """``time.monotonic()`` at which the running job's zygote counts as stuck; infinity when idle."""
        return self._running.deadline if self._running else float("inf")

    def fileno(self) -> int:
        """The control socket, readable when a job has ended."""
        return self._socket().fileno()

    def spawn(self) -> None:
        """Start a zygote (killing an old one) without waiting for it."""
        self.kill()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent, files = os.pidfd_open(os.getpid()), _Files()
        passed = {"job": files.job, "answer": files.answer, "control": theirs.fileno(), "parent": parent}
        try:
            with theirs:
                self._process = subprocess.Popen(
                    self._command(passed),
                    pass_fds=list(passed.values()),
                    env=_environment(),
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            files.close()
            raise
        finally:
            os.close(parent)
        self._control, self._files, self._preludes = ours, files, {}

    def _command(self, passed: dict[str, int]) -> list[str]:
        settings = passed | {"tier": self._tier, "modules": self._modules, "reading": self._reading, "cpu": self._cpu}
        return [
            *wrapper(self._tier, _SCRIPT.parent),
            sys.executable,
            "-s",
            "-P",
            "-S",
            "-X",
            "no_debug_ranges",
            str(_SCRIPT),
            json.dumps(settings),
        ]

    def wait_ready(self) -> None:
        """Wait for the spawned zygote. Raises ``RuntimeError`` when it does not come up."""
        control, process = self._socket(), cast("subprocess.Popen[bytes]", self._process)
        control.settimeout(self._start_timeout_s)
        try:
            self.in_force = json.loads(control.recv(256))
        except (OSError, ValueError):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            text = process.communicate()[1].decode(errors="replace").strip().splitlines()
            self.kill()
            raise RuntimeError(f"the sandbox cannot start its fork server: {text[-1] if text else 'no answer'}") from None
        control.settimeout(None)

    def kill(self) -> None:
        """End the zygote and its child, if any; idempotent."""
        self._running = None
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            if self._process.stderr:
                self._process.stderr.close()
            self._process = None
        if self._files is not None:
            self._files.close()
            self._files = None

    def submit(self, job: bytes, expected: Expected, limits: Limits, prelude: bytes = b"") -> None:
        """Hand over an encoded job.

        Args:
            job: The job.
            expected: What its answer must look like.
            limits: What it may use.
            prelude: Statements that the child finds done; see ``setup_code.Setup``. At most ``zygote.MAX_PRELUDES`` different ones.

        Raises:
            WorkerDied: The zygote is gone.
        """
        self._running = _Running(limits, expected, time.monotonic() + limits.wall_s + self._grace_s)
        sizes = (limits.memory_mb << 20, limits.output_kb << 10)
        try:
            cast(_Files, self._files).put(job)
            self._socket().send(zygote.REQUEST.pack(limits.cpu_s, limits.wall_s, *sizes, len(job), self._number(prelude)))
        except OSError as error:
            raise WorkerDied(str(error)) from error

    def _number(self, prelude: bytes) -> int:
        """The number under which the zygote knows the prelude; it is told when it does not."""
        if prelude and prelude not in self._preludes:
            self._socket().send(prelude)
            self._preludes[prelude] = len(self._preludes) + 1
        return self._preludes.get(prelude, 0)

    def collect(self) -> Outcome:
        """The outcome of the ended job. Raises :class:`WorkerDied` when the zygote ended instead."""
        running = cast(_Running, self._running)
        try:
            reply = self._socket().recv(zygote.REPLY.size, socket.MSG_DONTWAIT)
        except OSError as error:
            raise WorkerDied(str(error)) from error
        if len(reply) != zygote.REPLY.size:
            raise WorkerDied("the fork server ended")
        raw = cast(_Files, self._files).take((running.limits.output_kb << 10) + 1)
        self._running = None
        return judge(zygote.REPLY.unpack(reply), raw, running.limits, running.expected)

    def _socket(self) -> socket.socket:
        if self._control is None:
            raise RuntimeError("this sandbox worker is not started; call start() first")
        return self._control
