"""The process in which reward functions run: one JSON request per line in, one JSON answer per line out.

    python -m theodolite.datamodules.reward_worker package.module.function ...

What the functions print goes to standard error. An exception becomes an answer; nothing a function does reaches the trainer's process.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def name_of(path: str) -> str:
    """The function's own name: what follows the last ``:`` or dot."""
    return path.rpartition(":")[2].rpartition(".")[2]


def load(path: str) -> Callable[..., Any]:
    """The function that ``package.module.function`` or ``path/to/file.py:function`` names.

    Raises:
        ValueError: There is none.
    """
    try:
        function = getattr(
            _file(path.rpartition(":")[0]) if ":" in path else importlib.import_module(path.rpartition(".")[0]), name_of(path)
        )
    except Exception as error:  # a file of someone else may fail in any way
        raise ValueError(f"The reward function {path!r} cannot be imported: {error}.") from error
    if not callable(function):
        raise ValueError(f"The reward function {path!r} is a {type(function).__name__}, which cannot be called.")
    return function


def _file(path: str) -> ModuleType:
    """The module of a file, run under a name of its own that others find it by: dataclasses and pickles look their module up."""
    digest = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"rewards_of_{Path(path).stem}_{digest}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(module.__name__, None)
        raise
    return module


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
