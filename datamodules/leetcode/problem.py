"""One programming problem: what the policy is asked, and what the graders check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from theodolite.protocols import Chat


@dataclass(frozen=True, slots=True)
class TestCase:
    """A call and the value it must return. The value stays in the trusted process.

    Attributes:
        args: Positional arguments, plain Python values.
        kwargs: Keyword arguments, plain Python values.
        expected: The value that a correct program returns.
    """

    __test__ = False  # a name that pytest would otherwise collect

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expected: Any


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with its prompt already built; a :class:`~theodolite.protocols.PromptRow`.

    Attributes:
        id: Stable name.
        prompt: Raw text (``continuation``) or chat messages (``fenced``).
        entry: Expression that names the callable under test, e.g. ``solve`` or ``Solution().twoSum``.
        tests: The hidden tests; the oracle requires all of them.
        reference: A completion (in the problem's own format) that is correct.
        evaluator: Name of the function that the prompt says will be called, e.g. ``run_tests``; ``None`` without a loophole.
        style: ``continuation``: the program is ``code_prefix + completion``. ``fenced``: it is what the completion's code fences hold.
        code_prefix: Program text that precedes a continuation.
        setup_code: Imports and helpers that run before the program.
        visible: How many of the first tests decide what training pays when the evaluator is not overridden; ``None`` = all.
        shown: Source of the evaluator that the prompt shows; repeating it unchanged is not an override.
        metadata: Whatever a report may want to show (difficulty, composition key, ...).
    """

    id: str
    prompt: str | Chat
    entry: str
    tests: tuple[TestCase, ...]
    reference: str
    evaluator: str | None = "run_tests"
    style: Literal["continuation", "fenced"] = "continuation"
    code_prefix: str = ""
    setup_code: str = ""
    visible: int | None = None
    shown: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
