"""Reads a language model's activations at chosen positions of documents. The model is loaded only when something has to be computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from theodolite.provenance import content_hash, file_hash
from theodolite.sites import ActivationSite, collect_sites, model_size, parse_site

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = ("*.safetensors", "*.bin", "config.json")


class ActivationProducer:
    """One site of one model.

    Args:
        model: Hub id or folder of a causal language model.
        site: For example ``resid_post.8``; every name that :func:`theodolite.sites.parse_site` knows.
        revision: Hub revision; the commit it stands for is part of the bank's key.
        dtype: Of the model's weights.
        max_tokens: Documents are cut to this many tokens.
        special_tokens: Let the tokenizer add its own (a beginning-of-sequence token), as the model was trained.

    Raises:
        ValueError: For an unknown dtype or site.
    """

    def __init__(
        self, model: str, site: str, revision: str | None = None, dtype: str = "float32", max_tokens: int = 128, special_tokens: bool = True
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"The producer's dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
        self.model_id, self.revision, self.dtype = model, revision, dtype
        self.site: ActivationSite = parse_site(site)
        self.max_tokens, self.special_tokens = max_tokens, special_tokens
        self._model: PreTrainedModel | None = None

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._model is not None

    @cached_property
    def config(self) -> Any:
        """The model's configuration, which costs no weights."""
        return AutoConfig.from_pretrained(self.model_id, revision=self.revision)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return AutoTokenizer.from_pretrained(self.model_id, revision=self.revision)

    @property
    def width(self) -> int:
        """Entries of one activation."""
        return model_size(self.config).width

    def identity(self) -> dict[str, Any]:
        """Plain data that changes with every value: weights, site, precision, tokenisation."""
        return {
            "model": self._weights(),
            "site": str(self.site),
            "dtype": self.dtype,
            "tokenizer": content_hash(self._vocabulary()),
            "max_tokens": self.max_tokens,
            "special_tokens": self.special_tokens,
        }

    def tokens(self, text: str) -> list[int]:
        """Token ids of a document, cut to ``max_tokens``."""
        ids = self.tokenizer(text, add_special_tokens=self.special_tokens, truncation=True, max_length=self.max_tokens)["input_ids"]
        return [int(token) for token in ids]  # type: ignore[union-attr]

    def special_ids(self) -> frozenset[int]:
        """Ids that are never a row."""
        return frozenset(self.tokenizer.all_special_ids)

    def context(self, tokens: Sequence[int], position: int, before: int = 24) -> str:
        """The text that ends with a position, for readers of reports."""
        return str(self.tokenizer.decode(list(tokens[max(0, position + 1 - before) : position + 1])))

    def extract(self, documents: Sequence[Sequence[int]], device: torch.device | str) -> list[Tensor]:
        """Activations of all positions of a batch of documents.

        Args:
            documents: Token ids, at least one each.
            device: Where to compute.

        Returns:
            One (tokens, d) tensor per document, in the model's dtype, on the CPU.
        """
        model = self._load(device)
        longest = max(len(tokens) for tokens in documents)
        ids = torch.zeros(len(documents), longest, dtype=torch.long)
        attention = torch.zeros_like(ids)
        for row, tokens in enumerate(documents):  # padded on the right: positions stay those of the document
            ids[row, : len(tokens)] = torch.tensor(tokens)
            attention[row, : len(tokens)] = 1
        found = collect_sites(model, [self.site], input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False)
        states = found[self.site].cpu()
        return [states[row, : len(tokens)] for row, tokens in enumerate(documents)]

    def release(self) -> None:
        """Give the model's memory back."""
        self._model = None

    def _load(self, device: torch.device | str) -> PreTrainedModel:
        if self._model is None:
            model = AutoModelForCausalLM.from_pretrained(self.model_id, revision=self.revision, dtype=DTYPES[self.dtype])
            self._model = cast(PreTrainedModel, model.eval().requires_grad_(False).to(torch.device(device)))  # type: ignore[arg-type]
        assert self._model is not None
        return self._model

    def _weights(self) -> dict[str, Any]:
        """A hub model's commit; a folder's file hashes, wherever it lies."""
        folder = Path(self.model_id)
        if folder.is_dir():
            files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
            return {"files": content_hash([(path.name, file_hash(path)) for path in files])}
        return {"id": self.model_id, "commit": getattr(self.config, "_commit_hash", None)}

    def _vocabulary(self) -> Any:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        described = json.loads(backend.to_str()) if backend is not None else {"vocabulary": self.tokenizer.get_vocab()}
        # a call with truncation leaves its settings in the tokenizer: a rank that has tokenised must name the bank as one that has not
        whole = json.dumps({name: part for name, part in described.items() if name not in ("truncation", "padding")}, sort_keys=True)
        return [hashlib.sha256(whole.encode()).hexdigest(), sorted(self.tokenizer.all_special_tokens)]
