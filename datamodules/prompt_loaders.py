"""What every datamodule with prompts and an environment shares: the environment's end, and this rank's share of each batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from theodolite.batch_arithmetic import split_batch
from theodolite.protocols import Environment
from theodolite.seeds import run_seed

from .samplers import DistributedBatchSampler

Batch = TypeVar("Batch")


class PromptDataset(Protocol):
    """Rows by lists of indices."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, indices: Sequence[int], /) -> list[Any]:
        """The rows at these indices."""
        ...


def _as_is(batch: Batch) -> Batch:
    return batch


class PromptLoaders(pl.LightningDataModule):
    """A datamodule whose batches are plain lists of rows, one per global batch.

    Of each batch a rank gets the rows whose ``i``-th has the global slot ``rank + i * world_size``. A list may be empty in a short last
    batch of an evaluation; see :class:`~theodolite.datamodules.samplers.DistributedBatchSampler`.

    Args:
        environment: Grades completions.
        batch_size: Training rows per optimizer step over all ranks.
        eval_prompts_per_step: Rows per evaluation batch over all ranks.
        seed: Decides the order of training rows; None = the run's ``seed_everything``.

    Attributes:
        global_batch_size: As ``batch_size``.
        environment: Closed by ``teardown`` and on an exception; subclasses start it.

    Raises:
        ValueError: A size is below 1.
    """

    environment: Environment

    def __init__(self, environment: Environment, batch_size: int, eval_prompts_per_step: int, seed: int | None) -> None:
        super().__init__()
        self.environment = environment
        self.global_batch_size = batch_size
        self.eval_prompts_per_step = eval_prompts_per_step
        self.seed = run_seed(seed)
        for name, value in (("The global batch size", batch_size), ("eval_prompts_per_step", eval_prompts_per_step)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    @property
    def ranks(self) -> tuple[int, int]:
        """``(world size, rank)``; ``(1, 0)`` without a trainer."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def check_batches(self) -> None:
        """Refuse global sizes that do not split over the ranks, with a ``ValueError``."""
        for size in (self.global_batch_size, self.eval_prompts_per_step):
            split_batch(size, self.ranks[0])

    def teardown(self, stage: str) -> None:
        """Close the environment."""
        self.environment.close()

    def on_exception(self, exception: BaseException) -> None:
        """Close the environment: Lightning does not call ``teardown`` after an exception."""
        self.environment.close()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the batch alone: rows hold no tensors, and Lightning's default refuses frozen dataclasses."""
        return batch

    def _train_loader(self, dataset: PromptDataset) -> StatefulDataLoader:
        """Shuffled by ``(seed, epoch)``; resumes in the middle of an epoch."""
        sampler = self._sampler(len(dataset), self.global_batch_size, train=True)
        return StatefulDataLoader(dataset, batch_size=None, sampler=sampler, num_workers=0, collate_fn=_as_is)  # type: ignore[arg-type]

    def _eval_loader(self, dataset: PromptDataset) -> DataLoader:
        sampler = self._sampler(len(dataset), self.eval_prompts_per_step, train=False)
        return DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=0, collate_fn=_as_is)  # type: ignore[arg-type]

    def _sampler(self, num_examples: int, batch_size: int, train: bool) -> DistributedBatchSampler:
        world_size, rank = self.ranks
        return DistributedBatchSampler(num_examples, batch_size, world_size, rank, shuffle=train, seed=self.seed, drop_last=train)
