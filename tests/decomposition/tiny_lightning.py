"""The tiny reconstruction as a LightningModule, and a datamodule for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_reconstruction import TinyNet

from theodolite.distributed import world_size


class TinyReconstruction(TinyNet, LightningModule):
    """Trained at the middle of its box."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        sources = {name: torch.full((channels,), 0.5, dtype=batch.dtype) for name, channels in self.source_channels().items()}
        total, count = self.loss_sum(self.prepare(batch), sources)
        self.log("loss", total / count, on_step=True, on_epoch=False, sync_dist=True)
        return total / count

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/rows", float(len(batch)))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/rows", float(len(batch)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class TinyRows(LightningDataModule):
    """Random rows, the same on every rank, dealt out in turn.

    Args:
        rows: How many.
        positions: Per row; 0 = rows of a single position.
        global_batch_size: Over all ranks.
        width: Features.
        dtype: Of the rows.
    """

    def __init__(
        self,
        rows: int = 16,
        positions: int = 3,
        global_batch_size: int = 8,
        width: int = 6,
        dtype: Literal["float32", "float64"] = "float64",
    ):
        super().__init__()
        shape = (rows, positions, width) if positions else (rows, width)
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
        self.rows = numbers.to(torch.float64 if dtype == "float64" else torch.float32)
        self.global_batch_size = global_batch_size

    def train_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def val_dataloader(self) -> DataLoader:
        dataset: Dataset[Tensor] = self.rows  # pyright: ignore[reportAssignmentType]
        ranks = world_size()
        sampler = DistributedSampler(dataset, num_replicas=ranks, rank=self.trainer.global_rank, shuffle=False) if self.trainer else None
        return DataLoader(dataset, batch_size=self.global_batch_size // ranks, sampler=sampler)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()
