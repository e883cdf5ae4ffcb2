"""What an attack's products are written out to equals what autograd computes, and everything on is the target itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from theodolite.functional.attacked_product import aligned_empty, attacked_output, can_attack, constant_product
from theodolite.functional.component_masks import ComponentMask, SourceMask, mask_from_source, scaled_acts


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def plain(acts: Tensor, target: Tensor | None, bias: Tensor | None, mask: SourceMask, write: Tensor) -> Tensor:
    """``(a m) U + d (x W - a U) + bias`` as the method defines it."""
    source = mask.source.expand(*acts.shape)
    weight = mask.importance + (1 - mask.importance) * source
    offset = torch.zeros(()) if bias is None else bias
    if target is None:
        return scaled_acts(acts, ComponentMask(weight)) @ write + offset
    assert mask.delta is not None
    left = target - offset - acts @ write
    return scaled_acts(acts, ComponentMask(weight)) @ write + mask.delta.expand(*acts.shape[:-1])[..., None] * left + offset


@pytest.mark.parametrize("leading", [(2, 3), (2, 1), (1, 3), (1, 1)])
@pytest.mark.parametrize(("delta", "biased"), [(True, False), (True, True), (False, False), (False, True)])
def test_an_attacked_output_and_its_gradients_equal_the_definition(leading: tuple[int, int], delta: bool, biased: bool) -> None:
    importance, write = drawn(2, 3, 4, seed=1).detach(), drawn(4, 6, seed=2).detach()
    bias = drawn(6, seed=3).detach() if biased else None
    acts, source = drawn(2, 3, 4, seed=4), drawn(*leading, 4 + delta, seed=5)
    target = drawn(2, 3, 6, seed=6) if delta else None
    leaves = [leaf for leaf in (acts, target, source) if leaf is not None]
    weights = drawn(2, 3, 6, seed=7).detach()
    found, gradients = [], []
    for function in (attacked_output, plain):
        mask = mask_from_source(importance, source)
        assert can_attack(acts, mask, write)
        found.append(function(acts, target, bias, mask, write))
        gradients.append(torch.autograd.grad((found[-1] * weights).sum(), leaves))
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-14)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("leading", [(2, 3), (1, 1)])
@pytest.mark.parametrize("biased", [True, False])
def test_everything_on_is_the_target_bit_for_bit(leading: tuple[int, int], biased: bool) -> None:
    acts, target = (torch.randn(2, 3, width, generator=torch.Generator().manual_seed(width)) for width in (4, 6))
    mask = mask_from_source(drawn(2, 3, 4).detach().float(), torch.ones(*leading, 5))
    assert torch.equal(attacked_output(acts, target, torch.rand(6) if biased else None, mask, torch.rand(4, 6)), target)


def test_what_needs_more_than_sources_or_casts_is_left_to_autograd() -> None:
    acts, write, importance = drawn(2, 3, 4), drawn(4, 6), drawn(2, 3, 4, seed=1).detach()
    source = drawn(1, 1, 5)
    assert can_attack(acts, mask_from_source(importance, source), write)
    assert not can_attack(acts, mask_from_source(importance.clone().requires_grad_(), source), write)
    assert not can_attack(acts, mask_from_source(importance, source, torch.ones(2, 3, dtype=torch.bool)), write)
    assert not can_attack(acts.float(), mask_from_source(importance, source), write)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_attack(acts, mask_from_source(importance, source), write)
        assert constant_product(torch.ones(2, 3), torch.ones(3, 4)).dtype == torch.bfloat16


def test_a_constant_product_and_its_gradient_and_where_its_rows_begin() -> None:
    inputs, weight = drawn(2, 3, 5), drawn(5, 7, seed=1)
    found = constant_product(inputs, weight)
    torch.testing.assert_close(found, inputs @ weight, rtol=1e-14, atol=1e-14)
    assert found.stride() == (24, 8, 1)
    upstream = drawn(2, 3, 7, seed=2).detach()
    (gradient,) = torch.autograd.grad(found, inputs, upstream)
    torch.testing.assert_close(gradient, upstream @ weight.T, rtol=1e-14, atol=1e-14)
    assert not constant_product(inputs.detach(), weight).requires_grad
    assert [aligned_empty(2, columns, torch.empty(0)).stride(0) for columns in (1, 16, 17)] == [16, 16, 32]
