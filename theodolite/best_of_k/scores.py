"""Stage 3: how well each candidate reconstructs its activation, under every reconstructor, with the controls that need texts.

Per row, all as squared norms over the d dimensions:

* ``error.<name>`` (N) and ``directional.<name>`` (N): of every candidate, raw and between directions of norm sqrt(d);
* ``greedy.<name>``, ``greedy_directional.<name>``: of the text at temperature 0;
* ``residual.<name>`` (grid, d): mean residual of the candidate that best-of-K selects, for the K of the grid;
* ``error_of_mean``: of the mean of all N reconstructions of the first reconstructor;
* ``null`` (N): of the N texts about one activation of *another document*; ``shuffled``: of its greedy text. NaN where the data hold one
  document only;
* ``failed`` (N), ``greedy_failed``: the text is empty. It scores as the mean prediction under every reconstructor.

Rows are scored in fixed groups, and texts in fixed batches, so that a score does not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theodolite.best_of_k.candidates import Candidates
from theodolite.functional.best_of_k import expected_of_selected
from theodolite.functional.reconstruction_metrics import directions
from theodolite.out_of_memory import FittingParts
from theodolite.protocols import ActivationTable, Reconstructor
from theodolite.provenance import content_hash
from theodolite.row_shards import Field, RowShards
from theodolite.shard_work import agreed, work_through

GROUP = 64
"""Rows scored together: their texts are each other's null control."""
TEXTS = 64
"""Texts per reconstruction batch: fixed, because the rounding of a batch depends on its size."""


class Scores:
    """Scores of the first ``rows`` rows of a table.

    Args:
        root: Folder of stores.
        candidates: Sampled texts.
        greedy: Texts at temperature 0.
        reconstructors: By name; the first one selects.
        n: Candidates per row.
        rows: Number of rows.
        grid: K for which selected residuals are kept.

    Raises:
        ValueError: If there is no row or no reconstructor.
    """

    def __init__(
        self,
        root: str | Path,
        candidates: Candidates,
        greedy: Candidates,
        reconstructors: Mapping[str, Reconstructor],
        n: int,
        rows: int,
        grid: Sequence[int],
    ) -> None:
        if not reconstructors or rows < 1:
            raise ValueError(f"Best-of-K needs a reconstructor and a row, got {len(reconstructors)} and {rows}.")
        self.candidates, self.greedy, self.table = candidates, greedy, candidates.table
        self.reconstructors, self.n, self.rows, self.grid = dict(reconstructors), n, rows, list(grid)
        self.names = list(reconstructors)
        groups = -(-rows // GROUP)
        size = -(-rows // groups)
        # neighbours in the table are of one document: deal them out to different groups, or a group had nobody for the null control
        self.order = [row for group in range(groups) for row in range(group, rows, groups)]
        self.mean = table_mean(self.table, rows)
        d = len(self.mean)
        key = {
            "kind": "candidate scores, null of one other row",
            "candidates": candidates.key,
            "greedy": greedy.key,
            "reconstructors": {name: reader.fingerprint() for name, reader in self.reconstructors.items()},
            "selects": self.names[0],
            "n": n,
            "rows": rows,
            "grid": self.grid,
            "mean": content_hash(self.mean.tolist()),
        }
        fields = {"error_of_mean": Field("float64"), "null": Field("float64", (n,)), "shuffled": Field("float64")}
        fields |= {"failed": Field("bool", (n,)), "greedy_failed": Field("bool")}
        for name in self.names:
            fields |= {f"error.{name}": Field("float64", (n,)), f"directional.{name}": Field("float64", (n,))}
            fields |= {f"greedy.{name}": Field("float64"), f"greedy_directional.{name}": Field("float64")}
            fields |= {f"residual.{name}": Field("float32", (len(self.grid), d))}
        self.store = RowShards(root, key, fields, size)

    def score(self, what: str = "scores") -> None:
        """Score what is missing. All ranks must call it."""
        missing = agreed(lambda: self.store.missing(self.rows))
        work_through(missing, self._write, what)

    def column(self, name: str) -> Tensor:
        """One field of all rows, in the table's order."""
        places = torch.empty(self.rows, dtype=torch.long)
        places[torch.tensor(self.order)] = torch.arange(self.rows)
        return self.store.tensor(name, places)

    def _write(self, shard: int) -> None:
        size = self.store.rows_per_shard
        numbers = self.order[shard * size : (shard + 1) * size]
        rows = self.table.rows(numbers)
        target = rows.activations.double().cpu()
        # blanks alone say nothing either
        texts = [[text if text.strip() else "" for text in row] for row in self.candidates.texts(numbers, self.n, self.rows)]
        greedy = [row[0] if row[0].strip() else "" for row in self.greedy.texts(numbers, 1, self.rows)]
        partner = partners(rows.documents)
        columns: dict[str, Any] = {
            "failed": np.array([[not text for text in row] for row in texts]),
            "greedy_failed": np.array([not text for text in greedy]),
        }
        selecting: Tensor | None = None
        for name in self.names:
            vectors = self._vectors(name, [text for row in texts for text in row] + greedy)
            drawn, single = vectors[: len(numbers) * self.n].reshape(len(numbers), self.n, -1), vectors[len(numbers) * self.n :]
            residual = target[:, None] - drawn
            error = residual.square().sum(2)
            selecting = error if selecting is None else selecting
            columns[f"error.{name}"], columns[f"greedy.{name}"] = error, (target - single).square().sum(1)
            aim = directions(target)
            columns[f"directional.{name}"] = (aim[:, None] - directions(drawn)).square().sum(2)
            columns[f"greedy_directional.{name}"] = (aim - directions(single)).square().sum(1)
            columns[f"residual.{name}"] = expected_of_selected(residual, selecting, self.grid).float()
            if name == self.names[0]:
                columns["error_of_mean"] = residual.mean(1).square().sum(1)
                columns["null"], columns["shuffled"] = self._controls(target, drawn, single, partner)
        self.store.write(shard, columns)

    def _controls(self, target: Tensor, drawn: Tensor, single: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        """Errors of the N sampled texts and of the greedy text about a row of another document."""
        other, alone = partner.clamp_min(0), partner < 0
        null = (target[:, None] - drawn[other]).square().sum(2).masked_fill(alone[:, None], torch.nan)
        return null, (target - single[other]).square().sum(1).masked_fill(alone, torch.nan)

    def _vectors(self, name: str, texts: Sequence[str]) -> Tensor:
        """(len(texts), d) float64 reconstructions; of an empty text the mean prediction. Each different text is read once.

        Raises:
            ValueError: If a reconstruction is not finite.
        """
        reader = self.reconstructors[name]
        different = list(dict.fromkeys(text for text in texts if text))
        found = FittingParts(TEXTS).map(lambda part: reader.reconstruct(different[part]).double().cpu(), len(different))
        vectors = torch.cat([*found, self.mean[None]])
        if not bool(torch.isfinite(vectors).all()):
            wrong = different[int((~torch.isfinite(vectors).all(1)).nonzero()[0])]
            raise ValueError(f"Reconstructor {name!r} gives values that are not finite for the text {wrong!r}; it cannot be scored.")
        places = {text: place for place, text in enumerate(different)} | {"": len(different)}
        return vectors[[places[text] for text in texts]]


def table_mean(table: ActivationTable, rows: int, chunk: int = 4096) -> Tensor:
    """(d,) float64 mean of the first ``rows`` activations: the mean prediction, and what failed texts score as."""
    total: Tensor | None = None
    for start in range(0, rows, chunk):
        part = table.rows(range(start, min(start + chunk, rows))).activations.double().sum(0).cpu()
        total = part if total is None else total + part
    assert total is not None
    return total / rows


def partners(documents: Sequence[str]) -> Tensor:
    """(rows,) the next row, in a circle, of another document; -1 where there is none."""
    size = len(documents)
    others = ([other % size for other in range(row + 1, row + size) if documents[other % size] != documents[row]] for row in range(size))
    return torch.tensor([next(iter(found), -1) for found in others])
