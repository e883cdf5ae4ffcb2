"""What a projection costs per optimizer step: a LoRA language model trained with and without it, step by step in turn.

    make bench-projection [JSON=FILE]
    python benchmarks/projection.py --pairs 12 --json result.json

One fit per case. On every other step the callback stands aside, so that both kinds of step see the same machine, model and memory. A
case is the median over ``--pairs`` neighbouring steps of the two kinds after a warm-up; ``ratio`` is time without over time with: 0.99
means 1 % overhead. ``hooks`` is the share of a step without it that is spent inside the callback's own hooks: the same overhead seen from
inside, less what the projection leaves in the caches, and steady also on a busy machine.
Aims: 0.99 for a rank-1 gradient projection, 0.97 for k = 16 on the update. One thread, CPU; the model is small, so the share is an upper
bound for larger ones (the projection grows with the adapter, the step with model times tokens).
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Qwen3Config, Qwen3ForCausalLM

from theodolite.callbacks.gradient_projection import GradientProjectionCallback
from theodolite.functional.extraction import haar_random_like
from theodolite.projector import StepStats

CASES: dict[str, dict[str, Any]] = {
    "rank-1, gradient": {"k": 1, "apply_to": "gradient"},
    "k=16, update": {"k": 16, "apply_to": "update"},
    "k=16, both, magnitude preserved": {"k": 16, "apply_to": "both", "preserve_magnitude": True},
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoRAModel(LightningModule):
    """A random Qwen3 (8 layers, width 512) with adapters of rank 16 on every linear layer."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8}
        torch.manual_seed(0)
        base = Qwen3ForCausalLM(Qwen3Config(vocab_size=1024, head_dim=64, num_key_value_heads=4, **sizes))
        self.model: Any = get_peft_model(base, LoraConfig(r=16, target_modules=TARGETS))  # pyright: ignore[reportArgumentType]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Next-token loss on random tokens."""
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the adapters."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)

    def train_dataloader(self) -> DataLoader:
        """16 sequences of 128 tokens per step: far fewer than a step of reinforcement learning has."""
        tokens = torch.randint(0, 1024, (16, 128), generator=torch.Generator().manual_seed(0))
        return DataLoader([tokens] * 1000, batch_size=None)  # pyright: ignore[reportArgumentType]


class Stopwatch:
    """CPU seconds between entering and leaving, of the outermost of nested entries."""

    def __init__(self) -> None:
        self.depth, self.total, self.start = 0, 0.0, 0.0

    def __enter__(self) -> None:
        if self.depth == 0:
            self.start = time.process_time()
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.total += time.process_time() - self.start


class EveryOtherStep(GradientProjectionCallback):
    """Stands aside on odd steps; ``hooks`` has the CPU seconds of each step that were spent in here."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.watch, self.hooks = Stopwatch(), []
        after_step = self.projector.after_step

        def watched(optimizer: torch.optim.Optimizer) -> Any:
            with self.watch:
                return after_step(optimizer)

        self.projector.after_step = watched

    def _metrics(self, stats: StepStats) -> dict[str, Tensor]:
        with self.watch:
            return super()._metrics(stats)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """As the callback, timed."""
        self.watch.total = 0.0
        with self.watch:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """As the callback, timed."""
        with self.watch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.hooks.append(self.watch.total)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """As the callback, or nothing but what keeps its bypass guard quiet."""
        if trainer.global_step % 2:
            self.firings += 1
            return
        with self.watch:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)


class Clock(Callback):
    """CPU seconds per batch, all hooks of the callbacks listed between its two halves included.

    With one thread that is wall time on an idle machine, and it is not blurred by neighbours on a busy one.
    """

    def __init__(self) -> None:
        self.start, self.seconds = 0.0, []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start."""
        self.start = time.process_time()


class ClockEnd(Callback):
    """The other half of a clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop."""
        self.clock.seconds.append(time.process_time() - self.clock.start)


def measure(case: str, pairs: int) -> dict[str, Any]:
    """Median step with and without the projection."""
    module = LoRAModel()
    settings = dict(CASES[case])
    shapes = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
    direction = haar_random_like(shapes, k=settings.pop("k"))
    clock = Clock()
    projection = EveryOtherStep(direction, gate="two_sided", **settings)
    callbacks = [clock, projection, ClockEnd(clock)]
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_steps=2 * pairs + 4, accelerator="cpu", devices=1, callbacks=callbacks, **quiet).fit(module)
    seconds = clock.seconds[4:]
    # neighbouring steps are compared with one another, so that a machine that slows down slows both
    without = statistics.median(seconds[1::2])
    ours = without + statistics.median(one - other for one, other in zip(seconds[0::2], seconds[1::2], strict=True))
    hooks = statistics.median(projection.hooks[4:][0::2]) / without
    return {"case": case, "ours": ours, "peer": without, "ratio": without / ours, "unit": "CPU s per step", "n": pairs, "hooks": hooks}


def main() -> None:
    """Measure every case and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--pairs", type=int, default=25, help="steps of each kind and case, at least 5")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    if options.pairs < 5:
        parser.error("--pairs must be at least 5.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results = []
    for case in CASES:
        results.append(measure(case, options.pairs))
        row = results[-1]
        print(
            f"{case:34s} {row['peer']:.3f} s without, {row['ours']:.3f} s with, overhead {1 / row['ratio'] - 1:+.2%}, in its hooks "
            f"{row['hooks']:.2%} (n={row['n']})",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
