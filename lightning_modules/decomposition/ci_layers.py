"""Layers of causal-importance functions. Weights are (in, out), and batched over components (C, in, out)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.functional.attacked_product import constant_product
from theodolite.seeds import derive_seed


class Affine(nn.Module):
    """``x W + b`` with W (in, out).

    Args:
        d_in: Width of the input.
        d_out: Width of the output.
        hidden: A GELU follows, so the initial scale is that of a rectifier (gain sqrt 2).
    """

    def __init__(self, d_in: int, d_out: int, hidden: bool) -> None:
        super().__init__()
        self.fan_in, self.gain = d_in, math.sqrt(2) if hidden else 1.0
        self.W = nn.Parameter(torch.zeros(d_in, d_out))
        self.b = nn.Parameter(torch.zeros(d_out))

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(inputs, self.W.T, self.b) if torch.is_grad_enabled() else constant_product(inputs, self.W, self.b)


class ParallelAffine(nn.Module):
    """C affine maps side by side, W (C, in, out).

    Args:
        count: Number of maps C.
        d_in: Width of each input.
        d_out: Width of each output.
        hidden: As in :class:`Affine`.
    """

    def __init__(self, count: int, d_in: int, d_out: int, hidden: bool) -> None:
        super().__init__()
        self.fan_in, self.gain = d_in, math.sqrt(2) if hidden else 1.0
        self.W = nn.Parameter(torch.zeros(count, d_in, d_out))
        self.b = nn.Parameter(torch.zeros(count, d_out))

    def forward(self, inputs: Tensor) -> Tensor:
        """(C, N, in) to (C, N, out): with the maps in front both directions are batched products, and nothing (N, C, in, out) is made."""
        return torch.baddbmm(self.b[:, None, :], inputs, self.W)


def mlp_layers(widths: Sequence[int], count: int | None = None) -> list[nn.Module]:
    """Affine layers of the given widths with exact GELUs between them; ``count`` of them side by side if given."""
    layers: list[nn.Module] = []
    for index, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
        hidden = index < len(widths) - 2
        layers.append(Affine(d_in, d_out, hidden) if count is None else ParallelAffine(count, d_in, d_out, hidden))
        if hidden:
            layers.append(nn.GELU())
    return layers


class Rotary(nn.Module):
    """Rotary position embedding, half-split pairs.

    Args:
        head_dim: Width of a head, even.
        max_len: Longest sequence.
        base: Of the geometric series of wavelengths.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, max_len: int, base: float) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"Rotary positions need an even head width, got {head_dim}; change the number of heads.")
        self.max_len = max_len
        self.register_buffer("inv_freq", base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))

    def forward(self, states: Tensor) -> Tensor:
        """Rotate (B, heads, S, head_dim) by position.

        Raises:
            ValueError: If the sequence is longer than ``max_len``.
        """
        length = states.shape[-2]
        if length > self.max_len:
            raise ValueError(f"A sequence of {length} is longer than the attention's max_len {self.max_len}; raise max_len.")
        angles = torch.outer(torch.arange(length, device=states.device, dtype=self.inv_freq.dtype), self.inv_freq)
        cosine, sine = (f(angles).repeat(1, 2).to(states.dtype) for f in (torch.cos, torch.sin))
        first, second = states.chunk(2, dim=-1)
        return states * cosine + torch.cat([-second, first], dim=-1) * sine


class BidirectionalAttention(nn.Module):
    """Multi-head attention without causal mask and without biases; inputs without sequence axis are sequences of length 1.

    Args:
        width: Of the stream.
        n_heads: Number of heads.
        max_len: Longest sequence.
        rope_base: See :class:`Rotary`.
    """

    def __init__(self, width: int, n_heads: int, max_len: int = 2048, rope_base: float = 10000.0) -> None:
        super().__init__()
        if width % n_heads:
            raise ValueError(f"A width of {width} does not split into {n_heads} heads.")
        self.n_heads = n_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.rope = Rotary(width // n_heads, max_len, rope_base)

    def forward(self, states: Tensor) -> Tensor:
        """(B, S, width), or (B, width) in which rows are examples."""
        if states.ndim == 2:
            return self.forward(states[:, None])[:, 0]
        query, key, value = (
            projection(states).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(self.rope(query), self.rope(key), value)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))


def initialise_layers(root: nn.Module, *seed: int | str) -> None:
    """Draw every weight under ``root`` from a stream of its own name: normal of variance gain^2/fan-in; biases 0, norms 1."""
    for name, module in root.named_modules():
        if isinstance(module, Affine | ParallelAffine):
            _normal_(module.W, module.gain / math.sqrt(module.fan_in), *seed, name)
        elif isinstance(module, nn.Linear):
            _normal_(module.weight, 1 / math.sqrt(module.in_features), *seed, name)


def _normal_(weight: Tensor, scale: float, *seed: int | str) -> None:
    generator = torch.Generator().manual_seed(derive_seed(*seed))
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
