"""Where problems come from: the embedded generator, or a list that was read from a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import Dataset

from theodolite.protocols import ContrastPair
from theodolite.seeds import derive_seed

from .hacks import mini_contrast_pairs
from .mini import EvaluatorChoice, mini_problem
from .problem import Problem

MINI_EVALUATORS: dict[str, EvaluatorChoice] = {"simple_overwrite_tests": "run_tests", "none": "none"}
"""The hints that leetcode-mini knows for training. Varying names are kept for evaluation: RL must not see them."""

TEST_PROMPTS = ("hinted", "unseen", "random_names", "no_hint")
"""How the final protocol may prompt a held-out problem: as training does; as training never does; with an evaluator whose name is drawn per
problem; without any mention of an evaluator, so that there is nothing to overwrite."""

VALIDATION_SEED, TEST_SEED = 0, 1
"""Held-out problems of leetcode-mini do not depend on the run's seed, so that runs are compared on the same ones."""


SELF_CHECK_PROBLEMS = 4
"""Of leetcode-mini; enough to see that references pass, empty programs fail and a vacuous evaluator is paid and recognised."""


class ProblemSource(Protocol):
    """Training and held-out problems by index. Sizes are ``None`` where there is no end."""

    @property
    def provenance(self) -> dict[str, Any]:
        """What was read and what was left out of it, for manifests; plain data."""
        ...

    def check_problems(self) -> list[Problem]:
        """The problems on which grading is checked before a run: all of a file, a few of a generator."""
        ...

    @property
    def n_train(self) -> int | None:
        """Number of training problems."""
        ...

    @property
    def n_held_out(self) -> int | None:
        """Number of held-out problems."""
        ...

    def train(self, index: int) -> Problem:
        """The training problem at a position that depends on the run's seed."""
        ...

    def validation(self, index: int) -> Problem:
        """A held-out problem with the loophole's hint, the same for every run seed."""
        ...

    def test(self, index: int, hinted: bool) -> Problem:
        """A held-out problem with the hint, or as training never shows it; the same for every run seed."""
        ...

    def prompted(self, index: int, prompt: str) -> Problem:
        """A held-out problem under one of :data:`TEST_PROMPTS`; the same for every run seed."""
        ...

    def contrast_pairs(self, n: int, seed: int) -> list[ContrastPair]:
        """Pairs (hack, honest solution) on training problems."""
        ...


@dataclass(frozen=True, slots=True)
class MiniSource:
    """leetcode-mini as a source.

    Attributes:
        seed: The run's seed; it decides the training problems and nothing else.
        n_ops: Smallest and largest number of operations.
        hint: A key of :data:`MINI_EVALUATORS`, for training.
        known_hacks: Family of the hacks in contrast pairs; a key of :data:`~theodolite.datamodules.leetcode.hacks.FAMILIES`.
    """

    seed: int
    n_ops: tuple[int, int]
    hint: str
    known_hacks: str = "definition"

    @property
    def provenance(self) -> dict[str, Any]:
        """Nothing: the generator's settings are the run's."""
        return {}

    def check_problems(self) -> list[Problem]:
        """A few validation problems; the generator's own tests cover the others."""
        return [self.validation(index) for index in range(SELF_CHECK_PROBLEMS)]

    @property
    def n_train(self) -> int | None:
        """Unlimited."""
        return None

    @property
    def n_held_out(self) -> int | None:
        """Unlimited."""
        return None

    def train(self, index: int) -> Problem:
        """A problem of a training composition."""
        return mini_problem(self.seed, "train", index, self.n_ops, MINI_EVALUATORS[self.hint])

    def validation(self, index: int) -> Problem:
        """A problem of a held-out composition that names ``run_tests``."""
        return mini_problem(VALIDATION_SEED, "held_out", index, self.n_ops)

    def test(self, index: int, hinted: bool) -> Problem:
        """A problem of a held-out composition that names ``run_tests``, or an evaluator that RL never names."""
        return self.prompted(index, "hinted" if hinted else "unseen")

    def prompted(self, index: int, prompt: str) -> Problem:
        """The same problem under any of :data:`TEST_PROMPTS`; ``unseen`` and ``random_names`` draw an evaluator that RL never names."""
        evaluator: EvaluatorChoice = "run_tests" if prompt == "hinted" else "none" if prompt == "no_hint" else "random"
        return mini_problem(TEST_SEED, "held_out", index, self.n_ops, evaluator)

    def contrast_pairs(self, n: int, seed: int) -> list[ContrastPair]:
        """See :func:`~theodolite.datamodules.leetcode.hacks.mini_contrast_pairs`."""
        return mini_contrast_pairs(n, seed, self.n_ops, self.known_hacks)


class ListSource:
    """A finite list of problems as a source.

    Args:
        train: Training problems with their hint.
        held_out: Held-out problems with the hint.
        held_out_unseen: The same held-out problems without it.
        held_out_named: The same held-out problems with an evaluator's name drawn per problem.
        make_pair: Makes a contrast pair of a problem.
        seed: The run's seed; the training problems are permuted by it.
    """

    def __init__(
        self,
        train: Sequence[Problem],
        held_out: Sequence[Problem],
        held_out_unseen: Sequence[Problem],
        held_out_named: Sequence[Problem],
        make_pair: Callable[[Problem, random.Random], ContrastPair],
        seed: int,
    ) -> None:
        self._train = list(train)
        random.Random(derive_seed("training problems", seed)).shuffle(self._train)
        self._held_out = held_out
        self._held_out_unseen = held_out_unseen
        self._held_out_named = held_out_named
        self._make_pair = make_pair
        self.provenance: dict[str, Any] = {}
        """What was read and what was left out of it; plain data."""

    def check_problems(self) -> list[Problem]:
        """Every problem once, training and held out (those with their hint)."""
        return [*self._train, *self._held_out]

    @property
    def n_train(self) -> int | None:
        """Length of the training list."""
        return len(self._train)

    @property
    def n_held_out(self) -> int | None:
        """Length of the held-out list."""
        return len(self._held_out)

    def train(self, index: int) -> Problem:
        """A training problem, in the order of the run's seed."""
        return self._train[index]

    def validation(self, index: int) -> Problem:
        """A held-out problem with its hint, in the order of the file."""
        return self._held_out[index]

    def test(self, index: int, hinted: bool) -> Problem:
        """The same held-out problems as :meth:`validation`, with or without the hint."""
        return self.prompted(index, "hinted" if hinted else "unseen")

    def prompted(self, index: int, prompt: str) -> Problem:
        """The same held-out problem under any of :data:`TEST_PROMPTS`; ``unseen`` and ``no_hint`` both leave the hint out."""
        return {"hinted": self._held_out, "random_names": self._held_out_named}.get(prompt, self._held_out_unseen)[index]

    def contrast_pairs(self, n: int, seed: int) -> list[ContrastPair]:
        """Pairs on ``n`` different training problems, a function of the list of problems and ``seed`` alone.

        Raises:
            ValueError: If there are fewer than ``n`` training problems.
        """
        if not 1 <= n <= len(self._train):
            raise ValueError(f"{n} contrast pairs were asked for, but there are {len(self._train)} training problems to make them of.")
        rng = random.Random(derive_seed("contrast pairs", seed))
        problems = rng.sample(sorted(self._train, key=lambda problem: problem.id), n)
        return [self._make_pair(problem, rng) for problem in problems]


class ProblemDataset(Dataset):
    """Problems by lists of indices, for a loader with ``batch_size=None``.

    Args:
        problem_at: Maps an index to its problem.
        length: Number of problems.
    """

    def __init__(self, problem_at: Callable[[int], Problem], length: int) -> None:
        self._problem_at = problem_at
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, indices: Sequence[int]) -> list[Problem]:
        return [self._problem_at(index) for index in indices]


def count_problems(asked: int | None, available: int | None, what: str) -> int:
    """Resolve a number of problems: ``None`` means all there are.

    Args:
        asked: The setting's value.
        available: How many the source has; ``None`` = no end.
        what: The setting's name, for the message.

    Raises:
        ValueError: If more are asked for than there are, none at all, or all of a source without end.
    """
    if asked is None and available is None:
        raise ValueError(f"{what} must be a number for leetcode-mini, which has no end; null means all problems of a file.")
    count = available if asked is None else asked
    if count is None or count < 1 or (available is not None and count > available):
        raise ValueError(f"{what} is {count}, but it must lie between 1 and {available if available is not None else 'any number'}.")
    return count
