"""What decoding continues from, and the two ways to go on: prompts shared between rows, or one cache per row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .prompt_attention import PromptAttention, attending


@dataclass(slots=True)
class Prefix:
    """What decoding continues from.

    Attributes:
        cache: Keys and values of every prefix; used up by decoding.
        logits: (B, V) of the next token.
        attention: (B, P), 1 on real tokens; (G, P) with ``rows``.
        positions: (B,) position of the next token.
        rows: (B,) which of G prefixes each row continues, in ascending order; None = ``cache`` and ``attention`` have a row for each.
    """

    cache: DynamicCache
    logits: Tensor
    attention: Tensor
    positions: Tensor
    rows: Tensor | None = None

    @staticmethod
    def repeated(cache: DynamicCache, logits: Tensor, attention: Tensor, rows: Tensor, share: bool) -> Prefix:
        """G computed prompts as B prefixes.

        Args:
            cache: Keys and values of G prompts.
            logits: (G, V) of their next tokens.
            attention: (G, P), 1 on real tokens.
            rows: (B,) the prompt of each row, in ascending order.
            share: Keep them once; see :func:`~.prompt_attention.supports_prompt_attention`. Otherwise they are repeated.
        """
        logits, positions = logits.index_select(0, rows), attention.sum(dim=1)[rows]
        if share:
            return Prefix(cache, logits, attention, positions, rows)
        select_rows(cache, rows)
        return Prefix(cache, logits, attention[rows], positions)


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep or repeat rows of a cache in place; recurrent layers know the selection under another name than attention layers."""
    for layer in cache.layers:
        select: Any = getattr(layer, "batch_select_indices", None) or getattr(layer, "reorder_cache")  # noqa: B009
        select(rows)


class Continuation(Protocol):
    """Rows that go on, one token at a time."""

    def advance(self, tokens: Tensor, going: Tensor) -> Tensor:
        """Take (B,) tokens, return the (B, V) logits that follow; what follows in rows that are not ``going`` (B,) means nothing."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows only, in their order."""
        ...


class OwnCaches:
    """A cache per row: any architecture."""

    def __init__(self, model: nn.Module, prefix: Prefix) -> None:
        self._model, self._cache, self._attention = model, prefix.cache, prefix.attention
        self._positions = prefix.positions - 1  # of the last token; ended rows stay there: a learned position table may not reach further

    def advance(self, tokens: Tensor, going: Tensor) -> Tensor:
        """See :class:`Continuation`."""
        self._attention = torch.cat([self._attention, self._attention.new_ones(len(self._attention), 1)], dim=1)
        self._positions = self._positions + going
        outputs: Any = self._model(
            input_ids=tokens[:, None],
            attention_mask=self._attention,
            position_ids=self._positions[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = outputs.past_key_values
        return outputs.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """See :class:`Continuation`."""
        select_rows(self._cache, rows)
        self._attention, self._positions = self._attention[rows], self._positions[rows]


class SharedPrompts:
    """A cache per prompt, and each row's own tokens."""

    def __init__(self, model: nn.Module, prefix: Prefix, attention: PromptAttention) -> None:
        self._model, self._attention, self._positions = model, attention, prefix.positions - 1  # as in OwnCaches

    def advance(self, tokens: Tensor, going: Tensor) -> Tensor:
        """See :class:`Continuation`."""
        self._positions = self._positions + going
        outputs: Any = self._model(
            input_ids=tokens[:, None], position_ids=self._positions[:, None], past_key_values=self._attention.cache, use_cache=True
        )
        return outputs.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """See :class:`Continuation`."""
        self._attention.keep(rows)
        self._positions = self._positions[rows]


@contextmanager
def continuing(model: nn.Module, prefix: Prefix, steps: int) -> Iterator[Continuation]:
    """Go on from a prefix for at most ``steps`` tokens; inside, the model computes nothing else.

    Args:
        model: A causal language model of ``transformers``, in evaluation mode.
        prefix: Used up.
        steps: Most tokens.
    """
    if prefix.rows is None:
        yield OwnCaches(model, prefix)
        return
    attention = PromptAttention(prefix.cache, prefix.attention, prefix.rows, steps)
    with attending(model, attention):
        yield SharedPrompts(model, prefix, attention)
