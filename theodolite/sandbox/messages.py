"""What crosses the border, on the trusted side: jobs are encoded, answers are read without believing them."""

from __future__ import annotations

import json
import marshal
import os
import signal
from dataclasses import dataclass, replace
from typing import Any, cast

from . import codec, zygote
from .jobs import Call, Job, Limits, Outcome, Raised, Status
from .setup_code import Setup

_REPORTED: frozenset[str] = frozenset({"ok", "syntax_error", "runtime_error", "memory", "output_limit"})


def encode_calls(calls: tuple[Call, ...]) -> bytes:
    """The calls, each marshalled by itself: the child reads one when its turn comes, so no call sees what another did to its arguments.

    Raises:
        ValueError: An argument is of a type that is not carried, or nested too deep.
    """
    for call in calls:
        _refuse_foreign([*call.args, *call.kwargs.values()], 0)
    return marshal.dumps([marshal.dumps((call.args, call.kwargs), _WITHOUT_REFERENCES) for call in calls])


_WITHOUT_REFERENCES = 2
"""Version of the format in which two arguments that are one object arrive as two."""

_SCALARS = {int, float, str, bool, bytes, type(None)}
_CONTAINERS = {list, tuple, set, frozenset}


def _refuse_foreign(value: Any, depth: int) -> None:
    """Marshalling carries some types as another, and code objects, too: those that arrive as they are, are listed here."""
    kind = type(value)
    if kind in _SCALARS:
        return
    if kind not in _CONTAINERS and kind is not dict:
        raise ValueError(f"a Call holds a value of type {kind.__name__!r}; only plain Python values can be passed to the sandbox")
    if depth > codec.MAX_DEPTH:
        raise ValueError(f"a Call holds containers nested more than {codec.MAX_DEPTH} deep; the sandbox carries no deeper ones")
    members = [*value.keys(), *value.values()] if kind is dict else value
    if not set(map(type, members)) <= _SCALARS:
        for member in members:
            _refuse_foreign(member, depth + 1)


def encode_job(job: Job, calls: bytes, token: str, setup: Setup) -> bytes:
    """The job as the child reads it; ``calls`` comes from :func:`encode_calls`, ``token`` must be in its answer."""
    head = {
        "token": token,
        "name": "__main__" if job.as_main else "solution",
        "program": job.program,
        "setup": setup.source,
        "setup_code": setup.code,
        "entry": job.entry,
        "invoke": job.invoke,
        "binds": job.binds,
        "order": list(job.order or range(len(job.calls))),
        "calls": calls,
    }
    return marshal.dumps(head, _WITHOUT_REFERENCES)


@dataclass(frozen=True, slots=True)
class Expected:
    """What an answer must look like to be the runner's: the job's token, and the number of outputs (``None``: an invocation)."""

    token: str
    outputs: int | None


def judge(reply: tuple[int, float, float, int, int], raw: bytes, limits: Limits, expected: Expected) -> Outcome:
    """Turn the zygote's reply and the child's bytes into an outcome; ``infra_error`` here means "try again".

    How the process ended is known from the kernel; what it wrote is only believed as far as "these are its answers".
    """
    status, cpu_s, wall_s, peak_bytes, killed = reply
    ended = _how_it_ended(status, cpu_s, peak_bytes, bool(killed), limits)
    if ended is not None:
        return Outcome(ended[0], error=ended[1], cpu_s=cpu_s, wall_s=wall_s)
    return replace(_parse_answer(raw, limits, expected), cpu_s=cpu_s, wall_s=wall_s)


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
    if number in (signal.SIGSYS, signal.SIGXFSZ):
        return "tamper", f"killed by signal {number}: a system call of a foreign kind, or an answer beyond its size"
    if killed:
        return "infra_error", f"{limits.wall_s:g} s of wall time with {cpu_s:.2f} s of CPU time"
    if number == signal.SIGKILL:
        if peak_bytes >= limits.memory_mb << 19:
            return "memory", "killed by the system while using much memory"
        return "infra_error", "killed from outside"
    return "runtime_error", f"killed by signal {number}"


def _parse_answer(raw: bytes, limits: Limits, expected: Expected) -> Outcome:
    if not raw:
        return Outcome("tamper", error="the program ended its process before it could answer")
    if len(raw) > limits.output_kb << 10:
        return Outcome("tamper", error="the answer is larger than the runner's can be")
    try:
        return _read_answer(json.loads(raw), expected)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        return Outcome("tamper", error=f"the program wrote to the answer's descriptor ({type(error).__name__})")


def _read_answer(answer: Any, expected: Expected) -> Outcome:
    if not isinstance(answer, dict) or answer.get("token") != expected.token:
        raise ValueError("not the runner's")
    status = answer["status"]
    if not isinstance(status, str) or status not in _REPORTED:
        raise ValueError("no status")
    known, tampered, bound = cast(Status, status), answer.get("tampered") is True, answer.get("bound") is True
    if known != "ok":
        return Outcome(known, bound=bound, tampered=tampered, error=_text(answer.get("error", "")))
    if expected.outputs is None:
        return Outcome(known, returned=answer.get("returned") is True, bound=bound, tampered=tampered)
    outputs = answer["outputs"]
    if not isinstance(outputs, list) or len(outputs) != expected.outputs:
        raise ValueError("wrong number of outputs")
    return Outcome(known, tuple(map(_read_output, outputs)), tampered=tampered)


_READABLE = codec.READABLE


def _read_output(output: Any) -> Any:
    if type(output) is list and len(output) == 1:
        value = output[0]
        return value if type(value) in _READABLE else codec.from_wire(value)
    if not isinstance(output, dict):
        raise ValueError("neither a value nor an exception")
    return Raised(str(output["type"])[:80], str(output["message"])[:160])


def _text(error: Any) -> str:
    if isinstance(error, dict):
        error = f"{error.get('type')}: {error.get('message')}"
    return str(error)[:240]
