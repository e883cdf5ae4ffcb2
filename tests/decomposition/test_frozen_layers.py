"""Layers with written-out backward passes equal what autograd makes of their definitions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from theodolite.functional.frozen_layers import frozen_rms_norm, tanh_gelu
from theodolite.lightning_modules.decomposition.targets.llama_simple_mlp import Attention, RMSNorm, rotary_tables


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agree(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], inputs: Tensor, error: float) -> None:
    leaf = inputs.clone().requires_grad_()
    found, expected = one(leaf), other(leaf)
    torch.testing.assert_close(found, expected, rtol=error, atol=error)
    upstream = drawn(*found.shape, seed=9).to(found.dtype)
    gradients = [torch.autograd.grad(output, leaf, upstream)[0] for output in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=error, atol=error)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_frozen_norm_and_its_gradient(dtype: torch.dtype, error: float) -> None:
    norm = RMSNorm(6)
    norm.weight.data = drawn(6, seed=1).to(dtype)
    assert norm.weight.requires_grad, "so that it is autograd's"
    agree(lambda states: frozen_rms_norm(states, norm.weight, 1e-6), norm, drawn(2, 3, 6).to(dtype), error)
    frozen = norm(drawn(2, 3, 6).to(dtype))
    assert torch.equal(norm.requires_grad_(False)(drawn(2, 3, 6).to(dtype)), frozen)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 0.0)])
def test_a_gelu_and_its_gradient(dtype: torch.dtype, error: float) -> None:
    inputs = torch.cat([4 * drawn(50), torch.tensor([0.0, -60.0, 60.0, -1e4, 1e4])]).to(dtype)
    agree(tanh_gelu, lambda states: F.gelu(states, approximate="tanh"), inputs, error)


@pytest.mark.parametrize("adjacent", [True, False])
def test_rotation_is_multiplication_by_complex_numbers(adjacent: bool) -> None:
    attention = Attention(16, 2, 1, rotary_tables(5, 8).double(), adjacent).double()
    angles = torch.outer(torch.arange(5), 10000.0 ** (-torch.arange(0, 8, 2) / 8)).double()
    turn = torch.polar(torch.ones_like(angles), angles)

    def expected(states: Tensor) -> Tensor:
        first, second = (states[..., ::2], states[..., 1::2]) if adjacent else states.chunk(2, dim=-1)
        turned = torch.complex(first, second) * turn
        parts = [turned.real, turned.imag]
        return torch.stack(parts, dim=-1).flatten(-2) if adjacent else torch.cat(parts, dim=-1)

    agree(attention.rotate, expected, drawn(2, 2, 5, 8), 1e-6)


def test_heads_share_the_keys_and_values_of_their_group() -> None:
    attention = Attention(16, 4, 2, rotary_tables(5, 4).double()).double().requires_grad_(False)

    def expected(states: Tensor) -> Tensor:
        query, key, value = (
            proj(states).unflatten(-1, (-1, 4)).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = attention.rotate(query), attention.rotate(key)
        mixed = []
        for head in range(4):
            scores = query[:, head] @ key[:, head // 2].mT / 2
            weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
            mixed.append(weights @ value[:, head // 2])
        return attention.o_proj(torch.cat(mixed, dim=-1))

    agree(attention, expected, drawn(2, 5, 16), 1e-12)
