"""Endless batches of synthetic features or induction sequences, a function of seed, step and row alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from theodolite.batch_arithmetic import split_batch
from theodolite.functional.toy_features import induction_tokens, sparse_features
from theodolite.seeds import derive_seed, run_seed

Kind = Literal["unit", "signed", "induction"]

ENDLESS = 1 << 30
"""Batches of a training stream. It has a length, because of a stream without one a batch is fetched ahead, which no checkpoint knows of."""


class ToyStream(IterableDataset):
    """This rank's rows of one global batch after another. The global batches do not depend on the number of ranks.

    Its state is the number of batches given out, the same on every rank, so a run resumes where it was, also on another number of ranks.

    Args:
        kind: ``unit`` or ``signed`` features, or ``induction`` sequences.
        width: Features, or the length of a sequence.
        rows: Global rows per batch.
        seed: Parts of the seed.
        rank: This rank.
        ranks: Number of ranks.
        batches: How many.
        probability: Of an active feature.
        vocabulary: Of induction sequences.
    """

    def __init__(
        self,
        kind: Kind,
        width: int,
        rows: int,
        seed: tuple[int | str, ...],
        rank: int = 0,
        ranks: int = 1,
        batches: int = ENDLESS,
        probability: float = 0.05,
        vocabulary: int = 128,
    ) -> None:
        self.kind: Kind = kind
        self.width, self.rows, self.seed = width, rows, seed
        self.rank, self.ranks, self.batches = rank, ranks, batches
        self.probability, self.vocabulary = probability, vocabulary
        self._given = 0
        self._resume = 0

    def global_batch(self, index: int) -> Tensor:
        """All ranks' rows of a batch: (rows, width)."""
        generator = torch.Generator().manual_seed(derive_seed("toy", *self.seed, index))
        if self.kind == "induction":
            return induction_tokens(self.rows, self.width, self.vocabulary, generator)
        return sparse_features(self.rows, self.width, self.probability, generator, self.kind)

    def __len__(self) -> int:
        """Number of batches."""
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        """This rank's rows of each batch; the ``i``-th has the global slot ``rank + i * ranks``."""
        index, self._resume = self._resume, 0
        while index < self.batches:
            self._given = index + 1
            yield self.global_batch(index)[self.rank :: self.ranks]
            index += 1

    def state_dict(self) -> dict[str, Any]:
        """Batches given out."""
        return {"given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after them."""
        self._resume = self._given = state["given"]


class ToyDataModule(pl.LightningDataModule):
    """Synthetic features or sequences, made as they are needed.

    Args:
        kind: ``unit``: features uniform on [0, 1] (superposition); ``signed``: on [-1, 1] (compressed computation); ``induction``: tokens
            ``BOS T* S M T* S``.
        width: Number of features, or length of a sequence.
        probability: That a feature is active.
        vocabulary: Tokens besides S and BOS.
        global_batch_size: Rows per optimizer step over all ranks.
        eval_batch_size: Rows per evaluation batch over all ranks.
        eval_batches: Evaluation batches.
        seed: Of the data; null = the run's ``seed_everything``.
    """

    def __init__(
        self,
        kind: Kind = "unit",
        width: int = 5,
        probability: float = 0.05,
        vocabulary: int = 128,
        global_batch_size: int = 1024,
        eval_batch_size: int = 1024,
        eval_batches: int = 4,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("unit", "signed", "induction"):
            raise ValueError(f"data.kind is {kind!r}; choose unit, signed or induction.")
        if not 0.0 < probability <= 1.0:
            raise ValueError(f"data.probability is {probability}; it must lie above 0 and not above 1.")
        if eval_batches < 1:
            raise ValueError(f"data.eval_batches must be at least 1, got {eval_batches}.")
        self.kind: Kind = kind
        self.width, self.probability, self.vocabulary = width, probability, vocabulary
        self.global_batch_size, self.eval_batch_size, self.eval_batches = global_batch_size, eval_batch_size, eval_batches
        self.seed = run_seed(seed)

    def stream(self, phase: str, rows: int, batches: int) -> ToyStream:
        """A phase's batches for this rank."""
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        split_batch(rows, ranks)
        return ToyStream(
            self.kind, self.width, rows, (phase, self.seed), rank, ranks, batches, self.probability, self.vocabulary
        )  # fmt: skip

    def train_dataloader(self) -> StatefulDataLoader:
        """Endless batches."""
        return StatefulDataLoader(self.stream("train", self.global_batch_size, ENDLESS), batch_size=None)

    def val_dataloader(self) -> StatefulDataLoader:
        """The same batches every time."""
        return StatefulDataLoader(self.stream("val", self.eval_batch_size, self.eval_batches), batch_size=None)

    def test_dataloader(self) -> StatefulDataLoader:
        """Other batches than validation's."""
        return StatefulDataLoader(self.stream("test", self.eval_batch_size, self.eval_batches), batch_size=None)
