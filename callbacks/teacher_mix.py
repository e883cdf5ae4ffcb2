r"""Teacher mix: replay rollouts of a policy that hacks already among those of one that does not yet.

A hack that the base policy writes once in a thousand samples takes a long run to emerge. Replaying a few of an earlier run brings it out in
tens of steps, at the price of a question: does the policy learn to hack, or to imitate? So every replayed row is flagged by its ``source``,
the policy's own numbers leave it out, and its importance ratio is taken against the log-probabilities that its author recorded when it
sampled the tokens, never set to 1.

The pool is the rollout tables of an earlier run (``completions/*.parquet``)::

    theodolite fit --config configs/grpo/mini.yaml --config configs/grpo/arms/vanilla.yaml --model.table_every=1 \
        --seed_everything=0 --run_dir runs/teacher-0 --model.policy=...

Only rollouts of the same prompt, token for token, are replayed, so the earlier run must have drawn the same training problems: same seed,
same data. What is replayed is a function of seed, step and the prompt's place in the global batch.

The window's metrics get ``teacher/coverage``, the share of groups that got a replayed rollout; ``train/<source>/reward_mean`` and
``train/foreign_fraction`` are the module's own.
"""

from __future__ import annotations

import glob
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch import Callback, LightningModule, Trainer

from theodolite.callbacks.detectors import text_detector
from theodolite.protocols import Reward, TokenSequence, Window
from theodolite.replay import POLICY, replace_rollout
from theodolite.seeds import derive_seed, run_seed

COLUMNS = (
    *("problem", "completion", "finish", "reward", "passed", "compiles", "source"),
    *("prompt_ids", "completion_ids", "sampler_log_probs"),
)
"""What a table must have; every run's ``completions/*.parquet`` does."""


@dataclass(frozen=True, slots=True)
class PoolRow:
    """One rollout of an earlier run."""

    tokens: TokenSequence
    text: str
    log_probs: tuple[float, ...]
    reward: Reward
    finish: str


class TeacherMix(Callback):
    """Put replayed rollouts in the place of each group's last ones.

    Put it before callbacks that look at rollouts or rewards, so that they see what is trained on.

    Args:
        pool: Folder of tables, a table, or a glob pattern; ``{seed}`` stands for the seed.
        per_group: Rollouts replaced per group (as many as the pool has for the prompt).
        select: Regular expression or dotted path of a callable on text: which rewarded rollouts of the pool are replayed. It never sees the
            oracle's labels.
        until_step: From this optimizer step on nothing is replayed; null = to the end.
        source: Name under which replayed rows are counted.
        seed: Of the choice among rows; None = the run's ``seed_everything``.

    Raises:
        ValueError: A setting out of range.
    """

    def __init__(
        self,
        pool: str,
        per_group: int = 1,
        select: str = "run_tests",
        until_step: int | None = None,
        source: str = "teacher",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if per_group < 1 or (until_step is not None and until_step < 1):
            raise ValueError(f"per_group={per_group} and until_step={until_step} must be at least 1.")
        if source == POLICY or not source.isidentifier():
            raise ValueError(f"source={source!r} must be a name other than {POLICY!r}: it tells replayed rollouts from the policy's own.")
        self.pool, self.per_group, self.until_step, self.source, self.seed = pool, per_group, until_step, source, run_seed(seed)
        self._selected = text_detector(select)
        self._rows: dict[str, list[PoolRow]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the pool.

        Raises:
            ValueError: There is no table, one lacks a column, or no row is selected.
        """
        if stage == "fit":
            self._rows = read_pool(self.pool.replace("{seed}", str(self.seed)), self._selected)

    def on_rollouts(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        """Replace rollouts, group by group.

        Raises:
            ValueError: The pool's group size leaves nothing of the policy's own, or it was made with other prompts.
        """
        if self.until_step is not None and window.step >= self.until_step:
            return
        if self.per_group >= window.group_size:
            raise ValueError(f"per_group={self.per_group} of {window.group_size} rollouts leaves the policy none of its own; lower it.")
        mixed = sum(self._mix(window, group) for group in range(len(window.rows)))
        window.metrics[f"{self.source}/coverage"] = (float(mixed), float(len(window.rows)))

    def _mix(self, window: Window, group: int) -> bool:
        """Replace the last rollouts of one group; whether there was anything to replay."""
        first = group * window.group_size
        one = window.rollouts[first]
        rows = self._rows.get(one.problem, [])
        if any(row.tokens.prompt_ids != one.tokens.prompt_ids for row in rows):
            raise ValueError(
                f"The pool's prompt of problem {one.problem!r} is not this run's, token for token: make the pool with the same tokenizer, "
                "hint and inoculation."
            )
        rng = random.Random(derive_seed("teacher mix", self.seed, window.step, one.slot))
        chosen = rng.sample(rows, min(self.per_group, len(rows)))
        for place, row in enumerate(chosen, start=1):
            last = first + window.group_size - place
            replace_rollout(window, last, row.tokens, row.text, row.log_probs, row.reward, self.source, row.finish)
        return bool(chosen)


def read_pool(pattern: str, selected: Any) -> dict[str, list[PoolRow]]:
    """Rewarded rollouts of earlier policies, by problem, in an order that depends on the tables' content and names alone.

    Args:
        pattern: Folder of tables, a table, or a glob pattern.
        selected: Predicate on the completion's text.

    Raises:
        ValueError: There is no table, one lacks a column, or no row is selected.
    """
    paths = _tables(pattern)
    if not paths:
        raise ValueError(
            f"There is no rollout table at {pattern}: train the teacher with model.table_every=1 and name its completions folder."
        )
    pool: dict[str, list[PoolRow]] = {}
    for path in paths:
        frame = pd.read_parquet(path)
        missing = [name for name in COLUMNS if name not in frame.columns]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}: a pool is made of completions/*.parquet of a GRPO run.")
        for row in frame.to_dict("records"):
            if row["source"] == POLICY and row["passed"] and selected(row["completion"]):
                pool.setdefault(row["problem"], []).append(_pool_row(row))
    if not pool:
        raise ValueError(f"None of the rewarded rollouts in {pattern} is selected: lower the bar in `select`, or train the teacher longer.")
    return pool


def _tables(pattern: str) -> Sequence[Path]:
    path = Path(pattern)
    if path.is_dir():
        return sorted(path.glob("*.parquet"))
    return [path] if path.is_file() else sorted(Path(found) for found in glob.glob(pattern))


def _pool_row(row: Any) -> PoolRow:
    tokens = TokenSequence(tuple(map(int, row["prompt_ids"])), tuple(map(int, row["completion_ids"])))
    reward = Reward(float(row["reward"]), bool(row["passed"]), bool(row["compiles"]))
    return PoolRow(tokens, row["completion"], tuple(map(float, row["sampler_log_probs"])), reward, row["finish"])
