"""What the locked-down child does with its job. Runs untrusted code; nothing in this process is a secret or is believed.

Standard library only: the zygote loads this file by path.
"""

from __future__ import annotations

import builtins
import json
import marshal
import sys
from json.encoder import c_make_encoder, encode_basestring_ascii  # pyright: ignore[reportAttributeAccessIssue]
from types import CodeType, ModuleType
from typing import Any

_dumps, _loads = json.dumps, marshal.loads
# What json.dumps comes to, without the way there: no markers against cycles, since what is encoded was copied and holds none.
_encode: Any = c_make_encoder(None, None, encode_basestring_ascii, None, ": ", ", ", False, False, True)

# Looked up before any fork. All of builtins would cost a tenth of a job: comparing touches, and so copies, the page of every value.
_WATCHED = {name: vars(builtins)[name] for name in ("__import__", "eval", "exec", "isinstance", "len", "print", "sum", "type")}


def answer(raw_job: bytes, output_bytes: int, codec: Any, module: ModuleType, failure: BaseException | None = None) -> bytes:
    """Run one encoded job and return its encoded answer, at most ``output_bytes`` long (or a note that it would be longer).

    Args:
        raw_job: As ``messages.encode_job`` makes it.
        output_bytes: Longest answer.
        codec: The codec module.
        module: Where the program runs; it may hold imports and definitions that the zygote made for it.
        failure: What that raised, if anything; then the setup code has failed, and with it the job.
    """
    job = _loads(raw_job)  # from the trusted side
    frame = _Run(job, codec, module, failure).frame()
    if len(frame) > output_bytes:
        return _dumps({"token": job["token"], "status": "output_limit", "error": "the answer is too large"}).encode()
    return frame


class _Run:
    """One job. ``token`` goes into the answer, so that bytes which a program writes blindly are not taken for one."""

    def __init__(self, job: dict[str, Any], codec: Any, module: ModuleType, failure: BaseException | None) -> None:
        self.job, self.codec, self.module, self.failure = job, codec, module, failure
        self.namespace: dict[str, Any] = module.__dict__
        self.bound = False

    def frame(self) -> bytes:
        job = self.job
        self.module.__name__ = job["name"]
        sys.modules[job["name"]] = self.module  # dataclasses and enums look their module up by name
        try:
            bodies = [_compiled(job["setup"], "<setup>", "exec")] if job["setup"] else []
            if job["setup_code"]:
                bodies.append(_loads(job["setup_code"]))  # compiled by the trusted side
            bodies.append(_compiled(job["program"], "<program>", "exec"))
        except BaseException as error:  # the parser also raises ValueError, MemoryError and RecursionError on sources it cannot take
            return self._encoded("syntax_error", error=_describe(error))
        try:
            if self.failure is not None:
                raise self.failure
            for body in bodies:
                exec(body, self.namespace)
            if job["invoke"] is not None:
                return self._invoked()
        except BaseException as error:  # SystemExit and KeyboardInterrupt are no answers either
            return self._encoded("memory" if isinstance(error, MemoryError) else "runtime_error", error=_describe(error))
        return self._called()

    def _invoked(self) -> bytes:
        name = self.job["binds"]
        self.bound = name is None or name in self.namespace or name in vars(builtins)
        if self.bound:
            eval(_compiled(self.job["invoke"], "<invoke>", "eval"), self.namespace)
        return self._encoded("ok", returned=self.bound)

    def _called(self) -> bytes:
        entry = _compiled(self.job["entry"], "<entry>", "eval")
        calls, order, to_wire = _loads(self.job["calls"]), self.job["order"], self.codec.to_wire
        answers: list[Any] = []
        for index in order:
            try:
                function = eval(entry, self.namespace)
                args, kwargs = _loads(calls[index])  # anew every time: the program may change them
                answers.append([to_wire(function(*args, **kwargs))])  # a copy, now: a later call may change the object
            except BaseException as error:
                answers.append(_describe(error))
        try:
            return self._encoded("ok", outputs=answers)
        except MemoryError as error:
            answers.clear()
            return self._encoded("memory", error=_describe(error))

    def _encoded(self, status: str, **fields: Any) -> bytes:
        answer = {"token": self.job["token"], "status": status, "tampered": self._tampered(), "bound": self.bound, **fields}
        return "".join(_encode(answer, 0)).encode()

    def _tampered(self) -> bool:
        """The program has changed what does not belong to it. Only the careless are caught: this runs where the program ran."""
        now = vars(builtins)
        replaced = any(now.get(name) is not value for name, value in _WATCHED.items())
        return replaced or json.dumps is not _dumps or sys.gettrace() is not None or sys.getprofile() is not None


def _compiled(source: str, name: str, mode: str) -> CodeType:
    return compile(source, name, mode, dont_inherit=True)


def _describe(error: BaseException) -> dict[str, str]:
    try:
        message = str(error)[:160]
    except BaseException:
        message = "(its message raises)"
    return {"type": type(error).__name__[:80], "message": message}
