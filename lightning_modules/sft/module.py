"""Supervised fine-tuning: cross-entropy on completions, with one global denominator.

Run it (CPU; trains the embedded policy from scratch, tokenizer included)::

    theodolite fit --config configs/sft/mini.yaml

On several processes::

    torchrun --nproc_per_node=2 train.py fit --config configs/sft/mini.yaml --trainer.devices=2 --trainer.strategy=ddp
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from theodolite.batch_arithmetic import BatchArithmetic, split_batch
from theodolite.distributed import world_size
from theodolite.protocols import Example

from ..policy_module import PolicyModule
from ..scoring import selected_log_probs


class SFTModule(PolicyModule):
    """Fine-tune a causal language model on demonstrations; validation samples and grades held-out problems.

    The loss is ``sum(weight * -log p) / sum(weight)`` over the *global* batch, where completion tokens weigh 1 and prompt tokens
    ``prompt_weight``. So it does not depend on the number of ranks or on how lengths fall over them.

    Args:
        prompt_weight: Weight of prompt tokens in the loss; 0 trains on completions alone.
        policy_args: Everything else: see :class:`~theodolite.lightning_modules.policy_module.PolicyModule`.
    """

    def __init__(self, prompt_weight: float = 0.0, **policy_args: Any) -> None:
        super().__init__(**policy_args)
        self.save_hyperparameters()
        if prompt_weight < 0:
            raise ValueError(f"model.prompt_weight is {prompt_weight}; it must not be negative.")
        if self.micro_batch_size is not None:
            raise ValueError(
                "SFT takes a whole batch per forward pass; use trainer.accumulate_grad_batches and a smaller data.global_batch_size."
            )
        self.prompt_weight = prompt_weight
        self.batch_arithmetic: BatchArithmetic | None = None
        self._encoded: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def on_fit_start(self) -> None:
        """Split the global batch over ranks."""
        size = getattr(self._datamodule(), "global_batch_size", None)
        if not isinstance(size, int):
            raise TypeError(
                f"{type(self._datamodule()).__name__} does not say global_batch_size; SFT needs the global number of examples per step."
            )
        self.batch_arithmetic = split_batch(size, self.trainer.world_size)
        rank_zero_info(f"training {sum(p.numel() for p in self.trainable_parameters()):,} parameters")

    def training_step(self, batch: Sequence[Example], batch_idx: int) -> Tensor:
        """Weighted mean cross-entropy over the global batch (this rank's share times the number of ranks: DDP averages)."""
        ids, attention, weights = self._pad([self._encode_example(example) for example in batch])
        logits = self.causal_lm(input_ids=ids, attention_mask=attention, use_cache=False).logits
        log_probs = selected_log_probs(logits[:, :-1], ids[:, 1:])
        loss_sum, weight_sum = -(weights[:, 1:] * log_probs).sum(), weights[:, 1:].sum()
        denominator = weight_sum.detach().clone()
        if world_size() > 1:
            dist.all_reduce(denominator)
        loss = loss_sum / denominator * world_size()
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=world_size() > 1)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # pyright: ignore[reportAttributeAccessIssue]
        return loss

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        """Clip to ``max_grad_norm`` after every callback has seen the gradient."""
        if gradient_clip_val is not None:
            raise ValueError("Set model.max_grad_norm instead of trainer.gradient_clip_val: one clip, after all callbacks.")
        if self.max_grad_norm > 0:
            self.clip_gradients(optimizer, gradient_clip_val=self.max_grad_norm, gradient_clip_algorithm="norm")

    def _encode_example(self, example: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if example.id not in self._encoded:
            sequence = self.encode(example.prompt, example.completion)
            self._encoded[example.id] = (sequence.prompt_ids, sequence.completion_ids)
        return self._encoded[example.id]

    def _pad(self, encoded: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[Tensor, Tensor, Tensor]:
        length = max(len(prompt) + len(completion) for prompt, completion in encoded)
        ids = torch.full((len(encoded), length), self.pad_id, dtype=torch.long)
        attention = torch.zeros_like(ids)
        weights = torch.zeros(len(encoded), length)
        for row, (prompt, completion) in enumerate(encoded):
            end = len(prompt) + len(completion)
            ids[row, :end] = torch.tensor(prompt + completion)
            attention[row, :end] = 1
            weights[row, : len(prompt)] = self.prompt_weight
            weights[row, len(prompt) : end] = 1.0
        return ids.to(self.device), attention.to(self.device), weights.to(self.device)
