"""Rows of tokens for evaluations: the same rows whoever holds them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from theodolite.datamodules.text.documents import StringDocuments
from theodolite.datamodules.text.packing import Packing
from theodolite.datamodules.text.token_rows import TokenRowsDataModule

TEXTS = [f"story number {i} is about {'rabbits' if i % 2 else 'foxes'}" for i in range(20)]
PACKING = Packing(length=16, bos="none")


def batches(rank: int, ranks: int) -> list[torch.Tensor]:
    data = TokenRowsDataModule(StringDocuments(TEXTS), "bytes", PACKING, rows=12, eval_batch_size=4)
    data.setup("validate")
    trainer: Any = SimpleNamespace(global_rank=rank, world_size=ranks)
    data.trainer = trainer
    return list(data.val_dataloader())


def test_ranks_share_the_rows_in_turn() -> None:
    whole = torch.cat(batches(0, 1))
    assert whole.shape == (12, 16)
    for ranks in (2, 4):
        shares = [torch.cat(batches(rank, ranks)) for rank in range(ranks)]
        assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), whole)


def test_too_small_a_corpus_and_sizes_that_do_not_divide_are_refused() -> None:
    data = TokenRowsDataModule(StringDocuments(TEXTS[:1]), "bytes", PACKING, rows=12, eval_batch_size=4)
    with pytest.raises(ValueError, match="packs into 1 rows"):
        data.setup("validate")
    with pytest.raises(ValueError, match="8 would be"):
        TokenRowsDataModule(StringDocuments(TEXTS), "bytes", PACKING, rows=10, eval_batch_size=4)
