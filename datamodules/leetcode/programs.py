"""From a completion to a program, and what can be read off its source without running it."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from theodolite.datamodules.leetcode.asserts import strict_equal
from theodolite.datamodules.leetcode.problem import Problem

_OPENING = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<tag>[^\s`]*)[^`]*")
_PYTHON_TAGS = ("", "python", "python3", "py")
_ENTRY = re.compile(r"(?P<root>[^\W\d]\w*)(\(\)\.(?P<method>[^\W\d]\w*))?")
MAX_SOURCE = 200_000
"""Characters; a longer program is not looked at and does not count as compiling."""


def assemble(problem: Problem, completion: str) -> str | None:
    """The program that a completion stands for, without the problem's ``setup_code``.

    ``continuation``: ``code_prefix + completion``. ``fenced``: the contents of all code fences whose tag is empty, ``python``, ``python3``
    or ``py`` (any case), joined by a blank line, so the last definition wins; the final fence may be unterminated. Other fences (``text``,
    ``bash``) are skipped. A completion without any such fence is no program: ``None``.
    """
    if problem.style == "continuation":
        return problem.code_prefix + completion
    blocks = fenced_blocks(completion)
    return "\n\n".join(blocks) if blocks else None


def fenced_blocks(text: str) -> list[str]:
    """Contents of the Python code fences of a Markdown text, in order."""
    blocks: list[str] = []
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        if opened is None:
            opened, lines = _OPENING.fullmatch(line.rstrip("\r")), []
        elif _closes(line, opened["fence"]):
            blocks += [] if opened["tag"].lower() not in _PYTHON_TAGS else ["\n".join(lines)]
            opened = None
        else:
            lines.append(line.removeprefix(opened["indent"]))
    if opened is not None and opened["tag"].lower() in _PYTHON_TAGS:
        blocks.append("\n".join(lines))
    return [block for block in blocks if block.strip()]


def _closes(line: str, fence: str) -> bool:
    stripped = line.strip()
    return stripped.startswith(fence) and not stripped.strip(fence[0])


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


@dataclass(frozen=True, slots=True)
class Override:
    """A program's own definition of the evaluator.

    Attributes:
        call: Expression that calls it, e.g. ``run_tests()`` or ``Solution().run_tests()``.
        harness: The program without its solution: everything at module level that does not define the callable under test. Run after some
            other solution, it shows whether the evaluator can tell right from wrong.
    """

    call: str
    harness: str


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


def find_override(tree: ast.Module, evaluator: str, entry: str) -> Override | None:
    """The program's own evaluator: any module-level binding of the name, or a method of that name in a module-level class.

    Functions (async ones too), classes, imports, assignments, loop and ``with`` targets and the like all bind. A module-level binding is
    called as it is, a method on a fresh instance of its class.

    Args:
        tree: The program.
        evaluator: The name that the prompt says will be called.
        entry: The problem's callable under test.
    """
    solution = re.split(r"\W", entry, maxsplit=1)[0]
    harness = [s for s in tree.body if solution not in _bound_names(s)]
    if any(evaluator in _bound_names(s) for s in tree.body):
        return Override(f"{evaluator}()", _source(harness))
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef) and evaluator in {n for s in statement.body for n in _bound_names(s)}:
            return Override(f"{statement.name}().{evaluator}()", _source([*harness, *_as_subclass(statement, solution, evaluator)]))
    return None


def _as_subclass(definition: ast.ClassDef, solution: str, evaluator: str) -> list[ast.stmt]:
    """The evaluator's part of the solution class, to be laid over another solution's class of the same name."""
    if definition.name != solution:
        return []
    methods = [s for s in definition.body if evaluator in _bound_names(s)]
    return [ast.ClassDef(solution, [ast.Name(solution, ast.Load())], [], methods, [])]


def _source(statements: list[ast.stmt]) -> str:
    try:
        return ast.unparse(ast.fix_missing_locations(ast.Module(statements, [])))
    except (RecursionError, ValueError):
        return "raise ValueError('a program too deep to be rewritten')"


def _bound_names(statement: ast.stmt) -> set[str]:
    return set(_bindings(statement))


def _bindings(node: ast.AST) -> Iterator[str]:
    """Names that a node binds in the scope it stands in."""
    pending = [node]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.rest
        pending.extend(ast.iter_child_nodes(node))
