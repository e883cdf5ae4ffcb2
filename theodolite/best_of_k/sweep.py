"""Runs the stages of one sweep: candidates, greedy texts and scores of a module over a table. Every stage continues where it was."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from theodolite.best_of_k.candidates import Candidates, Drawing
from theodolite.best_of_k.scores import Scores
from theodolite.protocols import ActivationTable, TalkativeAutoencoder


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What a sweep draws.

    Attributes:
        ks: The K to report.
        n: Candidates per row; at least the largest K.
        drawing: Temperature, length and seed.
        rows: First rows of the table; None = all.
        generation_batch_size: Most texts decoded at once on one rank.
        rows_per_shard: Rows that an interruption can lose.
    """

    ks: tuple[int, ...]
    n: int
    drawing: Drawing
    rows: int | None = None
    generation_batch_size: int = 32
    rows_per_shard: int = 32

    def __post_init__(self) -> None:
        """Refuse what cannot be estimated."""
        if not self.ks or min(self.ks) < 1 or list(self.ks) != sorted(set(self.ks)):
            raise ValueError(f"k_values must be distinct, ascending and at least 1, got {list(self.ks)}.")
        if self.n < max(self.ks):
            raise ValueError(f"The best of {max(self.ks)} cannot be estimated from {self.n} candidates; draw at least as many.")
        if self.drawing.temperature == 0:
            raise ValueError("At temperature 0 all candidates are the same text; best-of-K needs a temperature above 0.")
        if min(self.generation_batch_size, self.rows_per_shard) < 1 or (self.rows is not None and self.rows < 1):
            raise ValueError("generation_batch_size, rows_per_shard and max_rows must be at least 1.")

    @property
    def grid(self) -> list[int]:
        """K for which selected residuals are kept: those asked for, and all powers of two, so that another choice among them is free."""
        return sorted({*self.ks, *(2**i for i in range(self.n.bit_length()) if 2**i <= self.n)})


@dataclass(slots=True)
class SweepScores:
    """What a sweep left on disk.

    Attributes:
        scores: Complete.
        seconds: Wall time of the stages.
    """

    scores: Scores
    seconds: dict[str, float] = field(default_factory=dict)


def run_stages(root: str | Path, table: ActivationTable, module: TalkativeAutoencoder, plan: SweepPlan, label: str = "") -> SweepScores:
    """Draw and score what is missing. All ranks must call it.

    Args:
        root: Folder of the stages' stores.
        table: The activations.
        module: Verbaliser and reconstructors.
        plan: What to draw.
        label: Shown beside the progress bars.

    Raises:
        ValueError: If the table has no row.
    """
    rows = len(table) if plan.rows is None else min(plan.rows, len(table))
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    sampled = Candidates(Path(root) / "candidates", table, module, plan.drawing, plan.rows_per_shard)
    sampled.draw(plan.n, rows, plan.generation_batch_size, f"candidates{label}")
    seconds["candidates"] = time.perf_counter() - start
    greedy = Candidates(Path(root) / "candidates", table, module, replace(plan.drawing, temperature=0.0), plan.rows_per_shard)
    greedy.draw(1, rows, plan.generation_batch_size, f"greedy texts{label}")
    seconds["greedy"] = time.perf_counter() - start - sum(seconds.values())
    scores = Scores(Path(root) / "scores", sampled, greedy, module.reconstructors, plan.n, rows, plan.grid)
    scores.score(f"scores{label}")
    seconds["scores"] = time.perf_counter() - start - sum(seconds.values())
    return SweepScores(scores, seconds)


def run_labels(checkpoints: Sequence[str], temperatures: Sequence[float]) -> dict[tuple[str | None, float], str]:
    """A short, distinct name for every checkpoint and temperature of a sweep: the parts of its path that the others do not share."""
    parts = [Path(path).with_suffix("").parts for path in checkpoints]
    while len(parts) > 1 and all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    while len(parts) > 1 and all(len(part) > 1 for part in parts) and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    distinct = ["-".join(part) for part in parts] if len(parts) > 1 else [part[-1] for part in parts]
    names: list[tuple[str | None, str]] = list(zip(checkpoints, distinct, strict=True)) or [(None, "")]
    return {(path, t): "-".join(filter(None, [name, f"t{t:g}"])) for path, name in names for t in temperatures}
