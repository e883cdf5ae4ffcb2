"""Weak detectors of a concept: they see what a monitor would see of a rollout, never the oracle's verdict."""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from theodolite.protocols import Rollout

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class RolloutDetector(ABC):
    """Flags rollouts that show the concept."""

    @abstractmethod
    def check(self, trainer: Any, pl_module: Any) -> None:
        """Raise, in one sentence, what would make it fail; called before training."""

    @abstractmethod
    def fit(self, trainer: Any, pl_module: Any) -> None:
        """Learn on known examples at the start of a fresh fit (not called on resume)."""

    @abstractmethod
    def flags(self, trainer: Any, pl_module: Any, rollouts: Sequence[Rollout]) -> list[bool]:
        """Whether each rollout shows the concept."""

    def metrics(self) -> dict[str, float]:
        """Numbers to log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What was learnt: plain numbers, strings, lists and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional)
        """Take back :meth:`state_dict`."""


class TextDetector(RolloutDetector):
    """A predicate on the completion's text alone.

    Args:
        detector: See :func:`text_detector`.
    """

    def __init__(self, detector: str) -> None:
        self._flagged = text_detector(detector)

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Nothing to check: the constructor has."""

    def fit(self, trainer: Any, pl_module: Any) -> None:
        """Nothing to learn."""

    def flags(self, trainer: Any, pl_module: Any, rollouts: Sequence[Rollout]) -> list[bool]:
        """The predicate on each text."""
        return [self._flagged(rollout.text) for rollout in rollouts]


def text_detector(detector: str) -> Callable[[str], bool]:
    r"""A predicate on text from a dotted path to a callable (``package.module.function``) or a regular expression (anything else).

    Raises:
        ValueError: The path cannot be imported, or the expression does not compile. Write ``a[.]b`` for an expression that looks like a
            path.
    """
    if _DOTTED.fullmatch(detector):
        module, _, name = detector.rpartition(".")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"detector={detector!r} looks like a path to a callable but cannot be imported: {error}.") from error
        if not callable(function):
            raise ValueError(f"detector={detector!r} is not callable: name a function that takes a text and returns a bool.")
        return partial(_called, function)
    try:
        pattern = re.compile(detector)
    except re.error as error:
        raise ValueError(f"detector={detector!r} is not a regular expression: {error}.") from error
    return partial(_found, pattern)


def _called(function: Callable[[str], Any], text: str) -> bool:
    """A user's predicate (a module-level function, so that the callback can be sent to spawned ranks)."""
    return bool(function(text))


def _found(pattern: re.Pattern[str], text: str) -> bool:
    """Whether the expression occurs."""
    return pattern.search(text) is not None
