"""The trusted side of one zygote: start it, hand it one job at a time, judge how the child ended."""

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

from . import codec, zygote
from .jobs import Call, Job, Limits, Outcome, Raised, Status

_SCRIPT = Path(zygote.__file__).resolve()
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # the order of a set must not differ between workers
_REPORTED: frozenset[str] = frozenset({"ok", "syntax_error", "runtime_error", "memory", "output_limit"})


class WorkerDied(Exception):
    """The zygote is gone or does not answer."""


@dataclass
class _Running:
    limits: Limits
    expected_outputs: int | None
    answer_fd: int
    deadline: float


class Worker:
    """One zygote process and the job it is running.

    Args:
        start_timeout_s: Seconds of wall time in which the interpreter must be up.
        grace_s: Seconds beyond a job's wall limit after which the zygote itself counts as stuck.
    """

    def __init__(self, start_timeout_s: float = 60.0, grace_s: float = 10.0) -> None:
        self._start_timeout_s, self._grace_s = start_timeout_s, grace_s
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._running: _Running | None = None

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
        """Process id of the zygote (its process group too)."""
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
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-S", str(_SCRIPT), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_ENVIRONMENT,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self._control = ours

    def wait_ready(self) -> None:
        """Wait for the spawned zygote. Raises ``RuntimeError`` when it does not come up."""
        control, process = self._socket(), cast("subprocess.Popen[bytes]", self._process)
        control.settimeout(self._start_timeout_s)
        try:
            hello = control.recv(64)
        except OSError:
            hello = b""
        control.settimeout(None)
        if hello != zygote.HELLO:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            text = process.communicate()[1].decode(errors="replace").strip().splitlines()
            self.kill()
            raise RuntimeError(f"the sandbox cannot start its fork server: {text[-1] if text else 'no answer'}")

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

    def submit(self, job: bytes, expected_outputs: int | None, limits: Limits) -> None:
        """Hand over an encoded job. Raises :class:`WorkerDied` when the zygote is gone."""
        job_fd, answer_fd = os.memfd_create("job"), os.memfd_create("answer")
        self._running = _Running(limits, expected_outputs, answer_fd, time.monotonic() + limits.wall_s + self._grace_s)
        request = zygote.REQUEST.pack(limits.cpu_s, limits.wall_s, limits.memory_mb << 20, limits.output_kb << 10)
        try:
            with os.fdopen(job_fd, "wb", closefd=False) as file:
                file.write(job)
            os.lseek(job_fd, 0, os.SEEK_SET)
            socket.send_fds(self._socket(), [request], [job_fd, answer_fd])
        except OSError as error:
            raise WorkerDied(str(error)) from error
        finally:
            os.close(job_fd)

    def collect(self) -> Outcome:
        """The outcome of the ended job. Raises :class:`WorkerDied` when the zygote ended instead."""
        running = cast(_Running, self._running)
        try:
            reply = self._socket().recv(zygote.REPLY.size, socket.MSG_DONTWAIT)
        except OSError as error:
            raise WorkerDied(str(error)) from error
        if len(reply) != zygote.REPLY.size:
            raise WorkerDied("the fork server ended")
        raw = os.pread(running.answer_fd, (running.limits.output_kb << 10) + 1, 0)
        os.close(running.answer_fd)
        self._running = None
        return judge(zygote.REPLY.unpack(reply), raw, running.limits, running.expected_outputs)

    def _socket(self) -> socket.socket:
        if self._control is None:
            raise RuntimeError("this sandbox worker is not started; call start() first")
        return self._control


def encode_calls(calls: tuple[Call, ...]) -> str:
    """The calls as JSON text. Raises ``ValueError`` for an argument of a type that is not carried."""
    wire = [[codec.to_wire(list(call.args)), codec.to_wire(call.kwargs)] for call in calls]
    text = json.dumps(wire)
    if '{"o": ' in text:
        for call in calls:
            _refuse_opaque(codec.from_wire(codec.to_wire([list(call.args), call.kwargs])))
    return text


def encode_job(job: Job, calls: str) -> bytes:
    """The job as the child reads it; ``calls`` is the text of :func:`encode_calls`."""
    head = {"program": job.program, "setup": job.setup_code, "entry": job.entry, "invoke": job.invoke}
    return f'{json.dumps(head)[:-1]}, "calls": {calls}}}'.encode()


def _refuse_opaque(value: Any) -> None:
    if isinstance(value, codec.Opaque):
        raise ValueError(f"a Call holds a value of type {value.type_name!r}; only plain Python values can be passed to the sandbox")
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        for member in value:
            _refuse_opaque(member)


def judge(reply: tuple[int, float, float, int, int], raw: bytes, limits: Limits, expected_outputs: int | None) -> Outcome:
    """Turn the zygote's reply and the child's bytes into an outcome; ``infra_error`` here means "try again".

    How the process ended is known from the kernel; what it wrote is only believed as far as "these are its answers".
    """
    status, cpu_s, wall_s, peak_bytes, killed = reply
    ended = _how_it_ended(status, cpu_s, peak_bytes, bool(killed), limits)
    if ended is not None:
        return Outcome(ended[0], error=ended[1], cpu_s=cpu_s, wall_s=wall_s)
    status_text, outputs, returned, error = _parse_answer(raw, limits, expected_outputs)
    return Outcome(status_text, outputs, returned, error, cpu_s, wall_s)


def _how_it_ended(status: int, cpu_s: float, peak_bytes: int, killed: bool, limits: Limits) -> tuple[Status, str] | None:
    """Status and text for a process that did not end by itself; ``None`` when its answer decides."""
    if status == -1:
        return "infra_error", "no process could be forked"
    if not os.WIFSIGNALED(status):
        return None
    number = os.WTERMSIG(status)
    if number == zygote.LOCKDOWN_FAILED:
        return "infra_error", "the process could not lock itself down"
    if number in (signal.SIGPROF, signal.SIGXCPU) or (number == signal.SIGKILL and cpu_s >= 0.9 * limits.cpu_s):
        return "timeout", f"more than {limits.cpu_s:g} s of CPU time"
    if killed:
        return "infra_error", f"{limits.wall_s:g} s of wall time with {cpu_s:.2f} s of CPU time"
    if number == signal.SIGKILL:
        if peak_bytes >= limits.memory_mb << 19:
            return "memory", "killed by the system while using much memory"
        return "infra_error", "killed from outside"
    return "runtime_error", f"killed by signal {number}"


def _parse_answer(raw: bytes, limits: Limits, expected_outputs: int | None) -> tuple[Status, tuple[Any, ...] | None, bool, str]:
    if not raw:
        return "no_answer", None, False, "the program ended without an answer"
    if len(raw) > limits.output_kb << 10:
        return "output_limit", None, False, "the answer is too large"
    try:
        return _read_answer(json.loads(raw), expected_outputs)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        return "no_answer", None, False, f"unreadable answer ({type(error).__name__})"


def _read_answer(answer: Any, expected_outputs: int | None) -> tuple[Status, tuple[Any, ...] | None, bool, str]:
    status = answer["status"] if isinstance(answer, dict) else None
    if not isinstance(status, str) or status not in _REPORTED:
        raise ValueError("no status")
    known = cast(Status, status)
    if known != "ok":
        return known, None, False, _text(answer.get("error", ""))
    if expected_outputs is None:
        return known, None, answer.get("returned") is True, ""
    outputs = answer["outputs"]
    if not isinstance(outputs, list) or len(outputs) != expected_outputs:
        raise ValueError("wrong number of outputs")
    return known, tuple(_read_output(output) for output in outputs), False, ""


def _read_output(output: Any) -> Any:
    if isinstance(output, list) and len(output) == 1:
        return codec.from_wire(output[0])
    if not isinstance(output, dict):
        raise ValueError("neither a value nor an exception")
    return Raised(str(output["type"])[:80], str(output["message"])[:160])


def _text(error: Any) -> str:
    if isinstance(error, dict):
        error = f"{error.get('type')}: {error.get('message')}"
    return str(error)[:240]
