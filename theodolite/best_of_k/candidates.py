"""Stage 2: N candidate texts per activation, drawn once and kept.

A text is named by (row id, candidate index, temperature, length, seed, verbaliser), so it is the same in any batch, on any rank, and
whether it was drawn for N = 8 or later for N = 64. Texts are stored in blocks of :data:`BLOCK` candidates by shards of rows: raising N or
the number of rows draws only what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from theodolite.out_of_memory import FittingParts
from theodolite.protocols import ActivationRows, ActivationTable, Verbaliser
from theodolite.row_shards import Field, RowShards
from theodolite.shard_work import agreed, work_through

BLOCK = 16
"""Candidates per stored block."""
FIELDS = {"id": Field("json"), "texts": Field("json")}


@dataclass(frozen=True, slots=True)
class Drawing:
    """How candidates are drawn.

    Attributes:
        temperature: Of sampling; 0 = greedy.
        max_new_tokens: Longest text.
        seed: Names the random streams.
    """

    temperature: float
    max_new_tokens: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if self.temperature < 0 or self.max_new_tokens < 1:
            given = f"{self.temperature} and {self.max_new_tokens}"
            raise ValueError(f"temperature must be at least 0 and max_new_tokens at least 1, got {given}.")


class Candidates:
    """The texts of one verbaliser about one table.

    Args:
        root: Folder of stores.
        table: The activations.
        verbaliser: Writes the texts.
        drawing: How.
        rows_per_shard: Rows that are drawn, and kept or lost, together.
    """

    def __init__(
        self, root: str | Path, table: ActivationTable, verbaliser: Verbaliser, drawing: Drawing, rows_per_shard: int = 32
    ) -> None:
        self.root, self.table, self.verbaliser, self.drawing = Path(root), table, verbaliser, drawing
        self.rows_per_shard = rows_per_shard
        self._chosen: dict[tuple[int, int], list[tuple[range, RowShards]]] = {}
        self.key: dict[str, Any] = {
            "kind": "candidate texts",
            "rows": dict(table.key),
            "verbaliser": verbaliser.fingerprint(),
            **asdict(drawing),
        }

    def draw(self, n: int, rows: int, batch_size: int, what: str = "candidates") -> None:
        """Draw what is missing of ``n`` candidates of the first ``rows`` rows. All ranks must call it.

        Args:
            n: Candidates per row.
            rows: Number of rows.
            batch_size: Most texts decoded at once; halved where memory runs out. Changes no text.
            what: Shown beside the progress bar.
        """
        missing = agreed(lambda: sorted({shard for _, store in self._stores(n, rows) for shard in store.missing(rows)}))
        parts = FittingParts(batch_size)
        work_through(missing, lambda shard: self._write(shard, n, rows, parts), what)

    def texts(self, numbers: Sequence[int], n: int, rows: int) -> list[list[str]]:
        """The first ``n`` candidates of chosen rows.

        Args:
            numbers: Row numbers.
            n: Candidates per row.
            rows: The number of rows that was given to :meth:`draw`.

        Raises:
            ValueError: If the stored texts are about other rows than the table's: two runs' files were mixed.
        """
        found: list[list[str]] = [[] for _ in numbers]
        expected = list(self.table.rows(numbers).ids)
        for block, store in self._stores(n, rows):
            ids = store.items("id", numbers)
            if ids != expected:
                wrong = next(index for index, (ours, theirs) in enumerate(zip(expected, ids, strict=True)) if ours != theirs)
                about = f"{ids[wrong]!r} where the bank has {expected[wrong]!r}"
                raise ValueError(f"{store.folder} holds texts about {about}: files of two runs were mixed; delete that folder.")
            for texts, more in zip(found, store.items("texts", numbers), strict=True):
                texts += more[: len(block)]
        return found

    def _store(self, first: int, count: int) -> RowShards:
        return RowShards(self.root, self.key | {"candidates": [first, count]}, FIELDS, self.rows_per_shard)

    def _stores(self, n: int, rows: int) -> list[tuple[range, RowShards]]:
        """Blocks that cover ``range(n)``; of a last short one the longer that an earlier run drew, where it is there."""
        if (n, rows) not in self._chosen:
            found: list[tuple[range, RowShards]] = []
            for first in range(0, n, BLOCK):
                block, whole = range(first, min(first + BLOCK, n)), self._store(first, BLOCK)
                short = len(block) < BLOCK and whole.missing(rows)
                found.append((block, self._store(first, len(block)) if short else whole))
            self._chosen[n, rows] = found
        return self._chosen[n, rows]

    def _write(self, shard: int, n: int, rows: int, parts: FittingParts) -> None:
        start = shard * self.rows_per_shard
        batch = self.table.rows(range(start, min(start + self.rows_per_shard, rows)))
        lacking = [(block, store) for block, store in self._stores(n, rows) if store.rows_in(shard) < len(batch.ids)]
        for run in _neighbours(lacking):
            candidates = range(run[0][0].start, run[-1][0].stop)
            texts = self._describe(batch, candidates, parts)
            for block, store in run:
                chosen = [row[block.start - candidates.start : block.stop - candidates.start] for row in texts]
                store.write(shard, {"id": list(batch.ids), "texts": chosen})

    def _describe(self, batch: ActivationRows, candidates: range, parts: FittingParts) -> list[list[str]]:
        """Texts row by row. A part holds whole rows where they fit, so that a prompt is computed once for all of a row's candidates."""
        n = len(candidates)
        if parts.rows_per_part > n:
            parts.rows_per_part -= parts.rows_per_part % n

        def describe(part: slice) -> list[str]:
            found: list[str] = []
            for first, last, chosen in _rectangles(part.start, part.stop, candidates):
                texts = self.verbaliser.describe(
                    batch.activations[first:last],
                    batch.ids[first:last],
                    chosen,
                    self.drawing.temperature,
                    self.drawing.max_new_tokens,
                    self.drawing.seed,
                )
                found += [text for row in texts for text in row]
            return found

        flat = [text for part in parts.map(describe, len(batch.ids) * n) for text in part]
        return [flat[row * n : (row + 1) * n] for row in range(len(batch.ids))]


def _neighbours(blocks: Sequence[tuple[range, RowShards]]) -> list[list[tuple[range, RowShards]]]:
    """Runs of blocks that follow one another."""
    runs: list[list[tuple[range, RowShards]]] = []
    for block in blocks:
        if runs and runs[-1][-1][0].stop == block[0].start:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _rectangles(start: int, stop: int, candidates: range) -> Iterator[tuple[int, int, range]]:
    """Cut places ``start`` to ``stop`` of a row-major (rows, candidates) grid into blocks of whole rows and rests of rows."""
    n = len(candidates)
    while start < stop:
        row, column = divmod(start, n)
        if column == 0 and stop - start >= n:
            last = row + (stop - start) // n
            yield row, last, candidates
            start = last * n
        else:
            end = min(stop, (row + 1) * n)
            yield row, row + 1, candidates[column : column + end - start]
            start = end
