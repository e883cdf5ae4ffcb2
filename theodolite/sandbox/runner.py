"""What the locked-down child does with its job. Runs untrusted code; nothing in this process is a secret or is believed.

Standard library only: the zygote loads this file by path.
"""

from __future__ import annotations

import json
import sys
from types import CodeType, ModuleType
from typing import Any


def answer(raw_job: bytes, output_bytes: int, codec: Any) -> bytes:
    """Run one encoded job and return its encoded answer, at most ``output_bytes`` long (or a note that it would be longer)."""
    frame = _run(json.loads(raw_job), output_bytes, codec)
    if len(frame) > output_bytes:
        return b'{"status": "output_limit", "error": "the answer is too large"}'
    return frame


def _run(job: dict[str, Any], output_bytes: int, codec: Any) -> bytes:
    module = ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses and enums look their module up by name
    namespace = module.__dict__
    try:
        bodies = [_compiled(job["setup"], "<setup>", "exec"), _compiled(job["program"], "<program>", "exec")]
    except BaseException as error:  # the parser also raises ValueError, MemoryError and RecursionError on sources it cannot take
        return _frame("syntax_error", error=_describe(error))
    try:
        for body in bodies:
            exec(body, namespace)
        if job["invoke"] is not None:
            eval(_compiled(job["invoke"], "<invoke>", "eval"), namespace)
            return _frame("ok", returned=True)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are no answers either
        return _frame("memory" if isinstance(error, MemoryError) else "runtime_error", error=_describe(error))
    return _call_all(job, namespace, output_bytes, codec)


def _call_all(job: dict[str, Any], namespace: dict[str, Any], output_bytes: int, codec: Any) -> bytes:
    entry = _compiled(job["entry"], "<entry>", "eval")
    answers: list[str] = []
    size = 0
    for args, kwargs in job["calls"]:
        try:
            function = eval(entry, namespace)
            value = function(*codec.from_wire(args, sys.maxsize), **codec.from_wire(kwargs, sys.maxsize))
            answers.append(json.dumps([codec.to_wire(value)]))  # now: a later call may change the object
        except BaseException as error:
            answers.append(json.dumps(_describe(error)))
        size += len(answers[-1]) + 2
        if size > output_bytes:
            break
    return f'{{"status": "ok", "outputs": [{", ".join(answers)}]}}'.encode()


def _compiled(source: str, name: str, mode: str) -> CodeType:
    return compile(source, name, mode, dont_inherit=True)


def _frame(status: str, **fields: Any) -> bytes:
    return json.dumps({"status": status, **fields}).encode()


def _describe(error: BaseException) -> dict[str, str]:
    try:
        message = str(error)[:160]
    except BaseException:
        message = "(its message raises)"
    return {"type": type(error).__name__[:80], "message": message}
