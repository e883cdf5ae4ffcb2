"""Rows of an activation bank with captions: what a talkative autoencoder is trained on.

::

    data:
      class_path: theodolite.datamodules.talkative.CaptionedActivations
      init_args:
        model: Qwen/Qwen3-1.7B
        site: resid_post.18
        documents: {class_path: theodolite.datamodules.activations.documents.HubDocuments, init_args: {dataset: roneneldan/TinyStories}}
        captions: captions.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from theodolite.protocols import ActivationRows, ActivationTable

from ..activations.bank_datamodule import ActivationBankDataModule
from .captions import CaptionSource, FileCaptions


class CaptionedRows(Dataset):
    """Rows of a table by lists of numbers, their texts replaced by captions (emptied, where there are none)."""

    def __init__(self, table: ActivationTable, captions: CaptionSource | None) -> None:
        self.table, self.captions = table, captions

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, numbers: Sequence[int]) -> ActivationRows:
        rows = self.table.rows(numbers)
        return replace(rows, texts=self.captions.captions(rows) if self.captions is not None else ("",) * len(rows.ids))


class CaptionedActivations(ActivationBankDataModule):
    """Activation banks whose rows come with captions; training needs them for the warm start only.

    Args:
        captions: ``.jsonl`` file of captions; null = the corpus's own where it has some, else none.
        bank_args: Everything else: see
            :class:`~theodolite.datamodules.activations.bank_datamodule.ActivationBankDataModule`.
    """

    def __init__(self, captions: str | None = None, **bank_args: Any) -> None:
        super().__init__(**bank_args)
        own = self.source if isinstance(self.source, CaptionSource) else None
        self.captions: CaptionSource | None = FileCaptions(captions) if captions is not None else own

    def dataset(self, table: ActivationTable) -> Dataset:
        """Rows with captions as their texts."""
        return CaptionedRows(table, self.captions)
