"""Documents as examples for supervised fine-tuning: how a language model is trained from scratch on text."""

from __future__ import annotations

from itertools import islice
from typing import Any

import lightning as L
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from theodolite.protocols import Example
from theodolite.seeds import run_seed

from ..activations.documents import DocumentSource, DocumentSplit
from ..leetcode.sft import ExampleDataset
from ..samplers import DistributedBatchSampler


class TextExampleDataModule(L.LightningDataModule):
    """Each document is one completion of an empty prompt; batches are lists of :class:`~theodolite.protocols.Example`.

    The documents that ``ActivationDataModule`` holds out with the same share and seed are left out here too.

    Args:
        text: The corpus.
        documents: Its first documents, read into memory.
        global_batch_size: Documents per optimizer step over all ranks.
        validation_share: Share of the documents that is held out by a hash of their ids.
        seed: Of the order and of what is held out; null = the run's ``seed_everything``.
    """

    def __init__(
        self,
        text: DocumentSource,
        documents: int = 4000,
        global_batch_size: int = 16,
        validation_share: float = 0.02,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.text, self.documents, self.global_batch_size = text, documents, global_batch_size
        self.seed = run_seed(seed)
        self.split = DocumentSplit(validation_share, 0.0, self.seed)
        self._examples: list[Example] = []

    def examples(self) -> list[Example]:
        """All training documents, read once.

        Raises:
            ValueError: The corpus is empty.
        """
        if not self._examples:
            read = islice(self.text, self.documents)
            self._examples = [Example(document.id, "", document.text) for document in read if self.split.of(document.id) == "train"]
            if not self._examples:
                raise ValueError("data.text gives no training documents; check its path, or lower data.validation_share.")
        return self._examples

    def corpus(self) -> list[str]:
        """The documents, to make a tokenizer of."""
        return [example.completion for example in self.examples()]

    def train_dataloader(self) -> StatefulDataLoader:
        """Documents, shuffled by ``(seed, epoch)``."""
        rows = ExampleDataset(self.examples())
        ranks, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = DistributedBatchSampler(len(rows), self.global_batch_size, ranks, rank, shuffle=True, seed=self.seed, drop_last=True)
        return StatefulDataLoader(rows, batch_size=None, sampler=sampler, num_workers=0, collate_fn=list)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the batch alone: examples hold no tensors."""
        return batch
