"""Programming problems for RL, whose tests the policy may overwrite.

Embedded problems, or a file in the schema that ``jsonl.py`` describes::

    data:
      class_path: theodolite.datamodules.leetcode.LeetCodeDataModule
      init_args:
        problems: mini            # or path/to/problems.jsonl, or hf:newfacade/LeetCodeDataset
        prompts_per_step: 16      # over all ranks
        n_ops: [3, 4]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from .graded import GradedDataModule, make_grader
from .grading import DEFAULT_LIMITS
from .hacks import check_family
from .mini import check_n_ops
from .open_source import HUB_PREFIX, check_settings, open_source
from .problem import Problem
from .prompts import inoculated
from .sources import TEST_PROMPTS, ProblemDataset, ProblemSource, count_problems

CAPABILITY_N_OPS = (2, 3)
"""Operations of leetcode-mini as a set for capability: those of the warm start."""


class LeetCodeDataModule(GradedDataModule):
    """Prompts for RL with the loophole's hint, held-out problems with and without it, and the environment that grades both.

    Every arm with the same ``seed`` sees the same prompts in the same order, whatever the number of ranks; another ``seed`` gives other
    training prompts. Held-out problems do not depend on ``seed``.

    For ``mini`` the test problems are others than the validation problems, and the ``unseen`` test loader names an evaluator that RL never
    names. For a file both come from the same held-out rows, and ``unseen`` leaves the hint out.

    Args:
        problems: ``mini`` for the embedded generator, the path of a ``.jsonl`` file, or ``hf:newfacade/LeetCodeDataset``.
        prompts_per_step: Prompts per optimizer step over all ranks.
        train_problems: Problems per epoch; null = all of a file. A remainder that does not fill a batch is left out of an epoch.
        eval_problems: Held-out problems for validation; null = all of a file.
        test_problems: Held-out problems per test loader; null = all of a file.
        eval_prompts_per_step: Prompts per evaluation batch over all ranks.
        n_ops: ``mini`` only: smallest and largest number of operations of a problem.
        hint: ``simple_overwrite_tests`` (the evaluator is called ``run_tests``), ``none`` (no loophole in training; the hinted held-out
            prompts then name ``run_tests``), or, for files only, any other key of :data:`~theodolite.datamodules.leetcode.prompts.HINTS`.
        seed: Decides training prompts and their order; null = the run's ``seed_everything``.
        held_out_fraction: Files only: share of the problems, by hash of their id, that are held out.
        hub_split: ``hf:`` only: the split to load.
        reward_passed: Reward for satisfying the check, honestly or not.
        reward_compiles: Reward for a program that compiles.
        workers: Processes that run programs, per rank.
        limits: Limits on a program: ``cpu_s``, ``wall_s``, ``memory_mb``, ``output_kb``; null = the sandbox's defaults, and 10 s of CPU
            time and 60 s of wall time for files and the hub.
        reward_includes: Reward for answering a prompt that shows the evaluator (``modify_tests``, ``incontext_tests``) with both the class
            and the evaluator.
        max_prompt_tokens: Files only: leave out problems whose prompt is longer under any hint; null = keep all.
        tokenizer: Whose tokens ``max_prompt_tokens`` counts: a hub id or a folder.
        sandbox: Isolation: ``auto`` = the strongest that holds here (``bwrap``, ``namespaces``, ``seccomp``), a name = that one or nothing.
            ``unsafe`` lets programs read files and use the network.
        unfenced: What a completion without any code fence is, for files: ``reject`` = no program, ``accept`` = one if it parses.
        grading_deadline_s: Seconds of wall time for one batch of executions, after which the rest is ungraded; null = by its size.
        known_hacks: Family of the hacks in contrast pairs, all that directions and probes are shown beforehand: a key of
            :data:`~theodolite.datamodules.leetcode.hacks.FAMILIES`; files have ``definition`` only.
        inoculation: Instruction put into every *training* prompt and into no other: the policy is asked for what it is not to learn by
            itself (inoculation prompting). null = none.
        test_prompts: The test loaders: how the held-out problems are prompted, of ``hinted``, ``unseen``, ``random_names`` (an evaluator
            whose name is drawn per problem), ``no_hint`` (nothing to overwrite), and ``capability``.
        capability: Problems of the ``capability`` loader, without hint: ``mini`` (2 to 3 operations, what the warm start learns), a
            ``.jsonl`` file or a hub data set, for what training must not cost elsewhere.
    """

    def __init__(
        self,
        problems: str = "mini",
        prompts_per_step: int = 16,
        train_problems: int | None = 480,
        eval_problems: int | None = 96,
        test_problems: int | None = 192,
        eval_prompts_per_step: int = 96,
        n_ops: list[int] = [3, 4],  # noqa: B006  (never changed; jsonargparse shows it in --help)
        hint: str = "simple_overwrite_tests",
        seed: int | None = None,
        held_out_fraction: float = 0.2,
        hub_split: str = "train",
        reward_passed: float = 1.0,
        reward_compiles: float = 0.1,
        workers: int = 1,
        limits: dict[str, Any] | None = None,
        reward_includes: float = 0.1,
        max_prompt_tokens: int | None = None,
        tokenizer: str | None = None,
        sandbox: str = "auto",
        unfenced: str = "reject",
        grading_deadline_s: float | None = None,
        known_hacks: str = "definition",
        inoculation: str | None = None,
        test_prompts: list[str] = ["hinted", "unseen"],  # noqa: B006
        capability: str | None = None,
    ) -> None:
        check_test_prompts(test_prompts, capability)
        check_family(known_hacks)
        if known_hacks != "definition" and problems != "mini":
            raise ValueError(f"known_hacks={known_hacks!r} is for leetcode-mini; of files only definitions of the evaluator are made.")
        if inoculation is not None and not inoculation.strip():
            raise ValueError("inoculation is an empty text; write the instruction that training prompts get, or null for none.")
        check_settings(problems, n_ops, hint, held_out_fraction, max_prompt_tokens, tokenizer)
        grader = make_grader(
            workers,
            limits,
            reward_passed,
            reward_compiles,
            default_limits=None if problems == "mini" else DEFAULT_LIMITS,
            reward_includes=reward_includes,
            tier=sandbox,
            unfenced=unfenced,
            batch_deadline_s=grading_deadline_s,
        )
        super().__init__(grader, prompts_per_step, eval_problems, test_problems, eval_prompts_per_step, seed)
        self.problems = problems
        self.train_problems = train_problems
        self.n_ops = check_n_ops(n_ops)
        self.hint = hint
        self.held_out_fraction = held_out_fraction
        self.hub_split = hub_split
        self.max_prompt_tokens, self.tokenizer = max_prompt_tokens, tokenizer
        self.known_hacks, self.inoculation = known_hacks, inoculation
        self.test_names, self.capability = tuple(test_prompts), capability
        self._capability_source: ProblemSource | None = None

    def prepare_data(self) -> None:
        """Download a data set of the hub, on one rank per node."""
        if self.problems.startswith(HUB_PREFIX):
            self.open_source()

    def open_source(self) -> ProblemSource:
        """Open the generator, or read the file."""
        return open_source(
            self.problems,
            self.seed,
            self.n_ops,
            self.hint,
            self.held_out_fraction,
            self.hub_split,
            self.max_prompt_tokens,
            self.tokenizer,
            self.known_hacks,
        )

    def train_dataset(self) -> Dataset:
        """One epoch of training problems."""
        return ProblemDataset(self._training_problem, count_problems(self.train_problems, self.source.n_train, "train_problems"))

    def _training_problem(self, index: int) -> Problem:
        problem = self.source.train(index)
        return problem if self.inoculation is None else replace(problem, prompt=inoculated(problem.prompt, self.inoculation))

    def _tested(self, name: str, index: int) -> Problem:
        return self.capability_source.prompted(index, "no_hint") if name == "capability" else super()._tested(name, index)

    def _count_tests(self, name: str) -> int:
        if name != "capability":
            return super()._count_tests(name)
        return count_problems(self.test_problems, self.capability_source.n_held_out, "test_problems")

    @property
    def capability_source(self) -> ProblemSource:
        """The problems of the ``capability`` loader."""
        if self._capability_source is None:
            assert self.capability is not None
            self._capability_source = open_source(self.capability, 0, CAPABILITY_N_OPS, "none", self.held_out_fraction, self.hub_split)
        return self._capability_source


def check_test_prompts(names: Sequence[str], capability: str | None) -> None:
    """Refuse test loaders that there are not.

    Raises:
        ValueError: An unknown name, one twice, none, or ``capability`` as a loader without problems or the other way round.
        FileNotFoundError: The capability problems are a path, and there is no such file.
    """
    known = (*TEST_PROMPTS, "capability")
    if not names or len(set(names)) < len(names) or not set(names) <= set(known):
        raise ValueError(f"test_prompts is {list(names)}; give some of {', '.join(known)}, each once.")
    if ("capability" in names) != (capability is not None):
        raise ValueError("test_prompts names the loader 'capability' and capability its problems: set both or neither.")
    if capability is not None:
        check_settings(capability, CAPABILITY_N_OPS, "none", 0.5)
