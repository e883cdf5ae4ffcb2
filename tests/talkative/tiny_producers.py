"""A tiny language model with its tokenizer in a folder, and a corpus, for tests of banks and sweeps."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from theodolite.lightning_modules.tokenizer import train_bpe_tokenizer

WORDS = tuple(
    "the cat saw a dog in old town and small birds sang near blue rivers while rain fell on quiet roofs".split()  # noqa: SIM905
)


def texts(n: int, words: int = 14, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=words)) for _ in range(n)]


@cache
def model(seed: int = 0, width: int = 16) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig.from_dict({"vocab_size": 300, "max_position_embeddings": 128, "hidden_size": width} | sizes)).eval()


def save_producer(folder: Path, seed: int = 0) -> str:
    """A model and tokenizer that ``from_pretrained`` reads."""
    model(seed).save_pretrained(folder)
    train_bpe_tokenizer(texts(50), 300, [" "]).save_pretrained(folder)
    return str(folder)


def save_corpus(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"id": f"doc{i}", "text": text}) + "\n" for i, text in enumerate(documents)))
    return str(path)
