r"""An endless shuffle of a stream of rows that is a function of row numbers alone: the same on any number of ranks and after a resume.

The stream of token rows is dealt to V *lanes*, token row ``i`` to lane ``i % V``; rank r of W owns the lanes ``r, r + W, ...``. Every
global batch takes equally many rows from each lane, so its content does not depend on W, and no rank computes another's activations.

Inside a lane a row is delayed: the row of the lane's n-th token row is given out in order of :math:`n + w u`, with u uniform in [0, 1)
from a hash of its number and w the window. Each row is given out exactly once, at most w token rows late. The buffer needs no random
state, and can be filled again from the last w token rows. Token rows come in rounds of w/2 per lane, for all lanes at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from theodolite.functional.row_sample import sample_keys
from theodolite.seeds import derive_seed

from ..text.packing import PackedRows, TokenRow
from .paired_rows import Drop, PairedRows, join_rows, numbers_of

ROUNDS_BACK = 2
"""A round's rows may still be given out this many rounds later: the window is two rounds long."""


class Lane:
    """One lane's rows: those that wait for later rounds, and what earlier rounds have given out and no batch has taken yet.

    Attributes:
        chunk: Round whose output is taken from now.
        offset: Rows of it that have been taken.
    """

    def __init__(self, rows_per_round: int, seed: int) -> None:
        self.rows_per_round, self.seed = rows_per_round, seed
        self.chunk, self.offset = 0, 0
        self._waiting: PairedRows | None = None
        self._waiting_keys = torch.zeros(0, dtype=torch.float64)
        self._ready: deque[PairedRows] = deque()

    def add_round(self, number: int, rows: PairedRows, order: Tensor) -> None:
        """Take in a round.

        Args:
            number: Of the round.
            rows: The lane's rows of it.
            order: Each row's token row, counted within the lane from the start of the stream.
        """
        delay = sample_keys(rows.row, self.seed).double() / 2.0**63
        keys = torch.cat([self._waiting_keys, order.double() + 2 * self.rows_per_round * delay])
        together = rows if self._waiting is None else join_rows([self._waiting, rows])
        now = keys < (number + 1) * self.rows_per_round
        going = now.nonzero()[:, 0]
        going = going[keys[going].argsort(stable=True)]
        staying = (~now).nonzero()[:, 0]
        if number >= self.chunk:
            self._ready.append(together.select(going))
        self._waiting, self._waiting_keys = together.select(staying), keys[staying]

    @property
    def available(self) -> int:
        """Rows that can be taken."""
        return sum(len(rows) for rows in self._ready) - self.offset

    def take(self, count: int) -> PairedRows:
        """The next rows; ``count`` must not exceed what is available."""
        parts = []
        while count:
            first = self._ready[0]
            part = first.select(slice(self.offset, self.offset + count))
            parts.append(part)
            count -= len(part)
            self.offset += len(part)
            if self.offset == len(first):
                self._ready.popleft()
                self.chunk, self.offset = self.chunk + 1, 0
        return join_rows(parts)


class ShuffledLanes:
    """All lanes of a run, this rank's with activations.

    Args:
        text: The token rows; read by this object only.
        produce: Makes activations of token rows.
        lanes: V.
        rank: This rank.
        ranks: W, a divisor of V.
        window: Token rows over all lanes that are mixed with one another: the buffer, in token rows.
        drop: Positions that do not count.
        seed: Of the order.
        in_background: Runs a function elsewhere and returns how to wait for its result; used to make the next round ahead of time.

    Raises:
        ValueError: Numbers that do not fit.
    """

    def __init__(
        self, text: PackedRows, produce: Callable[[Sequence[TokenRow]], PairedRows], lanes: int, rank: int, ranks: int, window: int,
        drop: Sequence[Drop], seed: int, in_background: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None,
    ) -> None:  # fmt: skip
        if lanes % ranks:
            raise ValueError(f"data.lanes={lanes} must be a multiple of the {ranks} ranks; {-(-lanes // ranks) * ranks} is.")
        if window < 2 * lanes or window % (2 * lanes):
            nearest = max(1, round(window / (2 * lanes))) * 2 * lanes
            raise ValueError(f"data.buffer_rows={window} must be a multiple of twice the {lanes} lanes; {nearest} is.")
        self.text, self.produce, self.rank, self.ranks, self.drop = text, produce, rank, ranks, drop
        self.per_round = window // (2 * lanes)
        seed = derive_seed("shuffled lanes", seed) % 2**31
        self.lanes = [Lane(self.per_round, seed) for _ in range(lanes)]
        self.in_background = in_background or (lambda function: _later(function))
        self._round = 0
        self._snapshots: dict[int, dict[str, Any]] = {}
        self._next: Callable[[], Any] | None = None

    def take(self, rows: int) -> PairedRows:
        """This rank's share of the next ``rows`` global rows: row i of it has the global slot ``rank + i * ranks``.

        Raises:
            ValueError: ``rows`` is no multiple of the lanes.
            StopIteration: The text has ended.
        """
        each = rows // len(self.lanes)
        if rows % len(self.lanes):
            raise ValueError(f"A global batch of {rows} rows does not split over {len(self.lanes)} lanes.")
        while min(lane.available for lane in self.lanes) < each:
            self._advance()
        taken = [lane.take(each) for lane in self.lanes]
        own = taken[self.rank :: self.ranks]
        together = join_rows(own)
        interleaved = torch.arange(len(together)).view(len(own), each).t().reshape(-1)
        return together.select(interleaved)

    def state_dict(self) -> dict[str, Any]:
        """Where all lanes stand, as plain data: the same on every rank, and good for any number of them."""
        first = self._first_needed()
        text = self._snapshots.get(first) or self.text.state_dict()
        return {
            "round": first,
            "text": text,
            "lanes": [[lane.chunk, lane.offset] for lane in self.lanes],
            "rows_per_round": self.per_round,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Fill the buffer again as it was.

        Raises:
            ValueError: The state has other lanes or another window.
        """
        if len(state["lanes"]) != len(self.lanes) or state["rows_per_round"] != self.per_round:
            raise ValueError(
                f"The checkpoint was made with {len(state['lanes'])} lanes and {state['rows_per_round'] * 2 * len(state['lanes'])} buffer "
                f"rows, this run has {len(self.lanes)} and {self.per_round * 2 * len(self.lanes)}; resume with the same."
            )
        if self._next is not None:
            self._next()  # it still reads the text
        self._next, self._snapshots, self._round = None, {}, state["round"]
        self.text.load_state_dict(state["text"])
        self.lanes = [Lane(lane.rows_per_round, lane.seed) for lane in self.lanes]
        for lane, (chunk, offset) in zip(self.lanes, state["lanes"], strict=True):
            lane.chunk, lane.offset = chunk, offset

    def _first_needed(self) -> int:
        return max(0, min(lane.chunk for lane in self.lanes) - ROUNDS_BACK)

    def _advance(self) -> None:
        """Bring in the next round, and start on the one after it."""
        wait = self._next or self.in_background(self._make_round)
        self._next = None
        snapshot, shares = wait()
        number, self._round = self._round, self._round + 1
        self._snapshots[number] = snapshot
        for lane, (rows, order) in zip(self.lanes, shares, strict=True):
            lane.add_round(number, rows, order)
        for old in [key for key in self._snapshots if key < self._first_needed()]:
            del self._snapshots[old]
        self._next = self.in_background(self._make_round)

    def _make_round(self) -> tuple[dict[str, Any], list[tuple[PairedRows, Tensor]]]:
        """Read the next token rows of all lanes, and compute this rank's."""
        snapshot, count = self.text.state_dict(), len(self.lanes)
        rows = [next(self.text) for _ in range(self.per_round * count)]
        mine = [row for row in rows if row.number % count % self.ranks == self.rank]
        produced = self.produce(mine)
        shares = []
        for lane in range(count):
            theirs = [row for row in rows if row.number % count == lane]
            numbers = numbers_of(theirs, self.drop)
            if lane % self.ranks == self.rank:
                owner = produced.row // len(rows[0].tokens) % count
                numbers = produced.select((owner == lane).nonzero()[:, 0])
            shares.append((numbers, numbers.row // len(rows[0].tokens) // count))
        return snapshot, shares


def _later(function: Callable[[], Any]) -> Callable[[], Any]:
    """Not ahead of time: when it is waited for."""
    return function
