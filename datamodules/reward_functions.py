"""Plain reward functions, with TRL's signature, as an environment: ``f(prompts, completions, **columns) -> list[float | None]``."""

from __future__ import annotations

import json
import logging
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from theodolite.protocols import Grade, Reward, Verdict

from .reward_worker import load, name_of

logger = logging.getLogger(__name__)


class RewardFunctions:
    """An :class:`~theodolite.protocols.Environment` made of functions that are named by import path.

    They run in a process of their own, one after the other. ``None`` means that a function says nothing about a completion: the sum is
    taken over the others. A function that raises or exceeds its time makes every reward of that call NaN (no advantage, status
    ``reward_error`` or ``reward_timeout``), which is logged; a process that hangs is killed and started again for the next call.

    Columns are the fields of the rows besides ``id`` and ``prompt``; they must be plain data. With chat prompts a completion is handed over
    as ``[{"role": "assistant", "content": text}]``.

    Args:
        functions: Import paths, e.g. ``my_rewards.length`` or ``path/to/my_rewards.py:length``. Their names differ: rewards are logged by
            them.
        weights: One per function; None = 1 each.
        passes_at: Reward from which a completion counts as passed.
        oracle: Import path of a function of the same signature whose truthy values mean *correct*: only measured, never trained on. None =
            what passes is taken for correct.
        timeout_s: Seconds per function and call.

    Raises:
        ValueError: A function cannot be imported, two have one name, or weights do not match.
    """

    def __init__(
        self,
        functions: Sequence[str],
        weights: Sequence[float] | None = None,
        passes_at: float = 1.0,
        oracle: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self.functions, self.oracle, self.passes_at, self.timeout_s = list(functions), oracle, passes_at, timeout_s
        self.weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if not self.functions or len(self.weights) != len(self.functions):
            raise ValueError(
                f"{len(self.functions)} reward functions came with {len(self.weights)} weights; give at least one, and as many."
            )
        self.names = [name_of(path) for path in self.functions]
        if len(set(self.names)) < len(self.names):
            raise ValueError(
                f"Two of the reward functions {', '.join(self.functions)} have the same name; rewards are logged by it, rename one."
            )
        for path in [*self.functions, *([oracle] if oracle else [])]:
            load(path)
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[str] = queue.Queue()

    def described(self) -> dict[str, Any]:
        """Functions, weights and oracle as plain data, for a manifest."""
        return {"functions": self.functions, "weights": self.weights, "passes_at": self.passes_at, "oracle": self.oracle}

    def start(self) -> None:
        """Start the process; idempotent."""
        if self._process is None or self._process.poll() is not None:
            paths = [*self.functions, *([self.oracle] if self.oracle else [])]
            command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {_SERVE}", *paths]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._replies = queue.Queue()
            threading.Thread(target=_read, args=(self._process, self._replies), daemon=True, name="reward functions").start()

    def close(self) -> None:
        """End the process; idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def grade(self, rows: Sequence[Any], completions: Sequence[str]) -> list[Grade]:
        """See :class:`~theodolite.protocols.Environment`."""
        if not rows:
            return []
        found: list[list[float | None] | str] = [self._ask(path, rows, completions) for path in self.functions]
        correct = self._ask(self.oracle, rows, completions) if self.oracle else None
        answers: list[list[float | str | None]] = [[a if isinstance(a, str) else a[i] for a in found] for i in range(len(rows))]
        return [self._grade(answer, correct, i) for i, answer in enumerate(answers)]

    def _grade(self, answers: Sequence[float | str | None], correct: list[float | None] | str | None, i: int) -> Grade:
        parts = {name: _number(answer) for name, answer in zip(self.names, answers, strict=True)}
        status = next((answer for answer in answers if isinstance(answer, str)), None)
        scored = [weight * value for weight, value in zip(self.weights, parts.values(), strict=True) if value == value]
        value = sum(scored) if scored and status is None else float("nan")
        passed = value >= self.passes_at
        if value != value or isinstance(correct, str):
            failed = status or (correct if isinstance(correct, str) else "not_scored")
            return Grade(Reward(value, False, True, parts), Verdict(False, "ungraded", failed, False))
        right = passed if correct is None else bool(correct[i])
        label = "correct" if right else "reward_hack" if passed else "incorrect"
        return Grade(Reward(value, passed, True, parts), Verdict(right, label, "ok", False))

    def _ask(self, path: str, rows: Sequence[Any], completions: Sequence[str]) -> list[float | None] | str:
        """Rewards of one function, or the status of a failure."""
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        texts = [
            text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, completions, strict=True)
        ]
        request = {"function": path, "prompts": [row.prompt for row in rows], "completions": texts, "columns": _columns(rows)}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = json.loads(self._replies.get(timeout=self.timeout_s) or '{"error": "the process ended"}')
        except queue.Empty:
            logger.warning("The reward function %s took longer than %s s: its process is ended, nothing is rewarded.", path, self.timeout_s)
            self.close()
            return "reward_timeout"
        except BrokenPipeError:
            reply = {"error": "the process ended"}
        if "error" in reply:
            logger.warning("The reward function %s failed (%s): nothing is rewarded.", path, reply["error"])
            return "reward_error"
        return reply["rewards"]


_SERVE = "from theodolite.datamodules.reward_worker import main; main(sys.argv[1:])"


def _read(process: subprocess.Popen[str], replies: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        replies.put(line)
    replies.put("")


def _columns(rows: Sequence[Any]) -> dict[str, list[Any]]:
    fields = [asdict(row) if is_dataclass(row) and not isinstance(row, type) else dict(vars(row)) for row in rows]
    return {name: [field[name] for field in fields] for name in fields[0] if name not in ("id", "prompt")}


def _number(answer: float | str | None) -> float:
    return answer if isinstance(answer, float) else float("nan")
