"""Short fits of a tiny policy, what they saw, and pieces that configs of the tests name by class path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_policies import POLICIES, TinyPrompts, tokenizer

from theodolite.lightning_modules import GRPOModule
from theodolite.lightning_modules.grpo.losses import TokenBatch

TINY: dict[str, Any] = {"policy": POLICIES["qwen3"], "train_tokenizer": {"vocab_size": 280}, "max_new_tokens": 12, "group_size": 4}


class PlainDescent(GRPOModule):
    """Adam would turn a gradient of 0, such as that of a key's bias, into a step of float noise."""

    def _build_tokenizer(self) -> Any:
        return tokenizer() if self.train_tokenizer is not None else super()._build_tokenizer()  # trained once for all tests

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.trainable_parameters(), lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)}}


def fit(
    path: Path,
    *callbacks: Any,
    steps: int = 1,
    data: Any = None,
    logger: Any = False,
    ckpt_path: Any = None,
    precision: Any = "32-true",
    trainer_args: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[GRPOModule, Trainer]:
    module = PlainDescent(**(TINY | {"lr": 1e-2, "export": False, "seed": 3, "table_every": 0} | settings))
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "logger": logger}
    limits = {
        "max_steps": steps,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "default_root_dir": path,
        "log_every_n_steps": 1,
        "precision": precision,
    }
    settled: dict[str, Any] = quiet | limits | (trainer_args or {})
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **settled)
    trainer.fit(module, datamodule=data or TinyPrompts(), ckpt_path=ckpt_path)
    return module, trainer


class Gradients(Callback):
    """Gradients before every optimizer step, flat."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(flat_gradient(pl_module))


def flat_gradient(module: Any) -> Tensor:
    return torch.cat([p.grad.flatten().clone() for p in module.trainable_parameters()])


def deviation(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


class Reinforce:
    """A loss of one's own: the log-probability times the advantage, and a number to log."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return -self.factor * batch.advantages * batch.log_probs, {"advantage_seen": batch.advantages.expand_as(batch.mask)}
