"""LlamaSimpleMLP: a llama with a plain GELU network instead of a gated one, and weights tied between embedding and unembedding.

Parameter names are those of the checkpoints in use for parameter decomposition (``wte``, ``h.<i>.attn.q_proj``, ``h.<i>.mlp.c_fc``, ...).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.functional.attacked_product import constant_product
from theodolite.functional.frozen_layers import frozen_rms_norm, tanh_gelu


class LlamaSimpleMLP(nn.Module):
    """Token ids (B, S) to logits (B, S, vocabulary).

    Args:
        vocab_size: Vocabulary.
        n_layer: Number of blocks.
        n_head: Number of query heads.
        n_embd: Width of the stream.
        n_intermediate: Width of the hidden layer of the networks.
        n_ctx: Longest sequence.
        n_key_value_heads: Number of key and value heads; None = ``n_head``.
        rotary_base: Of the rotary positions.
        rotary_adjacent_pairs: Rotate neighbours instead of the two halves of a head.
    """

    def __init__(
        self,
        vocab_size: int,
        n_layer: int,
        n_head: int,
        n_embd: int,
        n_intermediate: int,
        n_ctx: int,
        n_key_value_heads: int | None = None,
        rotary_base: float = 10000.0,
        rotary_adjacent_pairs: bool = False,
    ) -> None:
        super().__init__()
        heads = n_key_value_heads or n_head
        if n_embd % n_head or n_head % heads:
            raise ValueError(f"A width of {n_embd} with {n_head} heads and {heads} key/value heads does not divide.")
        self.n_ctx = n_ctx
        self.wte = nn.Embedding(vocab_size, n_embd)
        tables = rotary_tables(n_ctx, n_embd // n_head, rotary_base)
        self.h = nn.ModuleList(_Block(n_embd, n_head, heads, n_intermediate, tables, rotary_adjacent_pairs) for _ in range(n_layer))
        self.ln_f = RMSNorm(n_embd)
        self.lm_head = _Unembedding(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def initialise(self, generator: torch.Generator) -> None:
        """Normal weights of deviation 0.02, those that write to the stream divided by sqrt(2 layers)."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                    scale = 0.02 / (2 * len(self.h)) ** 0.5 if writes else 0.02
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits; errors as of :meth:`states`."""
        return self.lm_head(self.states(tokens))

    def states(self, tokens: Tensor) -> Tensor:
        """(B, S, width) what the unembedding reads.

        Raises:
            ValueError: If the sequence is longer than ``n_ctx``.
        """
        if tokens.shape[-1] > self.n_ctx:
            raise ValueError(f"A sequence of {tokens.shape[-1]} tokens is longer than the target's n_ctx {self.n_ctx}.")
        stream = self.wte(tokens)
        for block in self.h:
            stream = block(stream)
        return self.ln_f(stream)

    def unembedding(self) -> Tensor:
        """(width, vocabulary): logits are :meth:`states` times this."""
        return self.lm_head.weight.T


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain, computed in at least float32; eps 1e-6.

    Args:
        width: Of the states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, states: Tensor) -> Tensor:
        """(..., width) to the same."""
        if not self.weight.requires_grad:
            return frozen_rms_norm(states, self.weight, 1e-6)
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(states.dtype)


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped keys and values.

    Args:
        width: Of the stream.
        heads: Number of query heads.
        groups: Number of key and value heads.
        tables: (2, n_ctx, head width) cosines and sines.
        adjacent_pairs: Which pairs are rotated; see :class:`LlamaSimpleMLP`.
    """

    rotary: Tensor

    def __init__(self, width: int, heads: int, groups: int, tables: Tensor, adjacent_pairs: bool = False) -> None:
        super().__init__()
        self.n_heads, self.n_groups, self.adjacent_pairs = heads, groups, adjacent_pairs
        head = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, groups * head, bias=False)
        self.v_proj = nn.Linear(width, groups * head, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.register_buffer("rotary", tables, persistent=False)

    def rotate(self, states: Tensor) -> Tensor:
        """Rotate (B, heads, S, head width) by position."""
        cosine, sine = self.rotary[:, : states.shape[-2]].to(states.dtype)
        if self.adjacent_pairs:
            half = cosine.shape[-1] // 2
            cosine, sine = (table[:, :half].repeat_interleave(2, dim=-1) for table in (cosine, sine))
            turned = torch.stack([-states[..., 1::2], states[..., ::2]], dim=-1).flatten(-2)
        else:
            half = states.shape[-1] // 2
            turned, sine = states.roll(half, -1), torch.cat([-sine[:, :half], sine[:, half:]], dim=-1)
        return states * cosine + turned * sine

    def forward(self, states: Tensor) -> Tensor:
        """(B, S, width) to the same."""
        query = self.rotate(self.q_proj(states).unflatten(-1, (self.n_heads, -1)).transpose(1, 2))
        key, value = (proj(states).unflatten(-1, (self.n_groups, -1)).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        key, grouped = self.rotate(key), query.device.type == "cpu"
        if not grouped:  # in single precision a GPU has no fast attention for groups
            key, value = (part.repeat_interleave(self.n_heads // self.n_groups, dim=1) for part in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class _Unembedding(nn.Linear):
    """Logits are the largest product, and a vocabulary is seldom a whole number of cache lines."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.weight.requires_grad else constant_product(input, self.weight.T)


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(tanh_gelu(self.c_fc(states)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, groups: int, hidden: int, tables: Tensor, adjacent_pairs: bool) -> None:
        super().__init__()
        self.rms_1, self.rms_2 = RMSNorm(width), RMSNorm(width)
        self.attn = Attention(width, heads, groups, tables, adjacent_pairs)
        self.mlp = _MLP(width, hidden)

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.attn(self.rms_1(stream))
        return stream + self.mlp(self.rms_2(stream))


def rotary_tables(length: int, head_width: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines of rotary positions (2, length, head width), the two halves alike, in float32."""
    frequencies = base ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()])
