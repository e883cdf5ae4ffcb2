"""Supervised fine-tuning: cross-entropy on completions, with one global denominator.

Run it (CPU; trains the embedded policy from scratch, tokenizer included)::

    theodolite fit --config configs/sft/mini.yaml

On several processes::

    torchrun --nproc_per_node=2 train.py fit --config configs/sft/mini.yaml --trainer.devices=2 --trainer.strategy=ddp
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from theodolite.batch_arithmetic import BatchArithmetic, split_batch
from theodolite.distributed import gather_objects, sum_gradients
from theodolite.protocols import Example

from ..merged_adapter import check_merging
from ..policy_module import PolicyModule
from ..scoring import selected_log_probs


class SFTModule(PolicyModule):
    """Fine-tune a causal language model on demonstrations; validation samples and grades held-out problems.

    The loss is ``sum(weight * -log p) / sum(weight)`` over the *global* batch, where completion tokens weigh 1 and prompt tokens
    ``prompt_weight``. So it does not depend on the number of ranks, on the microbatches, or on how lengths fall over them.

    Args:
        prompt_weight: Weight of prompt tokens in the loss; 0 trains on completions alone.
        policy_args: Everything else: see :class:`~theodolite.lightning_modules.policy_module.PolicyModule`.
    """

    def __init__(self, prompt_weight: float = 0.0, **policy_args: Any) -> None:
        super().__init__(**policy_args)
        self.save_hyperparameters()
        if prompt_weight < 0:
            raise ValueError(f"model.prompt_weight is {prompt_weight}; it must not be negative.")
        self.prompt_weight = prompt_weight
        self.batch_arithmetic: BatchArithmetic | None = None
        self._encoded: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def on_fit_start(self) -> None:
        """Split the global batch over ranks."""
        check_merging(self.engine, str(self.trainer.precision))
        size = getattr(self._datamodule(), "global_batch_size", None)
        if not isinstance(size, int):
            raise TypeError(
                f"{type(self._datamodule()).__name__} does not say global_batch_size; SFT needs the global number of examples per step."
            )
        self.batch_arithmetic = split_batch(size, self.trainer.world_size, micro=self.micro_batch_size)
        rank_zero_info(f"training {sum(p.numel() for p in self.trainable_parameters()):,} parameters")

    def training_step(self, batch: Sequence[Example], batch_idx: int) -> None:
        """One optimizer step on the global batch, microbatch by microbatch."""
        encoded = [self._encode_example(example) for example in batch]
        size = self.micro_batch_size or max(1, len(encoded))
        microbatches = [self._pad(encoded[i : i + size]) for i in range(0, len(encoded), size)]
        local = sum(float(weights[:, 1:].sum(dtype=torch.float64)) for _, _, weights in microbatches)
        denominator = max(math.fsum(gather_objects(local)), torch.finfo(torch.float32).tiny)
        optimizer = cast(LightningOptimizer, self.optimizers())
        optimizer.zero_grad()
        total = 0.0
        for ids, attention, weights in microbatches:
            logits = self.causal_lm(input_ids=ids, attention_mask=attention, use_cache=False).logits
            log_probs = selected_log_probs(logits[:, :-1], ids[:, 1:])
            loss = -(weights[:, 1:] * log_probs).sum() / denominator
            with self._without_gradient_sync():
                self.manual_backward(loss)
            total += float(loss.detach())
        sum_gradients(self.trainable_parameters())
        optimizer.step()
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        cast(Any, self.lr_schedulers()).step()
        self.log("train/loss", math.fsum(gather_objects(total)), prog_bar=True, rank_zero_only=False, sync_dist=False)

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
