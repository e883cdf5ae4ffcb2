"""Reads a language model's activations at chosen positions of documents. The model is loaded only when something has to be computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from theodolite.provenance import content_hash
from theodolite.sites import ActivationSite, collect_sites, parse_site

from .frozen_model import FrozenModel


class ActivationProducer(FrozenModel):
    """One site of one frozen model, read document by document.

    Args:
        model: Hub id or folder of a causal language model with a tokenizer of ``transformers``.
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
        super().__init__(model, revision, dtype)
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
        self.site: ActivationSite = parse_site(site)
        self.max_tokens, self.special_tokens = max_tokens, special_tokens

    def identity(self) -> dict[str, Any]:
        """Plain data that changes with every value: weights, site, precision, tokenisation."""
        return {
            "model": super().identity(),
            "site": str(self.site),
            "tokenizer": content_hash(self._vocabulary()),
            "max_tokens": self.max_tokens,
            "special_tokens": self.special_tokens,
        }

    def tokens(self, text: str) -> list[int]:
        """Token ids of a document, cut to ``max_tokens``."""
        ids = self._own_tokenizer()(text, add_special_tokens=self.special_tokens, truncation=True, max_length=self.max_tokens)["input_ids"]
        return [int(token) for token in ids]  # type: ignore[union-attr]

    def special_ids(self) -> frozenset[int]:
        """Ids that are never a row."""
        return frozenset(self._own_tokenizer().all_special_ids)

    def context(self, tokens: Sequence[int], position: int, before: int = 24) -> str:
        """The text that ends with a position, for readers of reports."""
        return str(self._own_tokenizer().decode(list(tokens[max(0, position + 1 - before) : position + 1])))

    def extract(self, documents: Sequence[Sequence[int]], device: torch.device | str) -> list[Tensor]:
        """Activations of all positions of a batch of documents.

        Args:
            documents: Token ids, at least one each.
            device: Where to compute.

        Returns:
            One (tokens, d) tensor per document, in the model's dtype, on the CPU.
        """
        model = self.load(device)
        longest = max(len(tokens) for tokens in documents)
        ids = torch.zeros(len(documents), longest, dtype=torch.long)
        attention = torch.zeros_like(ids)
        for row, tokens in enumerate(documents):  # padded on the right: positions stay those of the document
            ids[row, : len(tokens)] = torch.tensor(tokens)
            attention[row, : len(tokens)] = 1
        found = collect_sites(model, [self.site], input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False)
        states = found[self.site].cpu()
        return [states[row, : len(tokens)] for row, tokens in enumerate(documents)]

    def _own_tokenizer(self) -> PreTrainedTokenizerBase:
        return cast(PreTrainedTokenizerBase, self.tokenizer)

    def _vocabulary(self) -> Any:
        tokenizer = self._own_tokenizer()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        described = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
        # a call with truncation leaves its settings in the tokenizer: a rank that has tokenised must name the bank as one that has not
        whole = json.dumps({name: part for name, part in described.items() if name not in ("truncation", "padding")}, sort_keys=True)
        return [hashlib.sha256(whole.encode()).hexdigest(), sorted(tokenizer.all_special_tokens)]
