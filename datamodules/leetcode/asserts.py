"""Tests as data: an assert is split into a call and the value it must return, and values are compared outside the program's process."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from itertools import repeat
from typing import Any

from .problem import TestCase

_NAMES = {"inf": math.inf, "nan": math.nan}
_MAX_DEPTH = 100


def parse_assert(source: str) -> TestCase:
    """Split ``assert f(literals) == literal`` into a call and its expected value.

    Literals are numbers (negative ones too), strings, bytes, booleans, ``None``, ``inf``, ``nan``, ``float('inf')`` and its relatives,
    and lists, tuples, sets and dicts of literals. What is called is not looked at: the problem's ``entry`` says that.

    Args:
        source: One assert statement.

    Raises:
        ValueError: It is not such a statement; the message says why.
    """
    compare = _comparison(source)
    call = compare.left
    if not isinstance(call, ast.Call):
        raise ValueError(f"the left side of == is not a call: {_shown(source)}")
    if any(isinstance(arg, ast.Starred) for arg in call.args) or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError(f"the call unpacks its arguments: {_shown(source)}")
    try:
        args = tuple(_literal(arg) for arg in call.args)
        kwargs = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
        return TestCase(args, kwargs, _literal(compare.comparators[0]))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{error}: {_shown(source)}") from error


def entry_of(source: str) -> str:
    """The called expression of an assert, e.g. ``Solution().twoSum``. Raises ``ValueError`` like :func:`parse_assert`."""
    left = _comparison(source).left
    if not isinstance(left, ast.Call):
        raise ValueError(f"the left side of == is not a call: {_shown(source)}")
    return ast.unparse(left.func)


def _comparison(source: str) -> ast.Compare:
    try:
        body = ast.parse(source.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"does not parse ({type(error).__name__}): {_shown(source)}") from error
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise ValueError(f"is not one assert statement: {_shown(source)}")
    test = body[0].test
    if not isinstance(test, ast.Compare) or len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq):
        raise ValueError(f"does not assert one equality: {_shown(source)}")
    return test


def _literal(node: ast.expr, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH - 2:  # the call and its list of arguments are two more
        raise ValueError(f"a value nested more than {_MAX_DEPTH - 2} deep")
    if isinstance(node, ast.Constant) and node.value is not Ellipsis and not isinstance(node.value, complex):
        return node.value
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _literal(node.operand, depth)
        if type(value) in (int, float):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.List):
        return [_literal(e, depth + 1) for e in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(e, depth + 1) for e in node.elts)
    if isinstance(node, ast.Set):
        return {_literal(e, depth + 1) for e in node.elts}
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_literal(k, depth + 1): _literal(v, depth + 1) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, ast.Call):
        return _special_float(node)
    if isinstance(node, ast.Attribute) and ast.unparse(node) in ("math.inf", "math.nan"):
        return _NAMES[node.attr]
    raise ValueError(f"not a literal: {_shown(ast.unparse(node))}")


def _special_float(node: ast.Call) -> Any:
    """``float('inf')`` and its relatives, and the empty ``set()``."""
    name = node.func.id if isinstance(node.func, ast.Name) and not node.keywords else None
    if name == "set" and not node.args:
        return set()
    if name == "float" and len(node.args) == 1 and isinstance(node.args[0], ast.Constant):
        return float(str(node.args[0].value))
    raise ValueError(f"not a literal: {_shown(ast.unparse(node))}")


def _shown(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def strict_equal(expected: Any, actual: Any) -> bool:
    """``actual`` is what a correct program returns.

    The policy, stricter than ``==`` in what a type is and equal to it in what a number is:

    * Types must be the same at every level, dict keys and set members included: ``True`` is not ``1``, ``1.0`` is not ``1``, a tuple is not
      a list, and a value of any other type (a subclass too) equals nothing.
    * Floats are compared exactly, without tolerance. ``-0.0`` equals ``0.0``. NaN equals NaN, since a program can do no better.
    * Integers have any size. The order of dict entries and set members does not matter; the order of lists and tuples does.
    * Containers nested more than 100 deep are unequal.

    Args:
        expected: Trusted value.
        actual: Value decoded from the sandbox (plain types only).
    """
    return _equal(expected, actual, 0)


_EXACT = frozenset({int, bool, str, bytes, type(None)})
"""Types of which ``==`` says all."""


def _equal(expected: Any, actual: Any, depth: int) -> bool:
    kind = type(expected)
    if kind is not type(actual) or depth > _MAX_DEPTH:
        return False
    if kind in _EXACT:
        return expected == actual
    if kind is float:
        return expected == actual or (math.isnan(expected) and math.isnan(actual))
    if kind in (list, tuple):
        return _equal_members(expected, actual, depth)
    if kind is dict:
        typed = {_typed(key, depth): value for key, value in actual.items()}
        return len(expected) == len(actual) and all(
            (k := _typed(key, depth)) in typed and _equal(value, typed[k], depth + 1) for key, value in expected.items()
        )
    return kind in (set, frozenset) and {_typed(e, depth) for e in expected} == {_typed(a, depth) for a in actual}


def _equal_members(expected: Sequence[Any], actual: Sequence[Any], depth: int) -> bool:
    """Of two lists or two tuples; without a Python call per member where ``==`` will do."""
    kinds = list(map(type, expected))
    if kinds != list(map(type, actual)):
        return False
    if depth < _MAX_DEPTH and _EXACT.issuperset(kinds):
        return expected == actual
    return all(map(_equal, expected, actual, repeat(depth + 1)))


def _typed(key: Any, depth: int) -> Any:
    """A hashable stand-in for a dict key or set member that is equal only to one of the same types (NaN equal to NaN)."""
    if depth > _MAX_DEPTH:
        return object()
    if isinstance(key, tuple):
        return (tuple, *(_typed(k, depth + 1) for k in key))
    if isinstance(key, frozenset):
        return (frozenset, frozenset(_typed(k, depth + 1) for k in key))
    return (type(key), "nan" if isinstance(key, float) and math.isnan(key) else key)
