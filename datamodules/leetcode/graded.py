"""What the RL and the SFT datamodule share: a checked environment and the held-out loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from theodolite.protocols import ContrastPair
from theodolite.sandbox import Limits

from ..prompt_loaders import PromptLoaders
from .grading import Grader
from .problem import Problem
from .sources import ProblemDataset, ProblemSource, count_problems


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


class GradedDataModule(PromptLoaders, ABC):
    """A datamodule with an ``environment`` and held-out problems; subclasses add what is trained on.

    Attributes:
        val_names: Names of the validation loaders, in order.
        test_names: Names of the test loaders, in order.
    """

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
        super().__init__(grader, batch_size, eval_prompts_per_step, seed)
        self._grader = grader
        self.eval_problems = eval_problems
        self.test_problems = test_problems
        self._source: ProblemSource | None = None

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

    def setup(self, stage: str) -> None:
        """Check the batch arithmetic, then start the environment and check it: on every problem of a file, on a few of a generator.

        Raises:
            ValueError: If a global size does not split over the ranks.
            RuntimeError: If the self-check fails: grading could not be trusted.
        """
        self.check_batches()
        if stage == "predict":
            return
        self._count("eval_problems")
        try:
            self._grader.start()
            self._grader.self_check(self.source.check_problems())
        except BaseException:
            self._grader.close()
            raise

    def train_dataloader(self) -> StatefulDataLoader:
        """Lists of this rank's rows, shuffled by ``(seed, epoch)``; resumes in the middle of an epoch."""
        return self._train_loader(self.train_dataset())  # type: ignore[arg-type]

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

    def contrast_pairs(self, n: int, seed: int) -> list[ContrastPair]:
        """``n`` pairs (hack, honest solution) on training problems, a function of ``seed`` (a ``PairSource``)."""
        return self.source.contrast_pairs(n, seed)

    def _count(self, name: str) -> int:
        return count_problems(getattr(self, name), self.source.n_held_out, name)
