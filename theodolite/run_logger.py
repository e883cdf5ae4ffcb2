"""Metrics as lines of JSON in the run's own folder, written so that a resumed run leaves the file an uninterrupted one would.

``metrics.jsonl`` holds one object per call: ``{"step": 7, "loss": 0.25, ...}``. It is a function of config and seed alone, so two runs
can be compared with ``cmp``. Whatever is measured with a clock goes to ``timings.jsonl`` instead, line for line: the seconds since
the process started logging (``time_s``) and every metric whose name starts with ``time/``.

JSON has no number for infinity. A value that is not finite is written as ``null`` and named with its kind under ``nonfinite``:
``{"step": 8, "loss": null, "nonfinite": {"loss": "nan"}}``. So a reader that only knows JSON gets no number rather than a wrong one.
"""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from typing_extensions import override

from theodolite.provenance import write_text_atomic

TIMING_PREFIX = "time/"
"""Metrics of this prefix are seconds by a clock: never bit-equal, so they live in ``timings.jsonl``."""


def encode_row(step: int | None, metrics: Mapping[str, float | int | Tensor]) -> dict[str, Any]:
    """One row as plain data, sorted by name.

    Floats keep all their digits; values that are not finite become ``None`` and are named in ``nonfinite``.
    """
    values = {name: value.item() if isinstance(value, Tensor) else value for name, value in sorted(metrics.items())}
    strange = {name: str(value) for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    row = {"step": step} | {name: None if name in strange else value for name, value in values.items()}
    return row | ({"nonfinite": strange} if strange else {})


class RunLogger(Logger):
    """Appends every logged row to ``<run_dir>/metrics.jsonl`` and its timings to ``<run_dir>/timings.jsonl``; rank zero only.

    Each row is flushed, so a killed process loses none. Steps are Lightning's logging steps: batches, counted from 0. Checkpoints go to
    ``<run_dir>/checkpoints`` when this logger is the first.

    Args:
        run_dir: The run's own folder; made on the first row.
        name: Shown by Lightning; not part of any path when empty.
    """

    def __init__(self, run_dir: str, name: str = "") -> None:
        super().__init__()
        self._run_dir = Path(run_dir)
        self._name = name
        self._start = time.monotonic()

    @property
    @override
    def name(self) -> str:
        """The name given at construction."""
        return self._name

    @property
    @override
    def version(self) -> str:
        """Empty: the run's folder is the version."""
        return ""

    @property
    @override
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self._run_dir)

    @property
    @override
    def log_dir(self) -> str:
        """The run's folder."""
        return str(self._run_dir)

    @property
    def metrics_path(self) -> Path:
        """Where the rows are."""
        return self._run_dir / "metrics.jsonl"

    @property
    def timings_path(self) -> Path:
        """Where the clock readings are, one line per row of :attr:`metrics_path`."""
        return self._run_dir / "timings.jsonl"

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row to each file."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        timed = {name: value for name, value in metrics.items() if name.startswith(TIMING_PREFIX)}
        clock = {"time_s": round(time.monotonic() - self._start, 3)} | timed
        _append(self.timings_path, encode_row(step, clock))
        _append(self.metrics_path, encode_row(step, {name: value for name, value in metrics.items() if name not in timed}))

    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the resolved config lies beside the rows."""

    @rank_zero_only
    def truncate_after(self, step: int) -> None:
        """Drop every row beyond ``step``, as a run that was interrupted there must be continued."""
        for path in (self.metrics_path, self.timings_path):
            rows = _complete_lines(path)
            kept = [row for row in rows if (json.loads(row)["step"] or 0) <= step]
            if path.exists():
                write_text_atomic(path, "".join(kept))

    @rank_zero_only
    def keep_rows(self, count: int) -> None:
        """Keep the first ``count`` rows: exact where several rows share a step and a checkpoint was written between them."""
        for path in (self.metrics_path, self.timings_path):
            if path.exists():
                write_text_atomic(path, "".join(_complete_lines(path)[:count]))

    def row_count(self) -> int:
        """Complete rows in the file."""
        return len(_complete_lines(self.metrics_path))


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def _complete_lines(path: Path) -> list[str]:
    """Lines that end; a process killed while writing leaves a last one that does not."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
