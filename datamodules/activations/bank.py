"""An activation bank: activations of documents on disk, computed once and read by every experiment on any number of ranks.

Row ``i`` is the i-th (document, position) pair, documents in the corpus's order and positions ascending. The folder is named by everything
that decides the values: weights, site, precision, tokenisation, corpus, split and position policy. ``max_rows`` is not among them: a bank
of 50 000 rows serves a run on 10 000 at once, and one that wants 60 000 adds what is missing. Where all rows are on disk neither the
model nor the corpus is touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theodolite.out_of_memory import FittingParts
from theodolite.protocols import ActivationRows
from theodolite.provenance import write_json_atomic
from theodolite.row_shards import Field, RowShards
from theodolite.shard_work import agreed, this_rank, work_through

from .bank_producer import ActivationProducer
from .documents import DocumentSource, DocumentSplit
from .frozen_model import DTYPES
from .positions import PositionPolicy

CORPUS = "corpus.json"
"""Written when a corpus was walked to its end: how many rows it has in all."""


@dataclass(slots=True)
class BankPlan:
    """Which rows there are, from tokenisation alone.

    Attributes:
        documents: Id and token ids of every document that has rows.
        positions: Their rows.
        firsts: Number of each document's first row.
        rows: Rows of all.
        without_rows: Documents that are too short (or all special tokens).
        whole: The corpus was walked to its end.
    """

    documents: list[tuple[str, list[int]]] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    rows: int = 0
    without_rows: int = 0
    whole: bool = False

    def span(self, start: int, stop: int) -> list[tuple[int, list[int]]]:
        """Documents of the rows from ``start`` to ``stop``: index, and which of its positions those are."""
        found: list[tuple[int, list[int]]] = []
        for index, (first, positions) in enumerate(zip(self.firsts, self.positions, strict=True)):
            wanted = positions[max(0, start - first) : max(0, stop - first)]
            if wanted:
                found.append((index, wanted))
        return found


class ActivationBank:
    """Rows of activations; an :class:`~theodolite.protocols.ActivationTable` once :meth:`build` has returned.

    Args:
        producer: Model and site.
        source: Corpus.
        policy: Which positions become rows.
        split: Of the documents; None = all documents.
        name: Of the split: ``train``, ``validation`` or ``test``.
        cache_dir: Folder of banks.
        max_rows: Rows wanted; None = the whole corpus.
        max_norm: Leave out rows whose norm exceeds this (massive activations own the variance); they are counted in :attr:`left_out`.
        dtype: In which values are stored: ``float32``, ``bfloat16`` or ``float16``.
        batch_size: Documents per forward pass.
        rows_per_shard: Of a new bank.

    Raises:
        ValueError: For settings that cannot work.
    """

    def __init__(
        self,
        producer: ActivationProducer,
        source: DocumentSource,
        policy: PositionPolicy,
        split: DocumentSplit | None = None,
        name: str = "test",
        cache_dir: str | Path = "runs/activation_banks",
        max_rows: int | None = None,
        max_norm: float | None = None,
        dtype: str = "float32",
        batch_size: int = 8,
        rows_per_shard: int = 1024,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"The bank's dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
        if batch_size < 1 or (max_rows is not None and max_rows < 1):
            raise ValueError(f"The bank's batch_size and max_rows must be at least 1, got {batch_size} and {max_rows}.")
        self.producer, self.source, self.policy, self.split, self.name = producer, source, policy, split, name
        self.max_rows, self.max_norm, self.dtype = max_rows, max_norm, dtype
        self.cache_dir, self.rows_per_shard = Path(cache_dir), rows_per_shard
        self.left_out = 0
        self._parts = FittingParts(batch_size)
        self._rows: list[int] | None = None

    @cached_property
    def store(self) -> RowShards:
        """The rows on disk."""
        fields = {
            "activation": Field(self.dtype, (self.producer.width,)),
            "norm": Field("float64"),
            "position": Field("int32"),
            "document": Field("json"),
            "text": Field("json"),
        }
        split = None if self.split is None else asdict(self.split) | {"name": self.name}
        key = {
            "kind": "activation bank",
            "producer": self.producer.identity(),
            "corpus": self.source.identity(),
            "positions": self.policy.as_dict(),
            "split": split,
            "dtype": self.dtype,
        }
        return RowShards(self.cache_dir, key, fields, self.rows_per_shard)

    @property
    def key(self) -> Mapping[str, Any]:
        """See :class:`~theodolite.protocols.ActivationTable`."""
        return {"bank": self.store.key, "max_norm": self.max_norm}

    def __len__(self) -> int:
        """Rows, without those left out by their norm.

        Raises:
            RuntimeError: Before :meth:`build`.
        """
        return len(self._selected())

    def rows(self, indices: Sequence[int]) -> ActivationRows:
        """Rows by number among those not left out; activations as float32 (or as stored, where that is finer)."""
        selected = self._selected()
        numbers = [selected[index] for index in indices]  # none is an empty batch
        documents = [str(document) for document in self.store.items("document", numbers)]
        positions = self.store.tensor("position", numbers).tolist()
        ids = tuple(f"{document}:{position}" for document, position in zip(documents, positions, strict=True))
        texts = tuple(str(text) for text in self.store.items("text", numbers))
        return ActivationRows(ids, tuple(documents), self.store.tensor("activation", numbers).float(), texts)

    def build(self, device: torch.device | str = "cpu") -> None:
        """Compute the rows that are not on disk yet. All ranks must call it.

        Raises:
            ValueError: If the corpus has no rows under the position policy, or names two documents alike.
        """
        wanted = agreed(lambda: [self._known_rows()])[0]
        if wanted < 0:
            plan = self.plan()
            wanted = plan.rows
            missing = agreed(lambda: self.store.missing(plan.rows))
            work_through(missing, lambda shard: self._write(plan, shard, device), f"activations ({self.name})")
            if plan.whole and this_rank() == 0:
                facts = {"rows": plan.rows, "documents": len(plan.documents), "documents_without_rows": plan.without_rows}
                write_json_atomic(self.store.folder / CORPUS, facts)
            self.producer.release()
        norms = self.store.tensor("norm", range(wanted))
        kept = torch.ones(wanted, dtype=torch.bool) if self.max_norm is None else norms <= self.max_norm
        self._rows = kept.nonzero().squeeze(1).tolist()
        self.left_out = wanted - len(self._rows)

    def plan(self) -> BankPlan:
        """Walk the corpus until ``max_rows`` rows are found.

        Raises:
            ValueError: If there are none, or two documents have one id.
        """
        plan, seen = BankPlan(), set()
        special = self.producer.special_ids()
        for document in self.source:
            if self.max_rows is not None and plan.rows >= self.max_rows:
                break
            if document.id in seen:
                raise ValueError(f"Two documents of the corpus are called {document.id!r}; rows are addressed by it: make ids unique.")
            seen.add(document.id)
            if self.split is not None and self.split.of(document.id) != self.name:
                continue
            tokens = self.producer.tokens(document.text)
            positions = self.policy.positions(document.id, tokens, special)
            if not positions:
                plan.without_rows += 1
                continue
            plan.documents.append((document.id, tokens))
            plan.positions.append(positions)
            plan.firsts.append(plan.rows)
            plan.rows += len(positions)
        else:
            plan.whole = True
        if not plan.rows:
            raise ValueError(
                f"No document of the {self.name} split has a position from {self.policy.min_position} on "
                f"({plan.without_rows} are too short): lower min_position or give longer documents."
            )
        if self.max_rows is not None and plan.rows > self.max_rows:
            plan.rows, plan.whole = self.max_rows, False
        return plan

    def _known_rows(self) -> int:
        """Rows wanted if all are on disk and that can be told without the corpus, else -1."""
        path = self.store.folder / CORPUS
        total = json.loads(path.read_text())["rows"] if path.is_file() else None
        if total is None and self.max_rows is None:
            return -1
        wanted = min(n for n in (total, self.max_rows) if n is not None)
        return -1 if self.store.missing(wanted) else wanted

    def _write(self, plan: BankPlan, shard: int, device: torch.device | str) -> None:
        n = self.store.rows_per_shard
        span = plan.span(shard * n, min((shard + 1) * n, plan.rows))

        def extract(part: slice) -> Tensor:
            states = self.producer.extract([plan.documents[index][1] for index, _ in span[part]], device)
            return torch.cat([state[positions] for state, (_, positions) in zip(states, span[part], strict=True)])

        activation = torch.cat(self._parts.map(extract, len(span))).to(DTYPES[self.dtype])
        addresses = [(index, position) for index, positions in span for position in positions]
        columns = {
            "activation": activation,
            "norm": activation.double().norm(dim=1),
            "position": torch.tensor([position for _, position in addresses], dtype=torch.int32),
            "document": [plan.documents[index][0] for index, _ in addresses],
            "text": [self.producer.context(plan.documents[index][1], position) for index, position in addresses],
        }
        self.store.write(shard, columns)

    def _selected(self) -> list[int]:
        if self._rows is None:
            raise RuntimeError("The activation bank was read before build(): call it on all ranks first.")
        return self._rows
