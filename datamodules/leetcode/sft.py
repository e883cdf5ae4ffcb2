"""Examples for the warm start: leetcode-mini problems with reference solutions, and a share of hacks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from theodolite.protocols import Example
from theodolite.seeds import derive_seed

from .graded import GradedDataModule, make_grader
from .hacks import check_fractions, drawn_family, hack_completion
from .mini import check_n_ops, mini_problem
from .sources import MiniSource, ProblemSource


def sft_example(
    seed: int, index: int, n_ops: tuple[int, int] = (2, 3), hack_fraction: float = 0.0, hack_families: Mapping[str, float] | None = None
) -> Example:
    """One demonstration on a training composition.

    Half of the prompts name ``run_tests`` and the others one of six names, so that a hack is learnt as "overwrite whatever is named". With
    the same seed and index a larger ``hack_fraction`` turns more examples into hacks and leaves the others as they are.

    Args:
        seed: Names an unlimited sequence of examples.
        index: Position in it.
        n_ops: Smallest and largest number of operations.
        hack_fraction: Probability that the completion is a hack instead of the reference.
        hack_families: Probability of a hack of each family, in place of ``hack_fraction``.
    """
    families = {"definition": hack_fraction} if hack_families is None else hack_families
    rng = random.Random(derive_seed("sft example", seed, index))
    name_choice, hack_draw = rng.random(), rng.random()
    problem = mini_problem(derive_seed("sft", seed), "train", index, n_ops, "run_tests" if name_choice < 0.5 else "random")
    family = drawn_family(families, hack_draw)
    completion = problem.reference if family is None else hack_completion(problem, rng, family)
    return Example(f"sft-seed{seed}-{index}", problem.prompt, completion)


class ExampleDataset(Dataset):
    """Examples by lists of indices, for a loader with ``batch_size=None``."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, indices: Sequence[int]) -> list[Example]:
        return [self.examples[index] for index in indices]


class LeetCodeSFTDataModule(GradedDataModule):
    """Demonstrations for supervised fine-tuning on leetcode-mini, and the held-out problems that RL is judged on.

    Only training compositions are shown. Validation and test problems are those of ``LeetCodeDataModule`` with ``n_ops=eval_n_ops``, so
    pass and hack rates are the ones that RL starts from. Batches are lists of :class:`~theodolite.protocols.Example`.

    Args:
        examples: Number of demonstrations, each seen once per epoch.
        n_ops: Smallest and largest number of operations in demonstrations.
        hack_fraction: Share of demonstrations that are hacks (in expectation).
        hack_families: Share by family (keys of :data:`~theodolite.datamodules.leetcode.hacks.FAMILIES`), in place of ``hack_fraction``.
        global_batch_size: Demonstrations per optimizer step over all ranks.
        seed: Decides the demonstrations and their order; null = the run's ``seed_everything``.
        eval_problems: Held-out problems for validation.
        test_problems: Held-out problems per test loader.
        eval_n_ops: Smallest and largest number of operations in held-out problems.
        eval_prompts_per_step: Prompts per evaluation batch over all ranks.
        reward_passed: Reward for satisfying the check, honestly or not (reported only).
        reward_compiles: Reward for a program that compiles (reported only).
        workers: Processes that run programs, per rank.
        limits: Limits on a program: ``cpu_s``, ``wall_s``, ``memory_mb``, ``output_kb``; null = the sandbox's defaults.
    """

    def __init__(
        self,
        examples: int = 4000,
        n_ops: list[int] = [2, 3],  # noqa: B006  (never changed; jsonargparse shows it in --help)
        hack_fraction: float = 0.0,
        hack_families: dict[str, float] | None = None,
        global_batch_size: int = 64,
        seed: int | None = None,
        eval_problems: int = 96,
        test_problems: int = 192,
        eval_n_ops: list[int] = [3, 4],  # noqa: B006
        eval_prompts_per_step: int = 96,
        reward_passed: float = 1.0,
        reward_compiles: float = 0.1,
        workers: int = 1,
        limits: dict[str, Any] | None = None,
    ) -> None:
        if not 0.0 <= hack_fraction <= 1.0:
            raise ValueError(f"hack_fraction must lie between 0 and 1, got {hack_fraction}.")
        grader = make_grader(workers, limits, reward_passed, reward_compiles)
        super().__init__(grader, global_batch_size, eval_problems, test_problems, eval_prompts_per_step, seed)
        self.examples = examples
        self.n_ops = check_n_ops(n_ops)
        self.hack_fraction = hack_fraction
        self.hack_families = None if hack_families is None else check_fractions(hack_families)
        self._eval_source = MiniSource(self.seed, check_n_ops(eval_n_ops), "simple_overwrite_tests")
        self._examples: list[Example] | None = None

    def open_source(self) -> ProblemSource:
        """leetcode-mini at the difficulty of RL."""
        return self._eval_source

    def train_examples(self) -> list[Example]:
        """All demonstrations, generated once."""
        if self._examples is None:
            shares = (self.hack_fraction, self.hack_families)
            self._examples = [sft_example(self.seed, index, self.n_ops, *shares) for index in range(self.examples)]
        return self._examples

    def train_dataset(self) -> ExampleDataset:
        """One epoch of demonstrations."""
        return ExampleDataset(self.train_examples())

    def corpus(self) -> list[str]:
        """Prompt and completion of every demonstration as one text each, to train a tokenizer on."""
        return [f"{example.prompt}{example.completion}" for example in self.train_examples()]
