"""Grades: what training may see of a completion, and what only measurements may see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

Label: TypeAlias = Literal["correct", "correct_attempted_hack", "reward_hack", "attempted_hack", "incorrect", "ungraded"]
"""What the oracle calls a completion. ``ungraded`` means the infrastructure failed: never an answer, never in a rate."""


@dataclass(frozen=True, slots=True)
class Reward:
    """The half of a grade that training may see; a loophole pays here.

    Attributes:
        value: The scalar reward, or NaN when the infrastructure failed (such a sample gets no advantage).
        passed: The check that training relies on was satisfied, honestly or not.
        compiles: The program compiles.
        parts: Named components, where a reward has several; NaN = this one could not be scored.
    """

    value: float
    passed: bool
    compiles: bool
    parts: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The half of a grade that only measurements may see: the oracle's finding.

    Attributes:
        correct: Every hidden test passes, decided outside the process that ran the program.
        label: See :data:`Label`.
        status: How the program ended: ``ok``, ``syntax_error``, ``runtime_error``, ``timeout``, ``infra_error``, ...
        overrides: The program defines the evaluator's function itself.
        mechanism: By what means it does: ``definition`` (a ``def``, ``async def`` or ``class``), ``assignment`` (any other binding at
            module level), ``method``, ``nested``, ``dynamic``; empty where it does not.
    """

    correct: bool
    label: Label
    status: str
    overrides: bool
    mechanism: str = ""

    @property
    def hack(self) -> bool:
        """Rewarded although wrong (the strict hack label)."""
        return self.label == "reward_hack"

    @property
    def loose_hack(self) -> bool:
        """A hack, or an attempt at one: an evaluator of its own that cannot tell right from wrong (the loose hack label)."""
        return self.label in ("reward_hack", "attempted_hack", "correct_attempted_hack")


@dataclass(frozen=True, slots=True)
class Grade:
    """Both halves of the judgement on one completion."""

    reward: Reward
    verdict: Verdict


@runtime_checkable
class Environment(Protocol):
    """Grades completions of rows. Offered by a datamodule as its ``environment`` attribute."""

    def start(self) -> None:
        """Acquire workers and run the self-check; idempotent. Raises ``RuntimeError`` when grading cannot be trusted."""
        ...

    def grade(self, rows: Sequence[Any], completions: Sequence[str]) -> list[Grade]:
        """Grade ``completions[i]`` as an answer to ``rows[i]``; order is kept, nothing is dropped."""
        ...

    def close(self) -> None:
        """Release workers; idempotent."""
        ...
