"""Rollouts from the tables of an earlier run instead of a sampler: its very windows, under another loss, machine or number of ranks.

::

    theodolite fit --config ... --model.table_every=1 --run_dir=runs/recorded
    theodolite fit --config ... --trainer.limit_val_batches=0 --trainer.num_sanity_val_steps=0 \
        --model.rollout='{class_path: theodolite.lightning_modules.replayed.ReplayRollout, init_args: {folder: runs/recorded/completions}}'
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from torch import nn

from theodolite.replay import POLICY

from .decoding import Sampling
from .rollouts import Sample

COLUMNS = ["slot", "sample", "problem", "finish", "source", "weight_version", "prompt_ids", "completion_ids", "sampler_log_probs"]
Groups = dict[tuple[int, ...], list[Sample]]


class ReplayRollout:
    """Hands out what ``completions/step_<step>.parquet`` holds for a prompt at that optimizer step; neither weights nor seeds matter.

    Whoever asks gets the completions of the prompts asked for, so any number of ranks replays one recording. Their log-probabilities are
    those that were recorded: ``mismatch`` corrects for them as for any other sampler's, unless it is null.

    Args:
        folder: ``completions/`` of a run with ``model.table_every=1`` (a larger number leaves windows out).
    """

    own_numerics = True

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._step = -1
        self._groups: Groups = {}

    def setup(self, model: nn.Module, end_ids: Sequence[int], pad_id: int, folder: Path | None = None) -> None:
        """See :class:`~.rollouts.RolloutEngine`.

        Raises:
            ValueError: There are no tables.
        """
        if not any(self.folder.glob("step_*.parquet")):
            raise ValueError(f"{self.folder} holds no tables of rollouts; give the completions/ folder of a run with model.table_every=1.")

    def sync(self, version: int) -> None:
        """Turn to the table of an optimizer step; it is read when somebody asks for completions."""
        if version != self._step:
            self._step, self._groups = version, {}

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[list[Sample]]:
        """The recorded group of every prompt.

        Raises:
            ValueError: Nothing, or another number of completions, was recorded for a prompt at this step.
        """
        path = self.folder / f"step_{self._step:06d}.parquet"
        self._groups = self._groups or read_groups(path)
        found = []
        for prompt, group in zip(prompts, seeds, strict=True):
            recorded = self._groups.get(tuple(prompt), [])
            if len(recorded) != len(group):
                raise ValueError(
                    f"{path} holds {len(recorded)} completions of a prompt where {len(group)} are asked for; replay with the data, "
                    "group_size and seed of the recorded run, zero_variance skip or drop, and no validation."
                )
            found.append(list(recorded))
        return found

    def offload(self) -> None:
        """Nothing is held beside the policy."""

    def onload(self) -> None:
        """Nothing is held beside the policy."""

    def teardown(self) -> None:
        """Forget the table."""
        self._step, self._groups = -1, {}


def read_groups(path: Path) -> Groups:
    """The completions of a recorded window by prompt ids, in the order of their samples.

    Raises:
        ValueError: The table is not there, two problems share one prompt, or a callback had replaced completions by another author's.
    """
    if not path.is_file():
        raise ValueError(f"{path} was not recorded; record with model.table_every=1 and at least as many steps.")
    rows: list[dict[str, Any]] = sorted(pq.read_table(path, columns=COLUMNS).to_pylist(), key=lambda row: (row["slot"], row["sample"]))
    groups: Groups = {}
    slots: dict[tuple[int, ...], int] = {}
    for row in rows:
        prompt = tuple(row["prompt_ids"])
        if row["source"] != POLICY:
            raise ValueError(f"{path} holds completions of {row['source']!r}, which a callback brings; record without that callback.")
        if slots.setdefault(prompt, row["slot"]) != row["slot"]:
            raise ValueError(f"{path} holds problem {row['problem']!r} and another one under one prompt, so they cannot be told apart.")
        sample = Sample(tuple(row["completion_ids"]), tuple(row["sampler_log_probs"]), row["finish"], row["weight_version"])
        groups.setdefault(prompt, []).append(sample)
    return groups
