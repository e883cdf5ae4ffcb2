"""Tiny Qwen3 policies in sizes that vLLM's CPU kernels take (heads of 32), saved as folders with a tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_policies import tokenizer

from theodolite.lightning_modules.policy import add_lora, load_policy

SIZES: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.08,
}
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
END = int(cast(int, tokenizer().eos_token_id))


def policy_folder(folder: Path, tied: bool = False, seed: int = 1) -> Path:
    """A random policy and its tokenizer, as a folder of ``transformers``."""
    model = load_policy(SIZES | {"tie_word_embeddings": tied}, None, "float32", seed, len(tokenizer()), END)
    cast(Any, model).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, lora: bool, **settings: Any) -> nn.Module:
    """The policy of a folder, in evaluation mode, with an adapter or without."""
    model = load_policy(str(folder), None, "float32", 0)
    return (add_lora(model, LORA | settings, 3) if lora else model).eval()


def train_a_little(model: nn.Module, seed: int, size: float = 0.03) -> None:
    """Move every trainable parameter, in place, as an optimizer step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
