"""A tiny toy system: a random target model of the toy world in a folder, modules over it, and trainers that run them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from theodolite.datamodules.talkative import CaptionedActivations
from theodolite.datamodules.toy.talkative import ToyCorpus
from theodolite.datamodules.toy.talkative_world import vocabulary
from theodolite.lightning_modules.policy import load_policy
from theodolite.lightning_modules.talkative import TalkativeModule
from theodolite.lightning_modules.talkative.build import build_verbaliser
from theodolite.lightning_modules.talkative.settings import ReconstructorSettings, VerbaliserSettings
from theodolite.lightning_modules.talkative.verbaliser import ActivationVerbaliser
from theodolite.lightning_modules.tokenizer import train_word_tokenizer

WIDTH = 16
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3"} | SIZES,
    "llama": {"model_type": "llama"} | SIZES,
    "gemma3_text": {"model_type": "gemma3_text", "sliding_window": 32} | SIZES,
    "gpt2": {"model_type": "gpt2", "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.25},
}
"""Fields of configs; ``initializer_range`` is large so that the next token depends on all of the context."""


@functools.lru_cache
def tokenizer() -> PreTrainedTokenizerBase:
    return train_word_tokenizer(vocabulary(), ["<act>", "<read>"])


def save_target(folder: Path, kind: str = "qwen3") -> str:
    """A random target with its tokenizer; the folder's path."""
    model: Any = load_policy(MODELS[kind], None, "float32", seed=1, vocab_size=len(tokenizer()), end_id=tokenizer().eos_token_id)  # pyright: ignore
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def verbaliser(kind: str = "qwen3", width: int = WIDTH, **settings: Any) -> ActivationVerbaliser:
    given = {"model": MODELS[kind], "tokenizer": "given", "prompt": "the <act> in the sea .", "fixed_length": True} | settings
    return build_verbaliser(VerbaliserSettings(**given), width, "float32", 2, tokenizer()).eval()


def rows(n: int, seed: int = 0, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def data(target: str, cache: Path, **settings: Any) -> CaptionedActivations:
    given: dict[str, Any] = {"documents": ToyCorpus(documents=40), "site": "resid_post.1", "num_positions": 2, "special_tokens": False}
    sizes: dict[str, Any] = {"train_rows": 48, "eval_rows": 7, "test_rows": 6, "global_batch_size": 8, "eval_batch_size": 4}
    shares: dict[str, Any] = {"validation_share": 0.2, "test_share": 0.1, "cache_dir": str(cache)}
    return CaptionedActivations(model=target, **(given | sizes | shares | settings))


def made(kind: type[TalkativeModule], target: str, **settings: Any) -> TalkativeModule:
    given: dict[str, Any] = {
        "verbaliser": VerbaliserSettings(model=target, fixed_length=True),
        "reconstructor": ReconstructorSettings(model=target, layers=2, suffix="<read>"),
        "held_out": ReconstructorSettings(model=MODELS["qwen3"], suffix="<read>", seed=1),
        "max_new_tokens": 4,
        "lr": 1e-3,
        "eval_samples": 2,
        "seed": 3,
        "export": False,
    }
    return kind(**(given | settings))


def trainer_of(path: Path, *callbacks: Callback, steps: int = 1, **options: Any) -> Trainer:
    fixed: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    limits = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "default_root_dir": path, "log_every_n_steps": 1}
    return Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **(fixed | limits | options))


class GradientWitness(Callback):
    """Keeps every gradient of the last step before it is clipped, and the parameters that had none."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.gradients = {name: p.grad.detach().clone() for name, p in pl_module.named_parameters() if p.grad is not None}


class WeightWitness(Callback):
    """Writes the final weights of every rank.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().clone().contiguous() for name, p in pl_module.named_parameters()}
        save_file(tensors, self.folder / f"weights-{trainer.global_rank}.safetensors")


class KillAfterGradients(Callback):
    """Kills this process when the gradients of a step are there and the optimizer has not stepped.

    Args:
        step: Optimizer steps taken before.
    """

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)


def config(path: Path, kind: str, target: str, cache: Path, callbacks: list[dict[str, Any]], model: dict[str, Any], **trainer: Any) -> str:
    """A config file for the command line."""
    parts = {
        "verbaliser": {"model": target, "fixed_length": True},
        "reconstructor": {"model": target, "layers": 2, "suffix": "<read>"},
        "held_out": {"model": MODELS["qwen3"], "suffix": "<read>", "seed": 1},
    }
    sizes = {"max_new_tokens": 4, "lr": 1.5e-4, "eval_samples": 2, "seed": 3}
    corpus = {"class_path": "theodolite.datamodules.toy.talkative.ToyCorpus", "init_args": {"documents": 40}}
    rows_of = {"model": target, "site": "resid_post.1", "documents": corpus, "num_positions": 2, "special_tokens": False}
    limits = {"train_rows": 48, "eval_rows": 7, "test_rows": 6, "global_batch_size": 8, "eval_batch_size": 4}
    shares = {"validation_share": 0.2, "test_share": 0.1, "cache_dir": str(cache)}
    fixed = {"accelerator": "cpu", "max_epochs": -1, "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False}
    validation = {"num_sanity_val_steps": -1, "check_val_every_n_epoch": None, "val_check_interval": 2}
    content = {
        "seed_everything": 5,
        "model": {"class_path": f"theodolite.lightning_modules.talkative.{kind}", "init_args": parts | sizes | model},
        "data": {"class_path": "theodolite.datamodules.talkative.CaptionedActivations", "init_args": rows_of | limits | shares},
        "trainer": fixed | validation | {"callbacks": callbacks} | trainer,
    }
    path.write_text(json.dumps(content))
    return str(path)
