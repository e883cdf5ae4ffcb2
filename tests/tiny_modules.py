"""A model, a datamodule and a callback of a few lines, for tests of everything around them."""

from __future__ import annotations

import os
import signal
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from theodolite.batch_arithmetic import split_batch


class TinyModel(LightningModule):
    """A linear regression.

    Args:
        lr: Learning rate.
        width: Features.
        momentum: Of SGD; gives the optimizer a state.
        reduction: Of the loss.
        note: Anything.
    """

    def __init__(
        self, lr: float = 0.1, width: int = 4, momentum: float = 0.9, reduction: Literal["mean", "sum"] = "mean", note: str | None = None
    ):
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.momentum, self.reduction = lr, momentum, reduction
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}.")
        self.layer = torch.nn.Linear(width, 1)
        self.batch_arithmetic: Any = None

    def setup(self, stage: str) -> None:
        self.batch_arithmetic = split_batch(4, self.trainer.world_size)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square()
        loss = loss.mean() if self.reduction == "mean" else loss.sum()
        self.log("loss", loss, on_step=True, on_epoch=False, sync_dist=True)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("time/step_s", float(batch_idx))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).square().mean(), sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.layer(batch).square().mean(), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


class TinyData(LightningDataModule):
    """Rows of a fixed random matrix.

    Args:
        rows: Number of rows.
        width: Features.
        batch_size: Per rank.
        seed: Of the rows.
    """

    def __init__(self, rows: int = 16, width: int = 4, batch_size: int = 4, seed: int = 0):
        super().__init__()
        self.rows = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
        self.batch_size = batch_size

    def train_dataloader(self) -> StatefulDataLoader:
        assert self.trainer is not None
        sampler = DistributedSampler(self.rows, self.trainer.world_size, self.trainer.global_rank, shuffle=False, drop_last=True)  # pyright: ignore[reportArgumentType]
        return StatefulDataLoader(self.rows, batch_size=self.batch_size, sampler=sampler)  # pyright: ignore[reportArgumentType]

    def val_dataloader(self) -> StatefulDataLoader:
        return StatefulDataLoader(self.rows, batch_size=self.batch_size)  # pyright: ignore[reportArgumentType]

    test_dataloader = predict_dataloader = val_dataloader


class TinyCallback(Callback):
    """Does nothing with its arguments.

    Args:
        strength: A number.
        when: A choice.
    """

    def __init__(self, strength: float = 1.0, when: Literal["before", "after"] = "before"):
        super().__init__()
        self.strength, self.when = strength, when


class SignalAt(Callback):
    """Sends this process a signal at the start of a batch.

    Args:
        batch: Index over the whole run.
        name: Of the signal.
    """

    def __init__(self, batch: int, name: str = "SIGKILL"):
        super().__init__()
        self.batch, self.name = batch, name

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.batch:
            os.kill(os.getpid(), getattr(signal, self.name))


class KillAfterSave(Logger):
    """Kills this process when a checkpoint has just been written and its batch's row has not: the worst moment.

    Args:
        step: Optimizer steps in the checkpoint.
    """

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    @property
    def name(self) -> str:
        return "kill"

    @property
    def version(self) -> str:
        return ""

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        if checkpoint_callback._last_global_step_saved == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


class NeedsOne(TinyModel):
    """A model with an argument that has no default.

    Args:
        needed: Anything.
    """

    def __init__(self, needed: int):
        super().__init__()
        self.needed = needed


class ScheduledModel(TinyModel):
    """A model whose learning rate follows a schedule."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class DecayingModel(TinyModel):
    """A model whose learning rate is a factor of its base rate at each step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class FailsInSetup(TinyModel):
    """A model whose files are missing."""

    def setup(self, stage: str) -> None:
        raise FileNotFoundError("no such data")
