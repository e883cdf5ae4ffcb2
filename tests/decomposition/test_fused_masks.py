"""What is written out for speed equals what autograd computes: interpolated masks, and the KL divergence with its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from theodolite.functional.component_masks import ComponentMask, mask_from_source, rows_at, scaled_acts
from theodolite.functional.kl_divergence import KLReference, Unembedding, kl_sum


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 5), (1, 3, 5), (1, 1, 5)])
@pytest.mark.parametrize("delta", [True, False])
def test_interpolated_masks_and_their_gradients_equal_plain_ones(shape: tuple[int, ...], delta: bool) -> None:
    acts, importance, source = drawn(2, 3, 4), drawn(2, 3, 4, seed=1), drawn(*shape[:-1], 4 + delta, seed=2)

    def fused(acts: Tensor, importance: Tensor, source: Tensor) -> Tensor:
        return scaled_acts(acts, mask_from_source(importance, source))

    def plain(acts: Tensor, importance: Tensor, source: Tensor) -> Tensor:
        r = source.expand(2, 3, -1)
        mask = importance + (1 - importance) * r[..., :4]
        return scaled_acts(acts, ComponentMask(mask, r[..., 4] if delta else None))

    weights = drawn(2, 3, 4, seed=3).detach()
    found, expected = (function(acts, importance, source) for function in (fused, plain))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    gradients = [torch.autograd.grad((output * weights).sum(), [acts, importance, source]) for output in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)
    assert torch.autograd.gradcheck(fused, (acts, importance, source))


def test_everything_on_is_exactly_nothing_beyond_the_target() -> None:
    acts, importance = drawn(2, 3, 4).detach(), drawn(2, 3, 4, seed=1).detach()
    assert not scaled_acts(acts, mask_from_source(importance, torch.ones(2, 3, 5, dtype=torch.float64))).any()


def test_acts_without_gradient_get_none() -> None:
    source = drawn(1, 1, 5)
    output = scaled_acts(drawn(2, 3, 4).detach(), mask_from_source(drawn(2, 3, 4, seed=1).detach(), source))
    assert torch.autograd.grad(output.sum(), source)[0].shape == source.shape


@pytest.mark.parametrize("source_shape", [(2, 3, 5), (2, 1, 5), (1, 1, 5)])
def test_a_mask_at_some_positions_is_that_part_of_the_whole(source_shape: tuple[int, ...]) -> None:
    acts, importance, source = drawn(2, 3, 4), drawn(2, 3, 4, seed=1), drawn(*source_shape, seed=2)
    places = torch.tensor([4, 0, 3])
    mask = mask_from_source(importance, source)
    some = scaled_acts(rows_at(acts, places, (2, 3)), mask.at(places, (2, 3)))
    whole = scaled_acts(acts, mask).flatten(0, 1)[places]
    torch.testing.assert_close(some, whole, rtol=1e-14, atol=1e-15)
    gradients = [torch.autograd.grad(part.square().sum(), [acts, importance, source]) for part in (some, whole)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)
    assert rows_at(importance[0, 0], places, (2, 3)).shape == (4,)


@pytest.mark.parametrize("chunk", [1, 14, 10**6])
def test_kl_and_its_gradient_in_any_chunks(chunk: int) -> None:
    logits, reference = (drawn(5, 7) * 8 - 4).detach().requires_grad_(), drawn(5, 7, seed=1).detach() * 8
    expected = F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), reduction="sum", log_target=True)
    found = kl_sum(logits, reference, chunk)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    (ours,), (theirs,) = (torch.autograd.grad(3 * value, logits) for value in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert float(kl_sum(reference.clone(), reference, chunk)) == 0.0
    known = kl_sum(logits, KLReference(reference), chunk)
    torch.testing.assert_close(known, found, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(known, logits)[0] * 3, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gradient_without_its_value_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    logits, plain = (drawn(5, 7) * 8 - 4).detach().to(dtype).requires_grad_(), (drawn(5, 7, seed=1).detach() * 8).to(dtype)
    for reference in (plain, KLReference(plain)):
        value, none = kl_sum(logits, reference, 14), kl_sum(logits, reference, 14, valued=False)
        assert torch.isnan(none)
        assert none.dtype == value.dtype
        (found,) = torch.autograd.grad(none, logits)
        (expected,) = torch.autograd.grad(kl_sum(logits, reference, 14), logits)
        assert torch.equal(found, expected)
        assert found.any()
        assert torch.equal(kl_sum(logits.detach(), reference, 14, valued=False), value.detach()), "there is nothing else to compute"


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 5e-2)])
def test_kl_of_states_is_that_of_their_logits(rows: int, dtype: torch.dtype, error: float) -> None:
    states, weight = drawn(5, 3).detach().to(dtype).requires_grad_(), (drawn(3, 7, seed=2).detach() * 8 - 4).to(dtype)
    reference, unembedding = KLReference((drawn(5, 7, seed=1).detach() * 8).to(dtype)), Unembedding(weight, rows)
    found, expected = kl_sum(states, reference, 1, unembedding=unembedding), kl_sum(states @ weight, reference, 14)
    torch.testing.assert_close(found, expected, rtol=error, atol=error)
    (ours,) = torch.autograd.grad(found, states)
    ours = ours.clone()  # the next gradient takes its memory
    (theirs,) = torch.autograd.grad(kl_sum(states @ weight, reference, 14), states)
    torch.testing.assert_close(ours, theirs, rtol=4 * error, atol=4 * error)
    none = kl_sum(states, reference, 1, False, unembedding)
    assert torch.isnan(none)
    assert torch.equal(torch.autograd.grad(none, states)[0], ours)
    own = KLReference(unembedding.all_logits(states.detach()))
    same = kl_sum(states, own, 1, unembedding=unembedding)
    assert float(same.detach()) == 0.0
    assert not torch.autograd.grad(same, states)[0].any()


def test_where_logits_are_the_reference_the_gradient_is_exactly_zero() -> None:
    logits = (drawn(5, 7).float() * 8).detach().requires_grad_()
    for valued in (True, False):
        (gradient,) = torch.autograd.grad(kl_sum(logits, KLReference(logits.detach().clone()), 14, valued), logits)
        assert not gradient.any()


def test_a_divergence_whose_gradient_was_written_over_is_not_differentiated() -> None:
    logits, reference = drawn(5, 7), KLReference(drawn(5, 7, seed=1).detach())
    first, second = kl_sum(logits, reference, 14), kl_sum(logits, reference, 14)
    torch.autograd.grad(second, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first, logits)


def test_kl_of_half_precision_is_summed_in_single() -> None:
    logits = (drawn(4, 9) * 4).detach().to(torch.bfloat16).requires_grad_()
    value = kl_sum(logits, torch.zeros(4, 9, dtype=torch.bfloat16), 20)
    assert value.dtype == torch.float32
    assert torch.autograd.grad(value, logits)[0].dtype == torch.bfloat16
