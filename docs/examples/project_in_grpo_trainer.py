"""Project the steps of TRL's ``GRPOTrainer``; a tiny random model and a toy reward, some seconds on a CPU.

    make venv-peers && .venv-peers/bin/python docs/examples/project_in_grpo_trainer.py

``GRPOTrainer`` offers no hook between accumulation and clipping; the callback takes clipping over (see its module's docstring). The
direction here is a random one: put the folder that ``ConceptDirection.save`` wrote in its place.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from theodolite.callbacks.trainer_callback import ProjectionTrainerCallback
from theodolite.functional.extraction import haar_random_like


def tiny_policy() -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """A random model and a character tokenizer."""
    torch.manual_seed(0)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = Qwen3Config(vocab_size=len(vocabulary), head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes)
    return Qwen3ForCausalLM(config), tokenizer


def shortness(completions: list[str], **_: object) -> list[float]:
    """Prefer completions with many different characters."""
    return [float(len(set(text))) for text in completions]


def main(steps: int = 3, lora: bool = True, **options: object) -> tuple[GRPOTrainer, ProjectionTrainerCallback]:
    """Train a few steps; returns the trainer and the callback."""
    model, tokenizer = tiny_policy()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_generations=4,
            max_completion_length=8, learning_rate=1e-2, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
            disable_tqdm=True, seed=0, max_grad_norm=0.1,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=shortness,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["one", "two", "three", "four"] * 4}),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM") if lora else None,
        )
        trained = {name: p.shape for name, p in trainer.model.named_parameters() if p.requires_grad and p.ndim == 2}
        settings = {"gate": "two_sided", "apply_to": "both"} | options
        callback = ProjectionTrainerCallback(haar_random_like(trained, k=1), **settings)  # type: ignore[arg-type]
        trainer.add_callback(callback)
        trainer.train()
    for row in trainer.state.log_history[:-1]:
        print({key: value for key, value in row.items() if key in ("reward", "grad_norm") or "cos" in key})
    return trainer, callback


if __name__ == "__main__":
    main()
