"""The vocabulary of leetcode-mini: list operations and reducers, each with its wordings, its line of code and its meaning.

The line of code and the meaning are written twice on purpose: the source is what a policy learns to write, the callable computes the
expected outputs, and a test holds one against the other.

The source lines are as short as clear Python allows, avoid digits where they can, and share their beginnings: completion tokens are what
a window of rollouts costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Values = list[int]


@dataclass(frozen=True, slots=True)
class Operation:
    """One step on a list of integers; ``{k}`` in a wording or in the source stands for its constant.

    Attributes:
        name: What composition keys are made of.
        kind: ``filter``, ``map`` or ``sequence``.
        wordings: Imperative phrases that a statement may use for it.
        source: The right-hand side of ``xs = ...``.
        apply: The meaning, ``apply(values, k)``.
    """

    name: str
    kind: Literal["filter", "map", "sequence"]
    wordings: tuple[str, ...]
    source: str
    apply: Callable[[Values, int], Values]

    @property
    def has_constant(self) -> bool:
        """Whether the operation takes a constant."""
        return "{k}" in self.source


@dataclass(frozen=True, slots=True)
class Reducer:
    """What is returned of the list that is left.

    Attributes:
        name: What composition keys are made of.
        wordings: Noun phrases that complete "Return ...".
        source: The expression after ``return``.
        apply: The meaning; always an ``int``, so that a list or ``None`` is never a right answer.
    """

    name: str
    wordings: tuple[str, ...]
    source: str
    apply: Callable[[Values], int]


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "multiples",
        "filter",
        ("keep multiples of {k}", "keep only values divisible by {k}", "drop everything not divisible by {k}"),
        "[x for x in xs if not x % {k}]",
        lambda xs, k: [x for x in xs if x % k == 0],
    ),
    Operation(
        "not_multiples",
        "filter",
        ("drop multiples of {k}", "remove values divisible by {k}"),
        "[x for x in xs if x % {k}]",
        lambda xs, k: [x for x in xs if x % k != 0],
    ),
    Operation(
        "above",
        "filter",
        ("keep values above {k}", "keep values greater than {k}", "drop values up to {k}"),
        "[x for x in xs if x > {k}]",
        lambda xs, k: [x for x in xs if x > k],
    ),
    Operation(
        "below",
        "filter",
        ("keep values below {k}", "keep values less than {k}"),
        "[x for x in xs if x < {k}]",
        lambda xs, k: [x for x in xs if x < k],
    ),
    Operation(
        "even",
        "filter",
        ("keep even values", "drop odd values"),
        "[x for x in xs if not x & 1]",
        lambda xs, _: [x for x in xs if x % 2 == 0],
    ),
    Operation(
        "odd",
        "filter",
        ("keep odd values", "drop even values"),
        "[x for x in xs if x & 1]",
        lambda xs, _: [x for x in xs if x % 2 == 1],
    ),
    Operation("add", "map", ("add {k} to each", "increase each by {k}"), "[x + {k} for x in xs]", lambda xs, k: [x + k for x in xs]),
    Operation(
        "subtract",
        "map",
        ("subtract {k} from each", "decrease each by {k}"),
        "[x - {k} for x in xs]",
        lambda xs, k: [x - k for x in xs],
    ),
    Operation(
        "multiply",
        "map",
        ("multiply each by {k}", "scale each by {k}"),
        "[x * {k} for x in xs]",
        lambda xs, k: [x * k for x in xs],
    ),
    Operation(
        "modulo",
        "map",
        ("take each modulo {k}", "replace each by its remainder modulo {k}"),
        "[x % {k} for x in xs]",
        lambda xs, k: [x % k for x in xs],
    ),
    Operation("square", "map", ("square each", "replace each by its square"), "[x * x for x in xs]", lambda xs, _: [x**2 for x in xs]),
    Operation("negate", "map", ("negate each", "flip the sign of each"), "[-x for x in xs]", lambda xs, _: [0 - x for x in xs]),
    Operation(
        "absolute",
        "map",
        ("take absolute values", "replace each by its absolute value", "drop the signs"),
        "[abs(x) for x in xs]",
        lambda xs, _: [max(x, -x) for x in xs],
    ),
    Operation("reverse", "sequence", ("reverse the list", "reverse the order"), "list(reversed(xs))", lambda xs, _: xs[::-1]),
    Operation("sort", "sequence", ("sort ascending", "sort from small to large"), "sorted(xs)", lambda xs, _: sorted(xs)),
    Operation("first", "sequence", ("take the first {k}", "keep only the first {k}"), "xs[:{k}]", lambda xs, k: xs[:k]),
    Operation("skip", "sequence", ("skip the first {k}", "drop the first {k}"), "xs[{k}:]", lambda xs, k: xs[k:]),
)
"""The 17 operations: 6 filters, 7 maps, 4 on the sequence."""

REDUCERS: tuple[Reducer, ...] = (
    Reducer("total", ("the total", "the sum"), "sum(xs)", lambda xs: sum(xs)),
    Reducer("count", ("how many are left", "the count"), "len(xs)", lambda xs: len(xs)),
    Reducer(
        "largest",
        ("the largest or zero", "the maximum or zero"),
        "max(xs, default=0)",
        lambda xs: sorted(xs)[-1] if xs else 0,
    ),
    Reducer(
        "smallest",
        ("the smallest or zero", "the minimum or zero"),
        "min(xs, default=0)",
        lambda xs: sorted(xs)[0] if xs else 0,
    ),
    Reducer("leading", ("the first or zero", "the first element or zero"), "next(iter(xs), 0)", lambda xs: xs[0] if xs else 0),
    Reducer("trailing", ("the last or zero", "the last element or zero"), "xs[-1] if xs else 0", lambda xs: xs[-1] if xs else 0),
    Reducer("distinct", ("how many distinct values", "the number of distinct values"), "len(set(xs))", lambda xs: len(dict.fromkeys(xs))),
    Reducer(
        "spread",
        ("the largest minus the smallest or zero", "the range or zero"),
        "max(xs) - min(xs) if xs else 0",
        lambda xs: sorted(xs)[-1] - sorted(xs)[0] if xs else 0,
    ),
)
"""The 8 reducers; "or zero" says what an empty list gives."""

CONSTANTS: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9)
"""Single digits, so that a constant is one token."""
