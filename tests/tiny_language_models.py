"""Tiny random language models of the real architectures, whose norms and biases are not at their trivial initial values."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 64},
    "llama": {"model_type": "llama"} | SIZES,
    "mistral": {"model_type": "mistral"} | SIZES,
    "qwen2": {"model_type": "qwen2"} | SIZES,
    "qwen3": {"model_type": "qwen3"} | SIZES,
    "gemma": {"model_type": "gemma"} | SIZES,
    "gemma2": {"model_type": "gemma2"} | SIZES,
    "gemma3_text": {"model_type": "gemma3_text"} | SIZES,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,  # as deep as the language model, so that depth alone cannot tell them apart
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def tiny_config(family: str, **fields: Any) -> Any:
    """The config of a family; ``gemma3`` is the multimodal one."""
    if family == "gemma3":
        text = {**SIZES, **fields}
        return AutoConfig.for_model("gemma3", text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=63)
    settings: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | FAMILIES[family] | fields
    return AutoConfig.for_model(**settings)


def tiny_language_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> nn.Module:
    """In evaluation mode, with every parameter random: freshly made norms would hide a forgotten weight or bias."""
    auto: Any = AutoModelForImageTextToText if family == "gemma3" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(tiny_config(family, **fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        start = 0.0 if parameter.ndim > 1 else float(parameter.detach().mean())
        parameter.data = start + scale * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def token_rows(rows: int = 3, length: int = 9, seed: int = 0) -> torch.Tensor:
    """(rows, length) random ids that are no special token."""
    return torch.randint(3, 63, (rows, length), generator=torch.Generator().manual_seed(seed))
