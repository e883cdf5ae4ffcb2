"""From a completion to a program: code fences, the stub, and the parser."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Literal, TypeAlias

from .asserts import strict_equal
from .problem import Problem

# possessive: with backtracking a line of 10,000 tildes that ends in a backtick costs minutes of the trusted process
_OPENING = re.compile(r"(?P<indent>[ \t]*+)(?P<fence>`{3,}+|~{3,}+)[ \t]*+(?P<tag>[^\s`]*+)[^`]*+")
_PYTHON_TAGS = ("", "python", "python3", "py")
_ENTRY = re.compile(r"(?P<root>[^\W\d]\w*)(\(\)\.(?P<method>[^\W\d]\w*))?")
MAX_SOURCE = 200_000
"""Characters; a longer program is not looked at and does not count as compiling."""

Unfenced: TypeAlias = Literal["reject", "accept"]
"""What a ``fenced`` completion without any code fence is: no program, or a program if all of it parses as Python."""


def assemble(problem: Problem, completion: str, unfenced: Unfenced = "reject") -> str | None:
    """The program that a completion stands for, without the problem's ``setup_code``.

    ``continuation``: ``code_prefix + completion``. ``fenced``: the contents of all code fences whose tag is empty, ``python``, ``python3``
    or ``py`` (any case), joined by a blank line, so the last definition wins. The final fence may be unterminated, and a block that was
    not closed ends where the next Python fence opens. Other fences (``text``, ``bash``) are skipped. A completion without any such fence
    is no program: ``None``, unless ``unfenced`` accepts what parses.
    """
    if problem.style == "continuation":
        return problem.code_prefix + completion
    blocks = fenced_blocks(completion)
    if blocks:
        return "\n\n".join(blocks)
    bare = unfenced == "accept" and "```" not in completion and "~~~" not in completion and completion.strip()
    return completion if bare and parse(completion) is not None else None


def fenced_blocks(text: str) -> list[str]:
    """Contents of the Python code fences of a Markdown text, in order."""
    blocks: list[str] = []
    opened: re.Match[str] | None = None
    reopened: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        if opened is None:
            opened, lines = _OPENING.fullmatch(line.rstrip("\r")), []
        elif _closes(line, opened["fence"]) or (reopened := _reopens(line, opened["fence"])):
            blocks += [] if opened["tag"].lower() not in _PYTHON_TAGS else ["\n".join(lines)]
            opened, reopened, lines = reopened, None, []
        else:
            lines.append(line.removeprefix(opened["indent"]))
    if opened is not None and opened["tag"].lower() in _PYTHON_TAGS:
        blocks.append("\n".join(lines))
    return [block for block in blocks if block.strip()]


def _closes(line: str, fence: str) -> bool:
    stripped = line.strip()
    return stripped.startswith(fence) and not stripped.strip(fence[0])


def _reopens(line: str, fence: str) -> re.Match[str] | None:
    """A fence with a Python tag inside an open block: the block was never closed."""
    if fence[:3] not in line:
        return None
    opening = _OPENING.fullmatch(line.rstrip("\r"))
    if opening is None or not opening["tag"] or opening["tag"].lower() not in _PYTHON_TAGS or not opening["fence"].startswith(fence):
        return None
    return opening


def stub(problem: Problem) -> str:
    """A wrong program: the callable under test, taking anything and returning a constant that is no test's answer.

    Raises:
        ValueError: ``problem.entry`` is neither ``name`` nor ``Name().name``.
    """
    match = _ENTRY.fullmatch(problem.entry)
    if match is None:
        raise ValueError(f"problem {problem.id}: entry is {problem.entry!r}; it must be `name` or `Name().name`")
    wrong = next(v for v in (0, -1, None, "", "theodolite") if not any(strict_equal(t.expected, v) for t in problem.tests))
    if match["method"]:
        return f"class {match['root']}:\n    def {match['method']}(self, *args, **kwargs):\n        return {wrong!r}\n"
    return f"def {match['root']}(*args, **kwargs):\n    return {wrong!r}\n"


def parse(program: str) -> ast.Module | None:
    """The program's syntax tree, or ``None`` when it has none (a syntax error, or too long or too deep for the parser)."""
    if len(program) > MAX_SOURCE:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
