"""The language model whose activations are read: named in a config, loaded when first needed, never trained."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from theodolite.provenance import content_hash, file_hash
from theodolite.seeds import derive_seed
from theodolite.sites import model_size

from ..text.byte_tokenizer import ByteTokenizer, TextTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = ("*.safetensors", "*.bin", "config.json")
BYTES = "bytes"


class FrozenModel:
    """A causal language model in evaluation mode, without gradients.

    Args:
        model: Hub id, folder, or the fields of a ``transformers`` config (``model_type`` and sizes) for random weights.
        revision: Hub revision.
        dtype: Of the weights: ``float32``, ``bfloat16`` or ``float16``.
        tokenizer: Hub id or folder; ``bytes`` for one token per byte; None = the model's own.
        seed: Of random weights.

    Raises:
        ValueError: An unknown dtype, a folder without a model, or random weights without a tokenizer.
    """

    def __init__(
        self, model: str | dict[str, Any], revision: str | None = None, dtype: str = "float32", tokenizer: str | None = None, seed: int = 0
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"data.dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
        if isinstance(model, dict) and (tokenizer is None or "model_type" not in model):
            raise ValueError("data.model gives a config, which needs a model_type, and data.tokenizer beside it (for example bytes).")
        if (
            isinstance(model, str)
            and (model.count("/") > 1 or model.startswith((".", "/")))
            and not (Path(model) / "config.json").is_file()
        ):
            raise ValueError(f"data.model is the folder {model!r}, which holds no config.json: export a model there, or give a hub id.")
        self.model_id, self.revision, self.dtype, self.tokenizer_id, self.seed = model, revision, dtype, tokenizer, seed
        self._model: nn.Module | None = None

    @cached_property
    def config(self) -> Any:
        """The model's config, which costs no weights."""
        if isinstance(self.model_id, str):
            return AutoConfig.from_pretrained(self.model_id, revision=self.revision)
        special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        if self.tokenizer_id == BYTES:
            special |= {"vocab_size": ByteTokenizer.vocab_size}
        return AutoConfig.for_model(**(special | self.model_id))

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer."""
        if self.tokenizer_id == BYTES:
            return ByteTokenizer()
        name = self.tokenizer_id or self.model_id
        return cast(
            TextTokenizer, AutoTokenizer.from_pretrained(cast(str, name), revision=self.revision if name == self.model_id else None)
        )

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return model_size(self.config).width

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return model_size(self.config).layers

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._model is not None

    def load(self, device: torch.device | str) -> nn.Module:
        """The model on a device; loaded once."""
        if self._model is None:
            if isinstance(self.model_id, str):
                model = AutoModelForCausalLM.from_pretrained(self.model_id, revision=self.revision, dtype=DTYPES[self.dtype])
            else:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(derive_seed(self.seed, "frozen model"))
                    model = AutoModelForCausalLM.from_config(self.config, dtype=DTYPES[self.dtype])
            self._model = cast(nn.Module, model).eval().requires_grad_(False)
        return self._model.to(device)

    def release(self) -> None:
        """Give the weights' memory back; they are loaded again when needed."""
        self._model = None

    def identity(self) -> dict[str, Any]:
        """Plain data that changes with the model's numbers: a folder's file hashes, a hub model's commit, a config and its seed."""
        facts: dict[str, Any] = {"dtype": self.dtype, "tokenizer": self.tokenizer_id}
        if not isinstance(self.model_id, str):
            return facts | {"config": self.model_id, "seed": self.seed}
        folder = Path(self.model_id)
        if folder.is_dir():
            files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
            return facts | {"files": content_hash([(path.name, file_hash(path)) for path in files])}
        return facts | {"id": self.model_id, "commit": getattr(self.config, "_commit_hash", None)}
