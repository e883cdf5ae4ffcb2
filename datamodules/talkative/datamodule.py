"""Rows of an activation bank with captions, split by document: what a talkative autoencoder is trained on.

The bank is computed once, by whichever run needs it first, and shared by all that state the same model, site, corpus and positions::

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

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from theodolite.batch_arithmetic import split_batch
from theodolite.protocols import ActivationRows
from theodolite.seeds import run_seed

from ..activations.bank import ActivationBank
from ..activations.bank_producer import ActivationProducer
from ..activations.documents import DocumentSource, DocumentSplit
from ..activations.positions import PositionPolicy
from ..samplers import DistributedBatchSampler
from .captions import CaptionSource, FileCaptions

STAGES = ("train", "validation", "test")


class CaptionedRows(Dataset):
    """Rows of a bank by lists of indices, their texts replaced by captions (or emptied, where there are none)."""

    def __init__(self, bank: ActivationBank, captions: CaptionSource | None) -> None:
        self.bank, self.captions = bank, captions

    def __len__(self) -> int:
        return len(self.bank)

    def __getitem__(self, indices: Sequence[int]) -> ActivationRows:
        if not indices:
            return ActivationRows((), (), torch.zeros(0, self.bank.producer.width), ())
        rows = self.bank.rows(indices)
        return replace(rows, texts=self.captions.captions(rows) if self.captions is not None else ("",) * len(rows.ids))


class CaptionedActivations(pl.LightningDataModule):
    """Training, validation and test rows of one model's activations; every document lies in exactly one of the three.

    Batches are :class:`~theodolite.protocols.ActivationRows`: this rank's share of a global batch, empty on some ranks at an evaluation's
    end. Row ids, splits and batches are the same on any number of ranks.

    Args:
        model: Hub id or folder of the model whose activations are described.
        site: Which, for example ``resid_post.18``.
        documents: The corpus.
        captions: ``.jsonl`` file of captions; null = the corpus's own where it has some, else none (RL needs none).
        revision: Hub revision of the model.
        dtype: Of the model's weights.
        max_tokens: Documents are cut to this many tokens.
        num_positions: Rows per document.
        min_position: First position that may become a row.
        position_seed: Of the choice of positions.
        train_rows: Training rows; null = all.
        eval_rows: Validation rows.
        test_rows: Test rows.
        validation_share: Share of the documents for validation.
        test_share: Share for the test.
        cache_dir: Folder of banks.
        max_norm: Leave out activations of a larger norm.
        global_batch_size: Rows per optimizer step over all ranks.
        eval_batch_size: Rows per evaluation batch over all ranks.
        extraction_batch_size: Documents per forward pass of the model.
        seed: Of the order of training rows; null = the run's ``seed_everything``.
    """

    def __init__(
        self,
        model: str,
        site: str,
        documents: DocumentSource,
        captions: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
        max_tokens: int = 128,
        num_positions: int = 1,
        min_position: int = 8,
        position_seed: int = 0,
        train_rows: int | None = None,
        eval_rows: int = 256,
        test_rows: int = 1024,
        validation_share: float = 0.05,
        test_share: float = 0.05,
        cache_dir: str = "activation_banks",
        max_norm: float | None = None,
        global_batch_size: int = 64,
        eval_batch_size: int = 256,
        extraction_batch_size: int = 32,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if min(global_batch_size, eval_batch_size) < 1:
            raise ValueError(f"Batch sizes must be at least 1, got {global_batch_size} and {eval_batch_size}.")
        producer = ActivationProducer(model, site, revision, dtype, max_tokens)
        policy = PositionPolicy("random", num_positions, min_position, position_seed)
        split = DocumentSplit(validation_share, test_share)
        rows = dict(zip(STAGES, (train_rows, eval_rows, test_rows), strict=True))
        self.banks = {
            name: ActivationBank(
                producer, documents, policy, split, name, cache_dir, rows[name], max_norm, batch_size=extraction_batch_size
            )
            for name in STAGES
        }
        own = documents if isinstance(documents, CaptionSource) else None
        self.captions: CaptionSource | None = FileCaptions(captions) if captions is not None else own
        self._built: list[str] = []
        self.global_batch_size, self.eval_batch_size, self.seed = global_batch_size, eval_batch_size, run_seed(seed)

    @property
    def width(self) -> int:
        """Entries of one activation."""
        return self.banks["train"].producer.width

    @property
    def provenance(self) -> dict[str, Any]:
        """Keys of the banks and the rows left out for their norm, for the manifest."""
        built = {name: self.banks[name] for name in self._built}
        return {"banks": {name: {**bank.key, "rows": len(bank), "left_out": bank.left_out} for name, bank in built.items()}}

    def setup(self, stage: str) -> None:
        """Compute the banks that the stage needs, as far as they are not on disk; all ranks share the work.

        Raises:
            ValueError: If a global size does not split over the ranks.
        """
        ranks = 1 if self.trainer is None else self.trainer.world_size
        for size in (self.global_batch_size, self.eval_batch_size):
            split_batch(size, ranks)
        device = "cpu" if self.trainer is None else self.trainer.strategy.root_device
        for name in {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage, ("test",)):
            self.banks[name].build(device)
            self._built = list(dict.fromkeys([*self._built, name]))

    def statistics(self, rows: int = 8192) -> tuple[Tensor, Tensor]:
        """Mean (d,) and one scale of the first training rows, so that standardised activations have zero mean and unit variance.

        Args:
            rows: How many rows to look at.
        """
        bank = self.banks["train"]
        activations = bank.rows(range(min(rows, len(bank)))).activations.double()
        mean = activations.mean(dim=0)
        return mean.float(), (activations - mean).square().mean().sqrt().float()

    def train_dataloader(self) -> StatefulDataLoader:
        """Training rows, shuffled by ``(seed, epoch)``; resumes in the middle of an epoch."""
        sampler = self._sampler("train", self.global_batch_size)
        return StatefulDataLoader(self._rows("train"), batch_size=None, sampler=sampler, num_workers=0, collate_fn=_as_is)

    def val_dataloader(self) -> DataLoader:
        """Validation rows in order."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader:
        """Test rows in order."""
        return self._eval_loader("test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the batch alone: modules move what they use."""
        return batch

    def _rows(self, name: str) -> CaptionedRows:
        return CaptionedRows(self.banks[name], self.captions)

    def _sampler(self, name: str, batch_size: int) -> DistributedBatchSampler:
        world_size, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        train = name == "train"
        return DistributedBatchSampler(len(self.banks[name]), batch_size, world_size, rank, shuffle=train, seed=self.seed, drop_last=train)

    def _eval_loader(self, name: str) -> DataLoader:
        return DataLoader(
            self._rows(name), batch_size=None, sampler=self._sampler(name, self.eval_batch_size), num_workers=0, collate_fn=_as_is
        )


def _as_is(batch: Any) -> Any:
    return batch
