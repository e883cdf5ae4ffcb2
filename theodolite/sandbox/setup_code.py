"""Setup code, taken apart on the trusted side: what a fork server can do once, ahead of time, and what every child has to do."""

from __future__ import annotations

import ast
import builtins
import itertools
import marshal
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from . import zygote
from .jobs import Job


@dataclass(frozen=True, slots=True)
class Setup:
    """Trusted setup code, taken apart and compiled once for all jobs that share it.

    Attributes:
        prelude: Its leading statements, as far as a zygote may run them before any fork; marshalled code, or empty.
        code: The rest, likewise.
        source: All of it, when it cannot be taken apart: the child then compiles it.
        defines: The prelude defines functions or classes; they belong to a module named ``solution``.
    """

    prelude: bytes = b""
    code: bytes = b""
    source: str = ""
    defines: bool = False


@lru_cache(maxsize=256)
def ways_to_set_up(source: str, modules: tuple[str, ...]) -> tuple[Setup, ...]:
    """How setup code can be run, what costs a child least first: definitions ahead of time, only imports ahead, nothing ahead.

    A statement is run ahead when it is an import of what the zygote holds anyway or defines something without computing anything, so that
    running it earlier, in the zygote, does no more than in the child (an import may fail: children then report that). The first other
    statement ends the prelude.

    Args:
        source: The code.
        modules: What every zygote has loaded.
    """
    whole = (Setup(source=source),)
    try:
        body = ast.parse(source).body
        compile(source, "<setup>", "exec", dont_inherit=True)  # finds more than the parser
        imports = _split(body, lambda statement: _imports_only(statement, modules))
        defined = _split(body, lambda statement: _imports_only(statement, modules) or _defines_only(statement), defines=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return whole
    return (imports, *whole) if imports.prelude == defined.prelude else (defined, imports, *whole)


def _split(body: list[ast.stmt], ahead: Callable[[ast.stmt], bool], defines: bool = False) -> Setup:
    leading = list(itertools.takewhile(ahead, body))
    return Setup(_marshalled(leading), _marshalled(body[len(leading) :]), defines=defines)


def _marshalled(statements: list[ast.stmt]) -> bytes:
    """The same bytes for the same statements, wherever they stood: preludes are told apart by them."""
    tree = ast.Module(statements, [])
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr | ast.arg | ast.keyword | ast.alias | ast.excepthandler):
            node.lineno = node.end_lineno = 1
            node.col_offset = node.end_col_offset = 0
    return marshal.dumps(compile(tree, "<setup>", "exec", dont_inherit=True), _WITHOUT_REFERENCES) if statements else b""


_WITHOUT_REFERENCES = 2
"""Version of the format whose bytes do not depend on what else refers to a constant."""


def _imports_only(statement: ast.stmt, modules: tuple[str, ...]) -> bool:
    if isinstance(statement, ast.Import):
        return all(alias.name in modules for alias in statement.names)
    return isinstance(statement, ast.ImportFrom) and statement.level == 0 and statement.module in modules


def _defines_only(statement: ast.stmt) -> bool:
    """A function, a class without bases, or a name for a literal; nothing that is evaluated on the way is more than a literal."""
    if isinstance(statement, ast.Assign):
        return all(map(_own_name, statement.targets)) and _literal(statement.value)
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.FunctionDef):
        return not statement.decorator_list and not getattr(statement, "type_params", []) and _plain_signature(statement)
    if isinstance(statement, ast.ClassDef):
        adorned = statement.decorator_list or statement.bases or statement.keywords or getattr(statement, "type_params", [])
        return not adorned and all(isinstance(inner, ast.Pass) or _defines_only(inner) for inner in statement.body)
    return False


def _own_name(target: ast.expr) -> bool:
    """Not ``__name__`` and the like, which Python or the runner reads."""
    return isinstance(target, ast.Name) and not target.id.startswith("__")


def _plain_signature(function: ast.FunctionDef) -> bool:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    annotations = [function.returns, *(one.annotation for one in named if one)]
    defaults = [*arguments.defaults, *arguments.kw_defaults]
    return all(map(_literal, filter(None, defaults))) and all(map(_type_name, filter(None, annotations)))


def _type_name(annotation: ast.expr) -> bool:
    """What an annotation may be: a constant (a string too) or the plain name of a built-in type."""
    known = isinstance(annotation, ast.Name) and isinstance(getattr(builtins, annotation.id, None), type)
    return known or isinstance(annotation, ast.Constant)


def _literal(value: ast.expr) -> bool:
    """A constant, a negative number, or ``float`` of a text such as ``"inf"``."""
    if isinstance(value, ast.UnaryOp):
        return isinstance(value.op, ast.USub) and isinstance(value.operand, ast.Constant) and type(value.operand.value) in (int, float)
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and ast.unparse(value) in _FLOATS
    return isinstance(value, ast.Constant)


_FLOATS = frozenset(f"float({sign + name!r})" for sign in ("", "-", "+") for name in ("inf", "Inf", "infinity", "nan"))


class Setups:
    """Says how each job is set up. Keeps count of the preludes: a zygote has room for :data:`zygote.MAX_PRELUDES`.

    Definitions may take half of it, so that problems with helpers of their own cannot crowd out the imports which all of them share.

    Args:
        modules: What every zygote has loaded.
    """

    def __init__(self, modules: tuple[str, ...]) -> None:
        self._modules = modules
        self._preludes: set[bytes] = set()

    def of(self, job: Job) -> Setup:
        """The cheapest way for which there is room."""
        if not job.setup_code:
            return Setup()
        for setup in ways_to_set_up(job.setup_code, self._modules):
            if not (setup.defines and job.as_main) and self._has_room(setup):
                if setup.prelude:
                    self._preludes.add(setup.prelude)
                return setup
        return Setup(source=job.setup_code)

    def _has_room(self, setup: Setup) -> bool:
        if not setup.prelude or setup.prelude in self._preludes:
            return True
        room = zygote.MAX_PRELUDES // 2 if setup.defines else zygote.MAX_PRELUDES
        return len(self._preludes) < room and len(setup.prelude) < zygote.PRELUDE_BYTES and len(setup.prelude) != zygote.REQUEST.size
