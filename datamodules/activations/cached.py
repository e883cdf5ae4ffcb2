"""Pairs of activations computed once, kept on disk, and read by any number of ranks in a full shuffle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from theodolite.protocols import ActivationBatch
from theodolite.row_shards import Field, RowShards
from theodolite.shard_work import agreed, work_through

from ..samplers import DistributedBatchSampler
from ..text.packing import PackedRows, TokenRow
from .datamodule import ActivationDataModule
from .paired_rows import PairedRows, join_rows, numbers_of

NUMBERS = {"row": torch.int64, "position": torch.int32, "token": torch.int32}


class ShardCursor:
    """Finds the token rows of ever later shards in one pass over the text, without running the model.

    Args:
        text: Token rows from the first.
        drop: Positions that do not count.
        rows_per_shard: Rows of activations per shard.
    """

    def __init__(self, text: PackedRows, drop: Sequence[Any], rows_per_shard: int) -> None:
        self.text, self.drop, self.rows_per_shard = text, drop, rows_per_shard
        self._first = 0  # row of activations with which the token row in hand begins
        self._in_hand: TokenRow | None = None

    def token_rows(self, shard: int, rows: int) -> tuple[list[TokenRow], int]:
        """The token rows that hold a shard's ``rows`` rows, and how many rows of the first of them belong to the shard before.

        Raises:
            StopIteration: The text ends before.
            ValueError: The shard lies before one that was asked for earlier.
        """
        begin, end = shard * self.rows_per_shard, shard * self.rows_per_shard + rows
        if begin < self._first:
            raise ValueError(f"Shard {shard} was asked for after a later one.")
        found: list[TokenRow] = []
        skipped = 0
        while True:
            row = self._in_hand if self._in_hand is not None else next(self.text)
            count = len(numbers_of([row], self.drop))
            if self._first + count > begin:
                skipped = begin - self._first if not found else skipped
                found.append(row)
            if self._first + count > end or (found and self._first + count == end):
                self._in_hand = row if self._first + count > end else None
                self._first += 0 if self._in_hand is not None else count
                return found, skipped
            self._in_hand = None
            self._first += count


class CachedRows(Dataset):
    """The first ``rows`` rows of a store, by lists of row numbers."""

    def __init__(self, store: RowShards, rows: int, same_site: bool) -> None:
        self.store, self.rows, self.same_site = store, rows, same_site

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, numbers: list[int]) -> ActivationBatch:
        """One batch, in the order asked for."""
        batch: dict[str, Tensor] = {name: self.store.tensor(name, numbers).long() for name in NUMBERS}
        batch["input"] = self.store.tensor("input", numbers)
        batch["target"] = batch["input"] if self.same_site else self.store.tensor("target", numbers)
        return cast(ActivationBatch, batch)


class CachedActivationDataModule(ActivationDataModule):
    """As :class:`ActivationDataModule`, from a store on disk that is written first where rows are missing.

    Every epoch is a permutation of all stored rows. A store belongs to one model, corpus, packing and pair of sites (its key); asking for
    more rows extends it. Each rank writes its own shards; a run that was killed goes on with those that are missing.

    Args:
        cache_dir: Folder of stores.
        train_rows: Rows of activations for training (tokens that count).
        rows_per_shard: Of a new store; a shard is held in memory while it is written.
        kwargs: Of :class:`ActivationDataModule`; ``buffer_rows``, ``prefetch``, ``repeat`` and ``steps_per_epoch`` are not used.

    Raises:
        ValueError: Settings that cannot work.
    """

    def __init__(self, cache_dir: str, train_rows: int, rows_per_shard: int = 16384, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if train_rows < self.global_batch_size or rows_per_shard < 1:
            raise ValueError(
                f"data.train_rows={train_rows} must be at least data.global_batch_size={self.global_batch_size}, and "
                f"data.rows_per_shard={rows_per_shard} at least 1."
            )
        self.cache_dir, self.train_rows, self.rows_per_shard = Path(cache_dir), train_rows, rows_per_shard

    def key(self, split: str) -> dict[str, Any]:
        """What decides the values of a store, and not how many there are."""
        return {
            "model": self.model.identity(),
            "sites": [str(self.input_site), str(self.target_site)],
            "text": self.text.identity(),
            "packing": asdict(self.packing),
            "drop": sorted(self.drop),
            "split": asdict(self.split) | {"of": split},
        }

    def store(self, split: str) -> RowShards:
        """The store of ``train``, ``validation`` or ``test``."""
        dtype = self.model.dtype
        fields = {name: Field(str(kind).removeprefix("torch."), ()) for name, kind in NUMBERS.items()}
        fields["input"] = Field(dtype, (self.input_width,))
        if self.target_site != self.input_site:
            fields["target"] = Field(dtype, (self.target_width,))
        return RowShards(self.cache_dir, self.key(split), fields, self.rows_per_shard)

    def setup(self, stage: str) -> None:
        """Write what is missing; the model is loaded only for that.

        Raises:
            ValueError: The text ends before there are enough rows.
        """
        super().setup(stage)
        for split in {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage, ("test",)):
            self._complete(split)

    def train_dataloader(self) -> StatefulDataLoader:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A permutation of the stored rows per epoch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> StatefulDataLoader:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The validation rows, in order, once."""
        return self._loader("validation", shuffle=False)

    def test_dataloader(self) -> StatefulDataLoader:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The test rows, in order, once."""
        return self._loader("test", shuffle=False)

    def _rows(self, split: str) -> int:
        return self.train_rows if split == "train" else len(numbers_of(self._held_out_rows(split), self.drop))

    def _loader(self, split: str, shuffle: bool) -> StatefulDataLoader:
        rank, ranks = self._world()
        rows = CachedRows(self.store(split), self._rows(split), self.target_site == self.input_site)
        sampler = DistributedBatchSampler(len(rows), self.global_batch_size, ranks, rank, shuffle, self.seed, drop_last=shuffle)
        return StatefulDataLoader(rows, batch_size=None, sampler=sampler)

    def _complete(self, split: str) -> None:
        store, rows = self.store(split), self._rows(split)
        missing = agreed(lambda: store.missing(rows))
        if not missing:
            return
        rank_zero_info(f"{len(missing)} shards of {split} activations are missing in {store.folder}")
        cursor = ShardCursor(self._packed(split), self.drop, store.rows_per_shard)
        produce = self._produce()
        produce.keep_on = "cpu"

        def write(shard: int) -> None:
            # whole shards, so that a longer run can extend the store; only the last one of a finished text is short
            wanted = min(store.rows_per_shard, rows - shard * store.rows_per_shard)
            try:
                token_rows, skipped = cursor.token_rows(shard, wanted)
            except StopIteration as end:
                raise ValueError(
                    f"The text ends before {rows} rows of {split} activations: give more text, or lower data.train_rows."
                ) from end
            store.write(shard, _columns(join_rows(list(_parts(produce, token_rows))).select(slice(skipped, skipped + wanted)), store))

        work_through(missing, write, f"{split} activations")
        self.model.release()


def _parts(produce: Any, rows: Sequence[TokenRow], at_once: int = 256) -> Iterator[PairedRows]:
    for start in range(0, len(rows), at_once):
        yield produce(rows[start : start + at_once])


def _columns(rows: PairedRows, store: RowShards) -> dict[str, Tensor]:
    columns = {name: getattr(rows, name).to(kind) for name, kind in NUMBERS.items()}
    return columns | {name: cast(Tensor, getattr(rows, name)) for name in ("input", "target") if name in store.fields}
