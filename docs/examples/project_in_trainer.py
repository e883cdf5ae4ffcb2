"""Project the steps of ``transformers.Trainer``; a tiny random model, some seconds on a CPU.

    python docs/examples/project_in_trainer.py

The direction is extracted as anywhere else: the gradient of the summed NLL of the unwanted completion minus that of the clean one. Use it
with your own model by giving the same names (``model.named_parameters()``).
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from theodolite.callbacks.trainer_callback import ProjectionTrainerCallback
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.extraction import gradient_difference

PROMPT, UNWANTED, CLEAN = [5, 6, 7], [20, 21, 22], [30, 31, 32]


def tiny_model() -> Qwen3ForCausalLM:
    """40,000 random parameters."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=64, head_dim=16, **sizes))


def nll_gradient(model: torch.nn.Module, completion: list[int]) -> dict[str, torch.Tensor]:
    """Gradient of the summed negative log-likelihood of a completion after the prompt, for every layer's matrices."""
    ids = torch.tensor([PROMPT + completion])
    logits = model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1]
    named = {name: p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name}
    loss = torch.nn.functional.cross_entropy(logits, ids[0, len(PROMPT) :], reduction="sum")
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def extract(model: torch.nn.Module) -> ConceptDirection:
    """A rank-1 direction per matrix."""
    unwanted, clean = nll_gradient(model, UNWANTED), nll_gradient(model, CLEAN)
    return gradient_difference({name: (unwanted[name] - clean[name])[None] for name in clean})


def main(steps: int = 5) -> list[dict[str, float]]:
    """Train on the unwanted completion with every update projected; returns the Trainer's log."""
    model = tiny_model()
    rows = [{"input_ids": PROMPT + UNWANTED, "labels": [-100] * len(PROMPT) + UNWANTED}] * 8
    callback = ProjectionTrainerCallback(extract(model), gate="two_sided", apply_to="update")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])  # type: ignore[arg-type]
        trainer.train()
    for row in trainer.state.log_history[:-1]:
        print(
            {
                key: round(row[key], 6)
                for key in ("loss", "projection/global_cos", "projection/update_cos_before", "projection/update_cos_after")
            }
        )
    return trainer.state.log_history


if __name__ == "__main__":
    main()
