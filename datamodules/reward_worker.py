"""The process in which reward functions run: one JSON request per line in, one JSON answer per line out.

    python -m theodolite.datamodules.reward_worker package.module.function ...

What the functions print goes to standard error. An exception becomes an answer; nothing a function does reaches the trainer's process.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any


def load(path: str) -> Callable[..., Any]:
    """The function that a dotted path names.

    Raises:
        ValueError: There is none.
    """
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"The reward function {path!r} cannot be imported: {error}.") from error
    if not callable(function):
        raise ValueError(f"The reward function {path!r} is a {type(function).__name__}, which cannot be called.")
    return function


def answer(function: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """Call one function; its numbers (None = says nothing), or why there are none."""
    try:
        values = function(prompts=request["prompts"], completions=request["completions"], **request["columns"])
        numbers = [None if value is None else float(value) for value in values]
        if len(numbers) != len(request["completions"]):
            return {"error": f"{len(numbers)} rewards for {len(request['completions'])} completions"}
        return {"rewards": [None if number is not None and number != number else number for number in numbers]}
    except Exception as error:  # whatever it is, the trainer has to hear of it
        return {"error": f"{type(error).__name__}: {error}"}


def main(paths: Sequence[str]) -> None:
    """Serve until standard input closes."""
    replies, sys.stdout = sys.stdout, sys.stderr
    functions = {path: load(path) for path in paths}
    for line in sys.stdin:
        request = json.loads(line)
        replies.write(json.dumps(answer(functions[request["function"]], request)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
