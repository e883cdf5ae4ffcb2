"""What a Trainer iterates over: an endless shuffled training stream cut into nominal epochs, and a fixed set of held-out token rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from theodolite.protocols import ActivationBatch

from ..text.packing import TokenRow
from .paired_rows import PairedRows
from .shuffled_lanes import ShuffledLanes


class StreamLoader:
    """Training batches. Its state is the stream's and the place in the nominal epoch, the same on every rank.

    It has a length on purpose: of loaders without one Lightning draws a batch ahead, which a checkpoint would then skip.

    Args:
        lanes: The stream.
        batch_size: Rows over all ranks.
        steps_per_epoch: Batches until Lightning calls it an epoch; the stream goes on in the next.
    """

    def __init__(self, lanes: ShuffledLanes, batch_size: int, steps_per_epoch: int) -> None:
        self.lanes, self.batch_size, self.steps_per_epoch = lanes, batch_size, steps_per_epoch
        self._done, self._resume_at = 0, 0

    def __len__(self) -> int:
        """Batches per epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[ActivationBatch]:
        """The rest of the epoch after a resume, else a whole one.

        Raises:
            RuntimeError: The text has ended.
        """
        start, self._resume_at = self._resume_at % self.steps_per_epoch, 0
        for step in range(start, self.steps_per_epoch):
            try:
                rows = self.lanes.take(self.batch_size)
            except StopIteration as end:
                raise RuntimeError(
                    f"The text ended after {step} batches of the epoch: give more text, train fewer steps, or set data.repeat: true."
                ) from end
            self._done = step + 1
            yield rows.batch()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return {"done": self._resume_at or self._done, "stream": self.lanes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self._resume_at = state["done"]
        self.lanes.load_state_dict(state["stream"])


class HeldOutLoader:
    """The same held-out token rows every time, in order; rank r of W gets the rows r, r + W, ... of each batch.

    Nothing is repeated or dropped; a rank's share of the last batch may be empty.

    Args:
        rows: All of them, the same on every rank.
        produce: Makes activations.
        batch_rows: Token rows per batch over all ranks.
        rank: This rank.
        ranks: W.
    """

    def __init__(
        self, rows: Sequence[TokenRow], produce: Callable[[Sequence[TokenRow]], PairedRows], batch_rows: int, rank: int, ranks: int
    ) -> None:
        self.rows, self.produce, self.batch_rows, self.rank, self.ranks = rows, produce, batch_rows, rank, ranks

    def __len__(self) -> int:
        """Batches, the same on every rank."""
        return -(-len(self.rows) // self.batch_rows)

    def __iter__(self) -> Iterator[ActivationBatch]:
        """This rank's shares."""
        for start in range(0, len(self.rows), self.batch_rows):
            share = self.rows[start : start + self.batch_rows][self.rank :: self.ranks]
            yield (self.produce(share) if share else self.produce(self.rows[:1]).select(slice(0, 0))).batch()


class Background:
    """One thread that makes the next round while this one is trained on; on a GPU, in a stream of its own.

    Args:
        device: Of the producer.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="activations")
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Start it, and return how to wait for it."""
        future: Future[Any] = self.pool.submit(self._run, function)
        return future.result

    def close(self) -> None:
        """Wait for what runs, and end the thread."""
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, function: Callable[[], Any]) -> Any:
        if self.stream is None:
            return function()
        with torch.cuda.stream(self.stream):
            result = function()
        # its memory is used by the training stream next, which must not find it half written
        self.stream.synchronize()
        return result
