"""A module that offers ``MaskedReconstruction`` and knows nothing of decompositions, and a datamodule for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from theodolite.distributed import world_size


class TinyReconstruction(LightningModule):
    """Two gated linear layers. A gate is ``g + (1 - g) source`` with g a function of the row; the second site has one channel more,
    which scales what the gates leave out.

    Args:
        width: Features, and channels of each site.
        kind: ``mse`` over elements or ``kl`` over positions.
        dtype: Of everything.
        dropout: Something that draws random numbers in training mode.
    """

    def __init__(
        self, width: int = 6, kind: Literal["mse", "kl"] = "mse", dtype: Literal["float32", "float64"] = "float64", dropout: float = 0.0
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        real = torch.float64 if dtype == "float64" else torch.float32
        matrices = {
            name: torch.randn(width, width, generator=generator, dtype=torch.float64).to(real) for name in ("first", "second", "gate")
        }
        self.matrices = nn.ParameterDict({name: nn.Parameter(matrix) for name, matrix in matrices.items()})
        self.dropout = nn.Dropout(dropout)
        self.width, self.kind = width, kind
        self.prepared = 0

    def leading_shape(self, batch: Tensor) -> tuple[int, ...]:
        return tuple(batch.shape[:-1])

    def source_channels(self) -> dict[str, int]:
        return {"first": self.width, "second": self.width + 1}

    def prepare(self, batch: Tensor) -> dict[str, Tensor]:
        self.prepared += 1
        with torch.no_grad():
            target = torch.tanh(batch @ self.matrices["first"]) @ self.matrices["second"]
            return {"batch": batch, "target": target, "importance": torch.sigmoid(batch @ self.matrices["gate"] - 1)}

    def loss_sum(self, prepared: Any, sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        g, target = prepared["importance"], prepared["target"]
        hidden = torch.tanh(prepared["batch"] @ self.matrices["first"] * (g + (1 - g) * sources["first"]))
        hidden = self.dropout(hidden)
        gate = g + (1 - g) * sources["second"][..., :-1]
        output = (hidden * gate) @ self.matrices["second"] + sources["second"][..., -1:] * (hidden * (1 - gate)) @ self.matrices["second"]
        if self.kind == "mse":
            return (output - target).square().sum(), target.numel()
        log_p, log_q = target.log_softmax(-1), output.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(), target.numel() // target.shape[-1]

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
