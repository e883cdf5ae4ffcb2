"""The toy world as a corpus: documents to train its language model on, documents and captions for its activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from theodolite.protocols import ActivationRows, Example
from theodolite.seeds import run_seed

from ..activations.documents import Document
from ..samplers import DistributedBatchSampler
from .talkative_world import FIELDS, ToyWorld, corpus_example, vocabulary


class ToyCorpus:
    """Documents of the toy world, with captions that list true facts (a ``DocumentSource`` and a ``CaptionSource``).

    Args:
        documents: How many.
        length: Words per document.
        fields: What a caption says, one word each: any of ``word``, ``previous``, ``topic``, ``character``, ``mood``, ``sentence``.
        seed: Names the documents; another than the language model's corpus, so that none of them was trained on.

    Raises:
        ValueError: For an unknown field.
    """

    def __init__(
        self,
        documents: int = 6000,
        length: int = 40,
        fields: list[str] = ["word", "topic", "character", "mood"],  # noqa: B006  (never changed; jsonargparse shows it in --help)
        seed: int = 1,
    ) -> None:
        unknown = next((field for field in fields if field not in FIELDS), None)
        if unknown is not None or not fields:
            raise ValueError(f"A caption has no field {unknown!r}; choose at least one of {', '.join(FIELDS)}.")
        self.documents, self.fields, self.world = documents, tuple(fields), ToyWorld(seed, length)

    def identity(self) -> dict[str, Any]:
        """See ``DocumentSource``. Captions are no part of it: they change no activation."""
        return self.world.identity() | {"documents": self.documents}

    def __iter__(self) -> Iterator[Document]:
        """Documents by number."""
        for number in range(self.documents):
            yield Document(str(number), " ".join(self.world.document(number).words))

    def captions(self, rows: ActivationRows) -> tuple[str, ...]:
        """See ``CaptionSource``: token positions are word positions."""
        places = [name.split(":") for name in rows.ids]
        return tuple(self.world.caption(int(document), int(position), self.fields) for document, position in places)


class ExampleRows(Dataset):
    """Documents as examples, by lists of numbers."""

    def __init__(self, world: ToyWorld, documents: int) -> None:
        self.world, self.documents = world, documents

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, indices: Sequence[int]) -> list[Example]:
        return [corpus_example(self.world, index) for index in indices]


class ToyCorpusDataModule(pl.LightningDataModule):
    """Documents of the toy world to train a language model on; batches are lists of :class:`~theodolite.protocols.Example`.

    Args:
        documents: Documents per epoch.
        length: Words per document.
        global_batch_size: Documents per optimizer step over all ranks.
        world_seed: Names the documents.
        seed: Of their order; null = the run's ``seed_everything``.
    """

    def __init__(
        self, documents: int = 12800, length: int = 40, global_batch_size: int = 32, world_seed: int = 0, seed: int | None = None
    ) -> None:
        super().__init__()
        self.documents, self.world = documents, ToyWorld(world_seed, length)
        self.global_batch_size, self.seed = global_batch_size, run_seed(seed)

    def corpus(self) -> list[str]:
        """All words, to make a tokenizer of."""
        return vocabulary()

    def train_dataloader(self) -> StatefulDataLoader:
        """Documents, shuffled by ``(seed, epoch)``."""
        world_size, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        rows = ExampleRows(self.world, self.documents)
        sampler = DistributedBatchSampler(len(rows), self.global_batch_size, world_size, rank, True, self.seed, True)
        return StatefulDataLoader(rows, batch_size=None, sampler=sampler, num_workers=0, collate_fn=list)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the batch alone: examples hold no tensors."""
        return batch
