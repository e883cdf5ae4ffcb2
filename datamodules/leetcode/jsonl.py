"""Real LeetCode problems: rows of a JSONL file, or of ``newfacade/LeetCodeDataset`` on the Hugging Face hub.

A JSONL row needs these keys (others are ignored):

* ``id``;
* ``prompt``: chat messages of which the last is the user's;
* ``gt_answer``: a list of ``assert Solution().method(name=literal, ...) == literal``;
* ``func_name``: e.g. ``Solution().method``;
* ``setup_code``: imports and helpers that run before a program;
* ``canonical_solution``: source of a correct ``class Solution``;
* ``difficulty``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from theodolite.protocols import Chat

from .asserts import parse_assert
from .problem import Problem, TestCase
from .prompts import VISIBLE_TESTS, apply_hint, build_chat, check_hint, evaluator_name, shown_evaluator

COLUMNS: dict[str, type | tuple[type, ...]] = {
    "id": (int, str),
    "prompt": list,
    "gt_answer": list,
    "func_name": str,
    "setup_code": str,
    "canonical_solution": str,
    "difficulty": str,
}
"""Keys of a JSONL row and their types."""

HUB_COLUMNS: tuple[str, ...] = (
    "task_id",
    "question_id",
    "difficulty",
    "problem_description",
    "starter_code",
    "prompt",
    "completion",
    "entry_point",
    "test",
)
"""Columns of ``newfacade/LeetCodeDataset`` that are used; its ``prompt`` is the code of imports, not a prompt."""


@dataclass(frozen=True, slots=True)
class Row:
    """One problem before a hint is chosen.

    Attributes:
        id: Stable name.
        chat: Prompt without hint; the last message is the user's.
        entry: Expression that names the callable under test.
        setup_code: Imports and helpers that run before a program.
        solution: Source of a correct ``class Solution``.
        difficulty: As the data set says.
        tests: The tests that could be parsed.
        dropped_tests: Position and reason of each test that could not.
        shown_asserts: Source of the first tests, as far as a hint may show them.
    """

    id: str
    chat: Chat
    entry: str
    setup_code: str
    solution: str
    difficulty: str
    tests: tuple[TestCase, ...]
    dropped_tests: tuple[tuple[int, str], ...]
    shown_asserts: tuple[str, ...] = ()


def parse_tests(asserts: Iterable[Any], entry: str) -> tuple[tuple[TestCase, ...], tuple[tuple[int, str], ...]]:
    """Turn assert statements into tests; a bad one costs only itself.

    Returns:
        The tests, and ``(position, reason)`` of each statement that is not ``assert entry(literals) == literal``.
    """
    tests, dropped = [], []
    for position, source in enumerate(asserts):
        try:
            if not isinstance(source, str):
                raise ValueError(f"is a {type(source).__name__} instead of a string")
            if not source.lstrip().startswith(f"assert {entry}("):
                raise ValueError(f"does not start with 'assert {entry}('")
            tests.append(parse_assert(source))
        except ValueError as error:
            dropped.append((position, str(error)))
    return tuple(tests), tuple(dropped)


def parse_row(row: Mapping[str, Any], prompted: bool = True) -> Row:
    """Check one decoded JSONL row and parse its tests.

    Args:
        row: The row.
        prompted: The prompt will be shown to a policy, so the hints must fit it.

    Raises:
        ValueError: If a key is missing or of the wrong type, or no test is left.
    """
    for name, kind in COLUMNS.items():
        if name not in row:
            raise ValueError(f"the key {name!r} is missing; a row needs {', '.join(COLUMNS)}")
        if not isinstance(row[name], kind):
            raise ValueError(f"the key {name!r} holds a {type(row[name]).__name__} instead of a {_type_name(kind)}")
    return _make_row(
        identifier=str(row["id"]),
        chat=[{"role": str(message["role"]), "content": str(message["content"])} for message in _messages(row["prompt"])],
        entry=row["func_name"],
        setup_code=row["setup_code"],
        solution=row["canonical_solution"],
        difficulty=row["difficulty"],
        asserts=row["gt_answer"],
        prompted=prompted,
    )


def parse_hub_row(row: Mapping[str, Any]) -> Row:
    """Convert one row of ``newfacade/LeetCodeDataset``.

    Its ``test`` column is the source of ``def check(candidate)`` with one assert per line. Lines that are no such assert (the data set
    stores some error messages as expected outputs) are dropped as tests and recorded.

    Raises:
        ValueError: If a column is missing, or no test is left.
    """
    for name in HUB_COLUMNS:
        if name not in row:
            raise ValueError(f"the column {name!r} is missing; newfacade/LeetCodeDataset has {', '.join(HUB_COLUMNS)}")
    entry = str(row["entry_point"])
    lines = [line.strip() for line in str(row["test"]).splitlines()]
    asserts = [line for line in lines if line and not line.startswith(("def check(", "#"))]
    return _make_row(
        identifier=str(row["task_id"]),
        chat=build_chat(str(row["problem_description"]), str(row["starter_code"]), entry.rsplit(".", 1)[-1]),
        entry=entry,
        setup_code=str(row["prompt"]),
        solution=str(row["completion"]).strip(),
        difficulty=str(row["difficulty"]).lower(),
        asserts=[line.replace("assert candidate(", f"assert {entry}(", 1) for line in asserts],
    )


def _make_row(
    identifier: str,
    chat: Chat,
    entry: str,
    setup_code: str,
    solution: str,
    difficulty: str,
    asserts: Iterable[str],
    prompted: bool = True,
) -> Row:
    asserts = list(asserts)
    tests, dropped = parse_tests(asserts, entry)
    if not tests:
        reason = f"; the first fails because it {dropped[0][1]}" if dropped else ""
        raise ValueError(f"problem {identifier} has no usable test ({len(dropped)} were dropped{reason})")
    if prompted:
        apply_hint(chat[-1]["content"], "none", None)  # a prompt that no hint fits fails here
    unusable = {position for position, _ in dropped}
    kept = (source for position, source in enumerate(asserts) if position not in unusable)
    return Row(identifier, chat, entry, setup_code, solution, difficulty, tests, dropped, tuple(islice(kept, VISIBLE_TESTS)))


def _messages(prompt: list[Any]) -> list[Mapping[str, Any]]:
    good = all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt)
    if not (prompt and good and prompt[-1]["role"] == "user"):
        raise ValueError("the key 'prompt' must be a list of {role, content} messages that ends with the user's")
    return prompt


def _type_name(kind: type | tuple[type, ...]) -> str:
    return " or ".join(part.__name__ for part in kind) if isinstance(kind, tuple) else kind.__name__


def hinted_chat(row: Row, hint: str) -> Chat:
    """A row's prompt under a hint. Raises ``ValueError`` when the hint does not fit the prompt; names the problem."""
    name = evaluator_name(hint, row.id)
    shown = shown_evaluator(name, row.shown_asserts) if name and check_hint(hint).shows else None
    try:
        user = apply_hint(row.chat[-1]["content"], hint, name, shown)
    except ValueError as error:
        raise ValueError(f"problem {row.id}, hint {hint}: {error}") from error
    return [*row.chat[:-1], {"role": "user", "content": user}]


def make_problem(row: Row, hint: str, prompted: bool = True) -> Problem:
    """Build the problem that a policy sees under a hint.

    Args:
        row: The problem without hint.
        hint: A key of :data:`~theodolite.datamodules.leetcode.prompts.HINTS`.
        prompted: Put the hint into the prompt; grading alone only needs the evaluator's name.
    """
    name = evaluator_name(hint, row.id)
    shown = shown_evaluator(name, row.shown_asserts) if name and check_hint(hint).shows else None
    return Problem(
        id=row.id,
        prompt=hinted_chat(row, hint) if prompted else row.chat,
        entry=row.entry,
        tests=row.tests,
        reference=f"```python\n{row.solution}\n```",
        evaluator=name,
        style="fenced",
        setup_code=row.setup_code,
        visible=len(row.shown_asserts) if shown else None,
        shown=shown,
        metadata={"hint": hint, "difficulty": row.difficulty, "dropped_tests": row.dropped_tests},
    )


def read_jsonl(path: str | Path) -> list[Row]:
    """Read a file of problems.

    Raises:
        ValueError: If a line is not JSON, a row is malformed, or an id repeats; the message names the line.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no problem file {path}; give the path of a .jsonl file, 'mini', or 'hf:newfacade/LeetCodeDataset'."
        )
    rows: list[Row] = []
    seen: dict[str, int] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = parse_row(decode_line(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}.") from error
            if row.id in seen:
                raise ValueError(f"{path}, line {number}: the id {row.id} was already used on line {seen[row.id]}; ids must be unique.")
            seen[row.id] = number
            rows.append(row)
    return rows


def decode_line(line: str) -> dict[str, Any]:
    """One line of a JSONL file as an object. Raises ``ValueError`` with one short sentence when it is none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON that can be read (nested too deep, or a number too long)") from error
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__} instead of an object")
    return row


def read_hub(name: str, split: str) -> list[Row]:
    """Load a data set with the columns of ``newfacade/LeetCodeDataset`` from the Hugging Face hub.

    Rows of which no test is usable are left out, with a warning that counts them.

    Raises:
        ValueError: If a column is missing, or the data set or split has no usable problem.
    """
    import datasets
    from lightning.pytorch.utilities import rank_zero_warn

    table = datasets.load_dataset(name, split=split)
    missing = [column for column in HUB_COLUMNS if column not in (table.column_names or [])]  # type: ignore[operator]
    if missing:
        raise ValueError(f"The data set {name} lacks the columns {', '.join(missing)}; it needs those of newfacade/LeetCodeDataset.")
    rows, unusable = [], []
    for raw in table:
        try:
            rows.append(parse_hub_row(raw))  # type: ignore[arg-type]
        except ValueError as error:
            unusable.append(str(error))
    if not rows:
        raise ValueError(f"The data set {name} has no usable problem in split {split!r}.")
    if unusable:
        rank_zero_warn(f"{len(unusable)} of {len(unusable) + len(rows)} problems of {name} are unusable; the first: {unusable[0]}.")
    return rows
