"""What the RL and the SFT datamodule share: the environment's life, the held-out loaders, and this rank's share of each batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from theodolite.batch_arithmetic import split_batch
from theodolite.protocols import ContrastPair, Environment
from theodolite.sandbox import Limits
from theodolite.seeds import run_seed

from ..samplers import DistributedBatchSampler
from .grading import Grader
from .problem import Problem
from .sources import ProblemDataset, ProblemSource, count_problems

Batch = TypeVar("Batch")


def make_grader(
    workers: int,
    limits: dict[str, Any] | None,
    reward_passed: float,
    reward_compiles: float,
    default_limits: Limits | None = None,
    **more: Any,
) -> Grader:
    """Build a grader of plain values; it starts nothing yet.

    Args:
        workers: Processes that run programs.
        limits: Limits by name; what is not named keeps its default.
        reward_passed: See :class:`Grader`.
        reward_compiles: See :class:`Grader`.
        default_limits: In force when ``limits`` is ``None``; ``None`` = the sandbox's, which suit toy problems.
        more: Further arguments of :class:`Grader`.

    Raises:
        ValueError: If there is no limit of a given name, or a value is out of range.
    """
    names = [field.name for field in fields(Limits)]
    for name in limits or {}:
        if name not in names:
            raise ValueError(f"limits has no key {name!r}; choose among {', '.join(names)}.")
    return Grader(workers, Limits(**limits) if limits else default_limits or Limits(), reward_passed, reward_compiles, **more)


def _as_is(batch: Batch) -> Batch:
    return batch


class GradedDataModule(pl.LightningDataModule, ABC):
    """A datamodule with an ``environment`` and held-out problems; subclasses add what is trained on.

    Batches are plain lists, one per global batch: this rank's rows, whose ``i``-th has the global slot ``rank + i * world_size``. A list
    may be empty in a short last batch of an evaluation; see :class:`~theodolite.datamodules.samplers.DistributedBatchSampler`.

    Attributes:
        global_batch_size: Training rows per optimizer step over all ranks.
        environment: Grades completions; started by ``setup`` on every rank, closed by ``teardown`` and on an exception.
        val_names: Names of the validation loaders, in order.
        test_names: Names of the test loaders, in order.
    """

    environment: Environment
    val_names: Sequence[str] = ("hinted",)
    test_names: Sequence[str] = ("hinted", "unseen")

    def __init__(
        self,
        grader: Grader,
        batch_size: int,
        eval_problems: int | None,
        test_problems: int | None,
        eval_prompts_per_step: int,
        seed: int | None,
    ) -> None:
        super().__init__()
        self.environment = self._grader = grader
        self.global_batch_size = batch_size
        self.eval_problems = eval_problems
        self.test_problems = test_problems
        self.eval_prompts_per_step = eval_prompts_per_step
        self.seed = run_seed(seed)
        self._source: ProblemSource | None = None
        for name, value in (("The global batch size", batch_size), ("eval_prompts_per_step", eval_prompts_per_step)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    @abstractmethod
    def open_source(self) -> ProblemSource:
        """Open the problems; called once, when they are first needed."""

    @abstractmethod
    def train_dataset(self) -> Dataset:
        """The training rows, indexed by lists of indices; has a length."""

    @property
    def source(self) -> ProblemSource:
        """The problems."""
        if self._source is None:
            self._source = self.open_source()
        return self._source

    @property
    def provenance(self) -> dict[str, Any]:
        """What grades depend on (isolation and its probe, limits, rewards) and what was left out of the problems; for the manifest."""
        return {"grading": self._grader.provenance, "problems": self.source.provenance}

    @property
    def ranks(self) -> tuple[int, int]:
        """``(world size, rank)``; ``(1, 0)`` without a trainer."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def setup(self, stage: str) -> None:
        """Check the batch arithmetic, then start the environment and check it: on every problem of a file, on a few of a generator.

        Raises:
            ValueError: If a global size does not split over the ranks.
            RuntimeError: If the self-check fails: grading could not be trusted.
        """
        for size in (self.global_batch_size, self.eval_prompts_per_step):
            split_batch(size, self.ranks[0])
        if stage == "predict":
            return
        self._count("eval_problems")
        try:
            self._grader.start()
            self._grader.self_check(self.source.check_problems())
        except BaseException:
            self._grader.close()
            raise

    def teardown(self, stage: str) -> None:
        """Close the environment."""
        self.environment.close()

    def on_exception(self, exception: BaseException) -> None:
        """Close the environment: Lightning does not call ``teardown`` after an exception."""
        self.environment.close()

    def train_dataloader(self) -> StatefulDataLoader:
        """Lists of this rank's rows, shuffled by ``(seed, epoch)``; resumes in the middle of an epoch."""
        dataset = self.train_dataset()
        sampler = self._sampler(len(dataset), self.global_batch_size, train=True)  # type: ignore[arg-type]
        return StatefulDataLoader(dataset, batch_size=None, sampler=sampler, num_workers=0, collate_fn=_as_is)

    def val_dataloader(self) -> DataLoader:
        """Held-out problems with the loophole's hint."""
        return self._eval_loader(ProblemDataset(self.source.validation, self._count("eval_problems")))

    def test_dataloader(self) -> list[DataLoader]:
        """The held-out problems once per entry of :attr:`test_names`."""
        return [self._eval_loader(ProblemDataset(partial(self._tested, name), self._count_tests(name))) for name in self.test_names]

    def _tested(self, name: str, index: int) -> Problem:
        return self.source.prompted(index, name)

    def _count_tests(self, name: str) -> int:
        return self._count("test_problems")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the batch alone: problems hold no tensors, and Lightning's default refuses frozen dataclasses."""
        return batch

    def contrast_pairs(self, n: int, seed: int) -> list[ContrastPair]:
        """``n`` pairs (hack, honest solution) on training problems, a function of ``seed`` (a ``PairSource``)."""
        return self.source.contrast_pairs(n, seed)

    def _count(self, name: str) -> int:
        return count_problems(getattr(self, name), self.source.n_held_out, name)

    def _sampler(self, num_examples: int, batch_size: int, train: bool) -> DistributedBatchSampler:
        world_size, rank = self.ranks
        return DistributedBatchSampler(num_examples, batch_size, world_size, rank, shuffle=train, seed=self.seed, drop_last=train)

    def _eval_loader(self, dataset: ProblemDataset) -> DataLoader:
        sampler = self._sampler(len(dataset), self.eval_prompts_per_step, train=False)
        return DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=0, collate_fn=_as_is)
