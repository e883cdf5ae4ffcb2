"""Rows of tokens to evaluate a language model on: the first rows that a corpus packs into, the same on any number of ranks."""

from __future__ import annotations

from itertools import islice
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from theodolite.batch_arithmetic import split_batch

from ..activations.documents import DocumentSource
from .byte_tokenizer import ByteTokenizer, TextTokenizer
from .packing import PackedRows, Packing


class TokenRowsDataModule(pl.LightningDataModule):
    """Validation and test batches (rows, length) of token ids. There is no training data here.

    The i-th row of rank r of W is row ``r + i W`` of the packed corpus.

    Args:
        documents: The corpus.
        tokenizer: ``bytes``, or a tokenizer of ``transformers`` by hub id or folder.
        packing: How documents become rows.
        rows: Number of rows over all ranks.
        eval_batch_size: Rows per batch over all ranks.
        revision: Of the tokenizer.

    Raises:
        ValueError: If sizes do not divide, or the corpus packs into fewer rows.
    """

    def __init__(
        self,
        documents: DocumentSource,
        tokenizer: str,
        packing: Packing,
        rows: int = 64,
        eval_batch_size: int = 64,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if rows < 1 or rows % eval_batch_size:
            below, above = rows // eval_batch_size * eval_batch_size, -(-rows // eval_batch_size) * eval_batch_size
            raise ValueError(f"data.rows is {rows}, no multiple of eval_batch_size {eval_batch_size}; {below or above} would be.")
        self.documents, self.tokenizer, self.packing, self.revision = documents, tokenizer, packing, revision
        self.rows, self.eval_batch_size = rows, eval_batch_size
        self._tokens: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Pack the rows, once."""
        if self._tokens is not None:
            return
        packed = PackedRows(self.documents.__iter__, self._loaded_tokenizer(), self.packing)
        found = [row.tokens for row in islice(packed, self.rows)]
        if len(found) < self.rows:
            raise ValueError(f"The corpus packs into {len(found)} rows of {self.packing.length} tokens; data.rows asks for {self.rows}.")
        self._tokens = torch.stack(found)

    def val_dataloader(self) -> DataLoader[Any]:
        """This rank's share of each batch."""
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        split_batch(self.eval_batch_size, ranks)
        assert self._tokens is not None, "setup comes first"
        return DataLoader(cast(Dataset[Tensor], self._tokens[rank::ranks]), batch_size=self.eval_batch_size // ranks)

    def test_dataloader(self) -> DataLoader[Any]:
        """As for validation."""
        return self.val_dataloader()

    def _loaded_tokenizer(self) -> TextTokenizer:
        if self.tokenizer == "bytes":
            return ByteTokenizer()
        from transformers import AutoTokenizer

        return cast(TextTokenizer, AutoTokenizer.from_pretrained(self.tokenizer, revision=self.revision))
