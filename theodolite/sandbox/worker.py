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
    answer_fd: int
    deadline: float


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
        self._running: _Running | None = None
        self._preludes: dict[str, int] = {}
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
        parent = os.pidfd_open(os.getpid())
        try:
            with theirs:
                self._process = subprocess.Popen(
                    self._command(theirs.fileno(), parent),
                    pass_fds=[theirs.fileno(), parent],
                    env=_environment(),
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(parent)
        self._control, self._preludes = ours, {}

    def _command(self, control: int, parent: int) -> list[str]:
        settings = {
            "control": control,
            "parent": parent,
            "tier": self._tier,
            "modules": self._modules,
            "reading": self._reading,
            "cpu": self._cpu,
        }
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
        if self._running is not None:
            os.close(self._running.answer_fd)
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

    @property
    def modules(self) -> tuple[str, ...]:
        """What the zygote imports before any fork."""
        return zygote.FULL_MODULES if self._modules == "full" else zygote.LEAN_MODULES

    def submit(self, job: bytes, expected: Expected, limits: Limits, imports: str = "") -> None:
        """Hand over an encoded job.

        Args:
            job: The job.
            expected: What its answer must look like.
            limits: What it may use.
            imports: Import statements that the child finds done; see ``messages.Setup``.

        Raises:
            WorkerDied: The zygote is gone.
        """
        job_fd, answer_fd = os.memfd_create("job"), os.memfd_create("answer")
        self._running = _Running(limits, expected, answer_fd, time.monotonic() + limits.wall_s + self._grace_s)
        try:
            sizes = (limits.memory_mb << 20, limits.output_kb << 10)
            request = zygote.REQUEST.pack(limits.cpu_s, limits.wall_s, *sizes, len(job), self._prelude(imports))
            written = 0
            while written < len(job):
                written += os.pwrite(job_fd, job[written:], written)
            socket.send_fds(self._socket(), [request], [job_fd, answer_fd])
        except OSError as error:
            raise WorkerDied(str(error)) from error
        finally:
            os.close(job_fd)

    def _prelude(self, imports: str) -> int:
        """The number under which the zygote knows the imports; it is told when it does not."""
        if imports and imports not in self._preludes:
            self._socket().send(imports.encode())
            self._preludes[imports] = len(self._preludes) + 1
        return self._preludes.get(imports, 0)

    def accepts(self, imports: str) -> bool:
        """The zygote knows these imports, or has room for them."""
        size = len(imports.encode())
        fits = size < zygote.PRELUDE_BYTES and size != zygote.REQUEST.size
        return imports in self._preludes or not imports or (fits and len(self._preludes) < zygote.MAX_PRELUDES)

    def collect(self) -> Outcome:
        """The outcome of the ended job. Raises :class:`WorkerDied` when the zygote ended instead."""
        running = cast(_Running, self._running)
        try:
            reply = self._socket().recv(zygote.REPLY.size, socket.MSG_DONTWAIT)
        except OSError as error:
            raise WorkerDied(str(error)) from error
        if len(reply) != zygote.REPLY.size:
            raise WorkerDied("the fork server ended")
        size = min(os.fstat(running.answer_fd).st_size, (running.limits.output_kb << 10) + 1)
        raw = os.pread(running.answer_fd, size, 0)
        os.close(running.answer_fd)
        self._running = None
        return judge(zygote.REPLY.unpack(reply), raw, running.limits, running.expected)

    def _socket(self) -> socket.socket:
        if self._control is None:
            raise RuntimeError("this sandbox worker is not started; call start() first")
        return self._control
