"""Prompts from a file or a data set, and plain functions that reward completions: RL without writing a datamodule.

    data:
      class_path: theodolite.datamodules.prompts.PromptDataModule
      init_args:
        prompts: questions.jsonl            # or hf:openai/gsm8k
        prompt_field: question
        rewards: [my_rewards.py:exact, my_rewards.py:short]
        weights: [1.0, 0.1]

Rewards have TRL's signature, ``f(prompts, completions, **columns) -> list[float | None]``, with every other column of the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from theodolite.protocols import Chat
from theodolite.provenance import content_hash

from .activations.documents import DocumentSplit
from .prompt_loaders import PromptLoaders
from .reward_functions import RewardFunctions

HUB_PREFIX = "hf:"
RESERVED = ("id", "prompt", "prompts", "completions")
"""Names that reward functions get by another way; a column of the data cannot have them."""


class PromptDataModule(PromptLoaders):
    """Prompts for RL and held-out ones, graded by reward functions.

    Args:
        prompts: A ``.jsonl`` file with one object per line, or ``hf:`` and a Hugging Face data set (a hub id or a local folder).
        rewards: Import paths of reward functions, ``package.module.function`` or ``path/to/file.py:function``.
        weights: One per function; null = 1 each. ``model.reward_weights`` can weigh them by name instead.
        prompts_per_step: Prompts per optimizer step over all ranks.
        prompt_field: Column with the prompt: a text, or a list of chat messages.
        id_field: Column whose values name the prompts; null = ``id`` if there is one, else their number.
        system: System message before every prompt; makes chats of texts.
        chat: Hand a text over as a user's message, through the policy's chat template.
        held_out_fraction: Share of the prompts, by a hash of their id, that training never sees.
        eval_prompts: Held-out prompts per evaluation; null = all.
        eval_prompts_per_step: Prompts per evaluation batch over all ranks.
        hub_split: ``hf:`` only: split to load.
        hub_config: ``hf:`` only: configuration of the data set, where it has several.
        passes_at: Reward from which a completion counts as passed.
        oracle: Import path of a function whose truthy values mean *correct*: measured, never trained on. null = what passes is correct.
        timeout_s: Seconds per reward function and call, after which that call's rewards are NaN.
        seed: Decides the order of training prompts; null = the run's ``seed_everything``.

    Raises:
        ValueError: A reward function cannot be imported, or a value is out of range.
        FileNotFoundError: There is no such file.
    """

    val_names: Sequence[str] = ("held_out",)
    test_names: Sequence[str] = ("held_out",)

    def __init__(
        self,
        prompts: str,
        rewards: list[str],
        weights: list[float] | None = None,
        prompts_per_step: int = 16,
        prompt_field: str = "prompt",
        id_field: str | None = None,
        system: str | None = None,
        chat: bool = False,
        held_out_fraction: float = 0.1,
        eval_prompts: int | None = None,
        eval_prompts_per_step: int = 64,
        hub_split: str = "train",
        hub_config: str | None = None,
        passes_at: float = 1.0,
        oracle: str | None = None,
        timeout_s: float = 60.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(RewardFunctions(rewards, weights, passes_at, oracle, timeout_s), prompts_per_step, eval_prompts_per_step, seed)
        if not prompts.startswith(HUB_PREFIX) and not prompts.endswith(".jsonl"):
            raise ValueError(f"data.prompts is {prompts!r}; give the path of a .jsonl file, or hf: and a data set's name.")
        if not prompts.startswith(HUB_PREFIX) and not Path(prompts).is_file():
            raise FileNotFoundError(f"There is no file of prompts {prompts}; give the path of a .jsonl file, or hf: and a data set's name.")
        if not 0 < held_out_fraction < 1:
            raise ValueError(f"data.held_out_fraction is {held_out_fraction}; it must lie between 0 and 1.")
        if eval_prompts is not None and eval_prompts < 1:
            raise ValueError(f"data.eval_prompts is {eval_prompts}; it must be at least 1, or null for all.")
        self.prompts, self.prompt_field, self.id_field, self.system, self.chat = prompts, prompt_field, id_field, system, chat
        self.hub_split, self.hub_config, self.eval_prompts = hub_split, hub_config, eval_prompts
        self.split = DocumentSplit(validation_share=held_out_fraction, test_share=0.0)
        self._rows: tuple[list[Any], list[Any]] | None = None

    def prepare_data(self) -> None:
        """Download a data set of the hub, on one rank per node."""
        if self.prompts.startswith(HUB_PREFIX):
            self._hub()

    @property
    def rows(self) -> tuple[list[Any], list[Any]]:
        """Training and held-out rows, read when they are first needed.

        Raises:
            ValueError: A row lacks its prompt, an id repeats, columns differ or cannot be handed to reward functions, or one side is empty.
        """
        if self._rows is None:
            rows = [
                self._row(number, row) for number, row in enumerate(self._hub() if self.prompts.startswith(HUB_PREFIX) else self._file())
            ]
            if len({row.id for row in rows}) < len(rows):
                raise ValueError(f"Ids of {self.prompts} repeat; name another data.id_field, or none to number the prompts.")
            sides = {side: [row for row in rows if self.split.of(row.id) == side] for side in ("train", "validation")}
            if not all(sides.values()):
                raise ValueError(
                    f"Of the {len(rows)} prompts of {self.prompts}, {len(sides['train'])} are left for training and "
                    f"{len(sides['validation'])} held out; give more prompts or another data.held_out_fraction."
                )
            self._rows = (sides["train"], sides["validation"])
        return self._rows

    @property
    def provenance(self) -> dict[str, Any]:
        """What was read, by content, and what rewards it; for the manifest."""
        train, held_out = self.rows
        return {
            "prompts": {"sha256": content_hash([vars(row) for row in (*train, *held_out)]), "train": len(train), "held_out": len(held_out)},
            "rewards": self._graders().described(),
        }

    def corpus(self) -> list[str]:
        """Texts of the training prompts, for a tokenizer that is trained on the spot."""
        prompts = [row.prompt for row in self.rows[0]]
        return [text for prompt in prompts for text in ([prompt] if isinstance(prompt, str) else [m["content"] for m in prompt])]

    def setup(self, stage: str) -> None:
        """Check the batch arithmetic, read the prompts and start the reward functions.

        Raises:
            ValueError: A global size does not split over the ranks, a row cannot be used, or there are too few for one step.
        """
        self.check_batches()
        train, _ = self.rows
        if stage == "fit" and len(train) < self.global_batch_size:
            raise ValueError(
                f"{self.prompts} has {len(train)} training prompts, too few for {self.global_batch_size} per step; lower "
                "data.prompts_per_step, or give more."
            )
        self.environment.start()

    def train_dataloader(self) -> StatefulDataLoader:
        """Lists of this rank's prompts, shuffled by ``(seed, epoch)``; resumes in the middle of an epoch."""
        return self._train_loader(_Rows(self.rows[0]))

    def val_dataloader(self) -> DataLoader:
        """Held-out prompts."""
        return self._eval_loader(_Rows(self.rows[1][: self.eval_prompts]))

    def test_dataloader(self) -> DataLoader:
        """As ``val_dataloader``."""
        return self.val_dataloader()

    def _graders(self) -> RewardFunctions:
        assert isinstance(self.environment, RewardFunctions)
        return self.environment

    def _file(self) -> Iterator[Mapping[str, Any]]:
        first: tuple[int, set[str]] | None = None
        # not splitlines: JSON texts may hold other line separators, such as U+2028, as they are
        for number, line in enumerate(Path(self.prompts).read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.prompts}, line {number} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{self.prompts}, line {number} is a {type(row).__name__}; give one object per line.")
            first = first or (number, set(row))
            _check_columns(f"{self.prompts}, line {number}", set(row), *first)
            yield row

    def _hub(self) -> Any:
        import datasets

        return datasets.load_dataset(self.prompts.removeprefix(HUB_PREFIX), self.hub_config, split=self.hub_split)

    def _row(self, number: int, row: Mapping[str, Any]) -> Any:
        where = f"Row {number} of {self.prompts}"
        id_field = self.id_field or ("id" if "id" in row else None)
        for name in (self.prompt_field, *([id_field] if id_field else [])):
            if name not in row:
                raise ValueError(
                    f"{where} has no {name!r}, only {', '.join(map(repr, row))}; name the right data.prompt_field and id_field."
                )
        columns = {name: value for name, value in row.items() if name not in (self.prompt_field, id_field)}
        clash = sorted(set(columns) & set(RESERVED))
        if clash:
            raise ValueError(f"{where} has a column {clash[0]!r}, which reward functions get by another way; rename it.")
        try:
            json.dumps(columns)
        except TypeError as error:
            raise ValueError(
                f"{where} cannot be handed to reward functions: {error}; keep to numbers, texts, lists and objects."
            ) from error
        name = str(number) if id_field is None else str(row[id_field])
        return SimpleNamespace(id=name, prompt=self._prompt(row[self.prompt_field], where), **columns)

    def _prompt(self, value: Any, where: str) -> str | Chat:
        if not value or not isinstance(value, str | list):
            raise ValueError(f"{where} has the prompt {value!r}; give a text, or a list of chat messages.")
        if isinstance(value, str) and not self.chat and self.system is None:
            return value
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else [dict(message) for message in value]
        return [*([{"role": "system", "content": self.system}] if self.system is not None else []), *messages]


def _check_columns(where: str, columns: set[str], line: int, expected: set[str]) -> None:
    differing = sorted(columns ^ expected)
    if differing:
        raise ValueError(
            f"{where} {'has' if differing[0] in columns else 'lacks'} the column {differing[0]!r}, other than line {line}; reward "
            "functions get one value per row, so give every line the same columns, with null where there is no value."
        )


class _Rows:
    """Rows by lists of indices."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Sequence[int], /) -> list[Any]:
        return [self.rows[index] for index in indices]
