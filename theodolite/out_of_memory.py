"""Run a function over rows in parts that fit into memory: on out-of-memory the parts are halved, and neither results nor order change."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class FittingParts:
    """Remembers how many rows fit, so that a halving is paid for once.

    The function must give a row the same result whatever rows it is computed with, and must not draw from a global generator.

    Args:
        rows_per_part: Rows to try first.
        remedy: What to say where one row alone does not fit.

    Attributes:
        rows_per_part: Rows that have fitted so far.
        halvings: How often memory ran out.

    Raises:
        ValueError: Less than one row.
    """

    def __init__(self, rows_per_part: int, remedy: str = "use shorter rows, a smaller model, or a larger device") -> None:
        if rows_per_part < 1:
            raise ValueError(f"rows_per_part must be at least 1, got {rows_per_part}.")
        self.rows_per_part, self.halvings, self.remedy = rows_per_part, 0, remedy

    def map(self, function: Callable[[slice], T], rows: int) -> list[T]:
        """Results for consecutive slices of ``range(rows)``, in order; a slice that did not fit is tried again in halves.

        Raises:
            RuntimeError: One row alone does not fit.
        """
        results: list[T] = []
        start = 0
        while start < rows:
            part = slice(start, min(rows, start + self.rows_per_part))
            try:
                results.append(function(part))
                start = part.stop
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if part.stop - part.start == 1:
                    raise RuntimeError(f"Row {start} does not fit into memory even alone: {self.remedy}. ({error})") from error
            # outside the handler, because the error's traceback keeps the failed attempt's tensors alive
            self._halve(part.stop - part.start)
        return results

    def _halve(self, failed: int) -> None:
        self.rows_per_part, self.halvings = failed // 2, self.halvings + 1
        _LOG.warning("Out of memory with %d rows at once; going on with %d.", failed, self.rows_per_part)
        release_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was what was missing, on any device: CPU allocators raise a plain ``RuntimeError``."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text or "not enough memory" in text)


def release_memory() -> None:
    """Drop garbage and give cached blocks back, before a smaller attempt."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
