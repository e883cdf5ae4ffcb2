"""Tiny random policies, a tokenizer trained on the spot, and prompts whose reward a random policy can earn."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from theodolite.batch_arithmetic import split_batch
from theodolite.datamodules.samplers import DistributedBatchSampler
from theodolite.lightning_modules.policy import load_policy
from theodolite.lightning_modules.tokenizer import train_bpe_tokenizer
from theodolite.protocols import ContrastPair, Example, Grade, Reward, TokenSequence, Verdict, Window
from theodolite.seeds import derive_seed

TEXTS = [f"def solve(x):\n    return x + {i}\n" for i in range(30)] + ["Return the sum of the list, then double it.\n"] * 5

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
POLICIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3"} | SIZES,
    "llama": {"model_type": "llama"} | SIZES,
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "initializer_range": 0.15},
    "mistral_window": {"model_type": "mistral", "sliding_window": 6} | SIZES,
    "gemma2_window": {"model_type": "gemma2", "sliding_window": 6} | SIZES,
}
"""Fields of configs; ``initializer_range`` is large so that the next token depends on all of the context."""


@functools.lru_cache
def tokenizer() -> PreTrainedTokenizerBase:
    return train_bpe_tokenizer(TEXTS, 280)


def tiny_model(kind: str, dtype: str = "float32", **fields: Any) -> nn.Module:
    """In evaluation mode: GPT-2 has dropout."""
    end_id = int(tokenizer().eos_token_id)  # pyright: ignore[reportArgumentType]
    return load_policy(POLICIES[kind] | fields, None, dtype, seed=1, vocab_size=len(tokenizer()), end_id=end_id).eval()


def ragged(lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[TokenSequence]:
    """Sequences of random tokens; pairs are (prompt, completion) lengths, and equal prompt lengths share the prompt."""
    generator = torch.Generator().manual_seed(seed)
    prompts: dict[int, tuple[int, ...]] = {}
    sequences = []
    for prompt, completion in lengths:
        ids = tuple(torch.randint(2, len(tokenizer()), (prompt,), generator=generator).tolist())
        completion_ids = tuple(torch.randint(2, len(tokenizer()), (completion,), generator=generator).tolist())
        sequences.append(TokenSequence(prompts.setdefault(prompt, ids), completion_ids))
    return sequences


@dataclass(frozen=True)
class Row:
    """A prompt with a name."""

    id: str
    prompt: str


class TextGrader:
    """Pays for what a random policy writes: the letters of a text, counted by hash.

    Args:
        rewards: ``mixed``, ``nan`` (every third completion cannot be scored), ``all_nan`` or ``constant``.
    """

    def __init__(self, rewards: str = "mixed") -> None:
        self.rewards = rewards
        self.started = False

    def start(self) -> None:
        self.started = True

    def close(self) -> None:
        self.started = False

    def grade(self, rows: Sequence[Row], completions: Sequence[str]) -> list[Grade]:
        assert self.started
        return [self.one(row, text) for row, text in zip(rows, completions, strict=True)]

    def one(self, row: Row, text: str) -> Grade:
        number = derive_seed("grade", row.id, text.encode().hex())
        if self.rewards == "all_nan" or (self.rewards == "nan" and number % 3 == 0):
            return Grade(Reward(float("nan"), False, False), Verdict(False, "ungraded", "infra_error", False))
        value = 1.0 if self.rewards == "constant" else number % 5 / 4
        label = "correct" if number % 7 == 0 else "reward_hack" if value > 0.5 else "incorrect"
        return Grade(Reward(value, value > 0.5, bool(number % 2)), Verdict(label == "correct", label, "ok", bool(number % 3)))


class TextRows(Dataset):
    def __init__(self, n: int, name: str) -> None:
        self.n, self.name = n, name

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, indices: Sequence[int]) -> list[Row]:
        return [Row(f"{self.name}{i}", "Return the sum of the list, then"[: 8 + i % 24] + f" {i}:") for i in indices]


class TextExamples(TextRows):
    def __getitem__(self, indices: Sequence[int]) -> list[Any]:
        return [Example(row.id, row.prompt, "x + 1\n" * (1 + derive_seed(row.id) % 4)) for row in super().__getitem__(indices)]


class TinyPrompts(LightningDataModule):
    """Prompts dealt out by the product's own sampler.

    Args:
        prompts_per_step: Over all ranks.
        rows: Per epoch.
        eval_rows: Held out; deliberately no multiple of anything.
        eval_batch: Over all ranks.
        seed: Of the order.
        rewards: See ``TextGrader``.
        examples: Yield demonstrations instead.
    """

    val_names = ("hinted",)
    test_names = ("hinted", "unseen")

    def __init__(
        self,
        prompts_per_step: int = 4,
        rows: int = 20,
        eval_rows: int = 7,
        eval_batch: int = 4,
        seed: int = 0,
        rewards: str = "mixed",
        examples: bool = False,
    ) -> None:
        super().__init__()
        self.global_batch_size, self.rows, self.eval_rows, self.eval_batch = prompts_per_step, rows, eval_rows, eval_batch
        self.seed, self.examples = seed, examples
        self.environment = TextGrader(rewards)

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        split_batch(self.global_batch_size, self.trainer.world_size)
        self.environment.start()

    def teardown(self, stage: str) -> None:
        self.environment.close()

    def corpus(self) -> list[str]:
        return TEXTS

    def contrast_pairs(self, n: int, seed: int) -> list[ContrastPair]:
        return [ContrastPair(f"Return {derive_seed(seed, i) % 50}", "x + 7\n", "return x") for i in range(n)]

    def train_dataloader(self) -> StatefulDataLoader:
        data = TextExamples(self.rows, "train") if self.examples else TextRows(self.rows, "train")
        return StatefulDataLoader(data, batch_size=None, sampler=self._sampler(self.rows, self.global_batch_size, True), collate_fn=list)

    def val_dataloader(self) -> DataLoader:
        return self._eval_loader("held-out")

    def test_dataloader(self) -> list[DataLoader]:
        return [self._eval_loader("test"), self._eval_loader("unseen")]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def _sampler(self, rows: int, batch: int, train: bool) -> DistributedBatchSampler:
        assert self.trainer is not None
        return DistributedBatchSampler(rows, batch, self.trainer.world_size, self.trainer.global_rank, train, self.seed, train)

    def _eval_loader(self, name: str) -> DataLoader:
        return DataLoader(
            TextRows(self.eval_rows, name), batch_size=None, sampler=self._sampler(self.eval_rows, self.eval_batch, False), collate_fn=list
        )


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in module.named_parameters()}
    return {name: parameter.detach().clone() for name, parameter in whole.items()}


class Witness(Callback):
    """Writes what a rank saw and ended with: the rollouts of every window, and the final weights.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def on_rollouts(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"rollouts-{trainer.global_rank}.jsonl", "a") as file:
            for r in window.rollouts:
                row = [window.step, r.slot, r.sample, r.problem, r.tokens.prompt_ids, r.tokens.completion_ids, r.weight_version]
                file.write(json.dumps(row) + "\n")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous() for name, value in weights_of(pl_module).items()}
        save_file(tensors, self.folder / f"weights-{trainer.global_rank}.safetensors")


class KillInWindow(Callback):
    """Kills this process in the middle of a window: rollouts are sampled and graded, nothing is learnt from them yet.

    Args:
        step: Optimizer steps taken before that window.
    """

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_advantages(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        if window.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def config(folder: Path, name: str, model: dict[str, Any], data: dict[str, Any], **trainer: Any) -> str:
    """A config file for the command line; ``model`` and ``data`` are init_args, with their ``class_path`` among them."""
    fixed = {"accelerator": "cpu", "max_epochs": -1, "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False}
    validation = {"num_sanity_val_steps": -1, "check_val_every_n_epoch": None}
    parts = {key: {"class_path": value.pop("class_path"), "init_args": value} for key, value in (("model", model), ("data", data))}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"seed_everything": 5, **parts, "trainer": fixed | validation | trainer}))
    return str(path)


def grpo(**settings: Any) -> dict[str, Any]:
    """``init_args`` of a tiny GRPO module."""
    tiny: dict[str, Any] = {"policy": POLICIES["qwen3"], "train_tokenizer": {"vocab_size": 280}, "max_new_tokens": 12, "group_size": 4}
    return {"class_path": "theodolite.lightning_modules.GRPOModule", "lr": 1e-3} | tiny | settings


def sft(**settings: Any) -> dict[str, Any]:
    """``init_args`` of a tiny SFT module."""
    tiny: dict[str, Any] = {"policy": POLICIES["qwen3"], "train_tokenizer": {"vocab_size": 280}, "max_new_tokens": 12}
    return {"class_path": "theodolite.lightning_modules.SFTModule", "lr": 3e-3} | tiny | settings


def prompts(**settings: Any) -> dict[str, Any]:
    """``init_args`` of the tiny datamodule."""
    return {"class_path": "tiny_policies.TinyPrompts"} | settings


def callback(path: str, **settings: Any) -> dict[str, Any]:
    """A callback's entry in a config."""
    return {"class_path": path, "init_args": settings}
