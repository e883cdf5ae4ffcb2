"""Attention for decoding that reads every prompt's keys and values once per step, however many rows continue that prompt.

A cache with one copy of the prompt per row is mostly copies, and a decode step on it is mostly memory traffic. Here the prompts stay as
they were computed: the queries of all rows of a prompt meet its keys in one product, and each row's own tokens lie in a buffer of their
final size. Both sets of scores go through one softmax, so the result is plain attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .scoring import supports_shared_prefix

NAME = "theodolite_prompt_attention"
UNEVEN = 4
"""Slots per row beyond which grouping by prompt costs more than it saves (one prompt with many rows, many with one)."""
HARMLESS = frozenset({"is_causal", "output_attentions", "position_ids", "use_cache"})
"""Settings that say nothing about scores; anything else that is set (a window, a soft cap, sinks, biases) is refused."""


class UnknownAttentionError(Exception):
    """A layer asked for more than scaled dot products and a softmax."""


class Tail(DynamicLayer):
    """Keys and values of each row's own tokens, (B, heads, tokens so far, width), in buffers of their final size.

    Args:
        keys: (G, heads, P, width) of the prompts, for the shape.
        values: Likewise.
        rows: B.
        steps: Most tokens.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: int, steps: int) -> None:
        super().__init__()
        self._buffers = [like.new_empty(rows, like.shape[1], steps, like.shape[3]) for like in (keys, values)]
        self._show(0)
        self.is_initialized = True

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens and return all."""
        start = cast(Tensor, self.keys).shape[2]
        stop = start + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        self._show(stop)
        return cast(Tensor, self.keys), cast(Tensor, self.values)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, moved to the front of the same buffers."""
        length = cast(Tensor, self.keys).shape[2]
        for buffer in self._buffers:
            buffer[: len(indices), :, :length] = buffer[:, :, :length].index_select(0, indices)
        self._buffers = [buffer[: len(indices)] for buffer in self._buffers]
        self._show(length)


class PromptAttention:
    """Attention of one new token per row, and the caches it reads.

    Args:
        cache: G prompts, as a prefill leaves them; every layer holds all keys and values.
        attention: (G, P), 1 on real tokens.
        rows: (B,) the prompt of each row; rows of one prompt lie together, in the prompts' order.
        steps: Most tokens that will be added.

    Attributes:
        cache: Hand this to the model as ``past_key_values``.
    """

    def __init__(self, cache: Cache, attention: Tensor, rows: Tensor, steps: int) -> None:
        self._prompts = [cast(tuple[Tensor, Tensor], (layer.keys, layer.values)) for layer in cast(Any, cache.layers)]
        padding = torch.zeros(attention.shape, dtype=self._prompts[0][0].dtype, device=attention.device)
        padding = padding.masked_fill(attention == 0, -torch.inf)[:, None, None]
        self._padding = None if bool(attention.all()) else padding
        self.cache = Cache(layers=[Tail(keys, values, len(rows), steps) for keys, values in self._prompts])
        self._arrange(rows)

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows only; ``rows`` are ascending indices."""
        self.cache.batch_select_indices(rows)
        self._arrange(self._rows[rows])

    def _arrange(self, rows: Tensor) -> None:
        """Give every row a slot: prompt times most rows of any prompt, plus its place among that prompt's rows."""
        present, rows = rows.unique(return_inverse=True)
        counts = rows.bincount()
        self._groups, self._most = len(present), int(counts.max())
        if self._groups * self._most > UNEVEN * len(rows):
            present, rows = present[rows], torch.arange(len(rows), device=rows.device)
            counts, self._groups, self._most = torch.ones_like(rows), len(rows), 1
        if len(present) != len(self._prompts[0][0]) or self._most == 1:
            self._prompts = [(keys.index_select(0, present), values.index_select(0, present)) for keys, values in self._prompts]
            self._padding = None if self._padding is None else self._padding.index_select(0, present)
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        self._rows, self._slots = rows, None if self._groups * self._most == len(rows) else rows * self._most + place

    def _by_prompt(self, values: Tensor) -> Tensor:
        """(B, heads, n, w) to (G, heads, slots x n, w), 0 in empty slots."""
        _, heads, n, width = values.shape
        if self._slots is not None:
            values = values.new_zeros(self._groups * self._most, heads, n, width).index_copy_(0, self._slots, values)
        values = values.reshape(self._groups, self._most, heads, n, width)
        return values.transpose(1, 2).reshape(self._groups, heads, self._most * n, width)

    def _by_row(self, values: Tensor) -> Tensor:
        """The way back."""
        groups, heads, _, width = values.shape
        values = values.view(groups, heads, self._most, -1, width).transpose(1, 2).flatten(0, 1)
        return values if self._slots is None else values.index_select(0, self._slots)

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        """The attention interface of ``transformers``: ``query`` is (B, query heads, 1, width), ``key`` and ``value`` are the tails."""
        strange = sorted(name for name, setting in settings.items() if setting is not None and name not in HARMLESS)
        if strange or dropout or attention_mask is not None or query.shape[2] != 1:
            raise UnknownAttentionError(f"Shared prompts know no {', '.join(strange) or 'dropout, masks or longer queries'}.")
        keys, values = self._prompts[module.layer_idx]
        batch, heads, _, width = query.shape
        query = query.reshape(batch, key.shape[1], heads // key.shape[1], width) * (width**-0.5 if scaling is None else scaling)
        shared = self._by_prompt(query) @ keys.transpose(2, 3)
        if self._padding is not None:
            shared += self._padding
        weights = torch.cat([self._by_row(shared), query @ key.transpose(2, 3)], dim=-1).softmax(dim=-1)
        to_prompt, to_tail = weights.split([keys.shape[2], key.shape[2]], dim=-1)
        found = self._by_row(self._by_prompt(to_prompt) @ values) + to_tail @ value
        return found.reshape(batch, 1, heads, width), None


@contextmanager
def attending(model: nn.Module, attention: PromptAttention) -> Iterator[None]:
    """Inside, the model's layers attend through ``attention``."""
    config: Any = model.config
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[NAME]


@torch.no_grad()
def supports_prompt_attention(model: nn.Module) -> bool:
    """Whether decoding through :class:`PromptAttention` is what the model computes: tried out on a few tokens.

    Half precision is left to the kernels, which accumulate scores in float32. The model must be in evaluation mode.
    """
    config: Any = getattr(model, "config", None)
    if not supports_shared_prefix(model) or config._attn_implementation != "sdpa" or getattr(config, "sub_configs", None):
        return False
    if any(parameter.dtype not in (torch.float32, torch.float64) for parameter in model.parameters()):
        return False
    device = next(model.parameters()).device
    ids, mask = torch.tensor([[0, 2, 1], [1, 2, 0]], device=device), torch.tensor([[0, 1, 1], [1, 1, 1]], device=device)
    rows, positions = torch.tensor([0, 1, 1], device=device), mask.cumsum(1) - 1
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions.clamp_min(0), "use_cache": True}
    attention = PromptAttention(model(**inputs).past_key_values, mask, rows, 1)
    new = {"input_ids": rows[:, None], "position_ids": positions[rows, -1:] + 1, "use_cache": True}
    plain = model(**inputs).past_key_values
    plain.batch_select_indices(rows)
    expected = model(**new, attention_mask=torch.cat([mask[rows], mask[rows, -1:]], dim=1), past_key_values=plain).logits
    try:
        with attending(model, attention):
            found = model(**new, past_key_values=attention.cache).logits
    except UnknownAttentionError:
        return False
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
