"""Work that many processes share, shard by shard: who does which, how far it is, and what happens when one of them fails."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from theodolite.distributed import gather_objects, world_size

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 60.0
"""Where there is no terminal (a job's log), progress is a line from time to time."""


class ShardWorkError(RuntimeError):
    """A process failed while others worked on other shards."""


def this_rank() -> int:
    """This process's number in the default group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def agreed(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank: what is missing must be asked once, before anyone writes. All ranks must call it.

    Raises:
        ShardWorkError: If rank 0 failed, on the others; nobody waits for it.
        Exception: Whatever ``make`` raised, on rank 0.
    """
    value: Any = None
    error: Exception | None = None
    if this_rank() == 0:
        try:
            value = make()
        except Exception as raised:  # every rank has to hear of it
            error = raised
    found, failure = gather_objects((value, None if error is None else f"{type(error).__name__}: {error}"))[0]
    if error is not None:
        raise error
    if failure is not None:
        raise ShardWorkError(f"rank 0 failed ({failure}).")
    return found


def work_through(shards: Sequence[int], write: Callable[[int], None], what: str) -> None:
    """Write shards, rank r of W taking every W-th. All ranks must call it with the same list; all return when the last is done.

    Args:
        shards: What is missing, the same on every rank (:func:`agreed`).
        write: Writes one shard; called on one rank for each.
        what: Shown beside the progress bar.

    Raises:
        ShardWorkError: If another rank failed; the shards that were written stay.
        Exception: Whatever ``write`` raised on this rank.
    """
    error: Exception | None = None
    mine = list(shards)[this_rank() :: world_size()]
    try:
        with progress(what, len(mine)) as advance:
            for shard in mine:
                write(shard)
                advance()
    except Exception as raised:  # every rank has to hear of it, else the others would wait for this one
        error = raised
    failures = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [f"rank {rank} ({failure})" for rank, failure in enumerate(failures) if failure is not None]
    if failed:
        raise ShardWorkError(f"{what} stopped: {'; '.join(failed)}. What was written stays; run the same command again to go on.")


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar with elapsed and remaining time on rank 0's terminal, or a line a minute in a log; nothing where nothing is to do."""
    if this_rank() or not total:
        yield lambda: None
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)
    else:
        yield _Lines(what, total)


class _Lines:
    """Progress as lines of text."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.start = self.last = time.monotonic()

    def __call__(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.done < self.total and now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        remaining = (now - self.start) / self.done * (self.total - self.done)
        print(f"{self.what}: {self.done}/{self.total}, {now - self.start:.0f} s, about {remaining:.0f} s left", file=sys.stderr, flush=True)
