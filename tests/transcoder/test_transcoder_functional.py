"""Selection, sparse products and losses against dense float64 arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from theodolite.functional.activation_threshold import activation_histogram, mean_of, threshold_for_count, update_mean
from theodolite.functional.prefixes import resolve_prefixes
from theodolite.functional.sparse_codes import (
    SparseCodes,
    above_threshold,
    entries_as_codes,
    largest_entries,
    largest_per_row,
    topk_codes,
)
from theodolite.functional.sparse_products import decode, decode_blocks, encode_sparsely
from theodolite.functional.transcoder_losses import (
    AuxiliaryResidual,
    auxiliary_loss,
    dense_blocks,
    jumprelu,
    jumprelu_l0,
    nested_loss,
    nested_reconstructions,
)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 70), st.integers(0, 10**6))
def test_topk_keeps_what_a_full_sort_keeps(n: int, m: int, k: int, seed: int) -> None:
    scores, k = numbers(n, m, seed=seed), min(k, m)
    kept = topk_codes(scores, k).dense().numpy()
    expected = np.where(scores.numpy() >= np.sort(scores.numpy(), axis=1)[:, [m - k]], np.maximum(scores.numpy(), 0), 0)
    assert np.array_equal(kept, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 300), st.integers(1, 40), st.sampled_from([0.0, 0.1, 2.0]), st.integers(0, 10**6))
def test_single_precision_rows_keep_k_different_entries_none_smaller_than_what_is_left(
    n: int, m: int, k: int, step: float, seed: int
) -> None:
    scores, k = numbers(n, m, seed=seed, dtype=torch.float32), min(k, m)
    scores = (scores / step).round() * step if step else scores  # many equal values
    chosen = largest_per_row(scores, k)
    assert chosen.shape == (n, k)
    assert all(len(set(row)) == k for row in chosen.tolist())
    assert torch.equal(scores.gather(1, chosen).sort(dim=1).values, scores.sort(dim=1).values[:, m - k :])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 70), st.integers(1, 300), st.integers(0, 10**6))
def test_largest_entries_are_those_of_a_flat_sort(n: int, m: int, count: int, seed: int) -> None:
    scores = numbers(n, m, seed=seed)
    values, positions = largest_entries(scores, count)
    assert torch.equal(scores.reshape(-1)[positions], values)
    assert torch.equal(values.sort().values, scores.reshape(-1).sort().values[-min(count, n * m) :])


def test_entries_become_row_major_codes_of_positive_values_at_or_above_the_threshold() -> None:
    scores = torch.tensor([[3.0, -1.0, 2.0], [0.5, 4.0, 0.0]])
    values, positions = largest_entries(scores, 6)
    codes = entries_as_codes(values, positions, torch.tensor(2.0), 2, 3)
    assert (codes.rows.tolist(), codes.latents.tolist(), codes.values.tolist()) == ([0, 0, 1], [0, 2, 1], [3.0, 2.0, 4.0])
    assert codes.counts().tolist() == [1, 1, 1]
    assert torch.equal(above_threshold(scores, torch.tensor(2.0)).dense(), torch.tensor([[3.0, 0, 0], [0, 4.0, 0]]))


def random_codes(n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, SparseCodes]:
    """Inputs, encoder, bias, decoder and the codes of a ragged selection."""
    x, w, b, d = numbers(n, 6, seed=seed), numbers(m, 6, seed=seed + 1), numbers(m, seed=seed + 2), numbers(m, 5, seed=seed + 3)
    codes = above_threshold(torch.addmm(b, x, w.t()), torch.tensor(1.5))
    return x, w, b, d, codes


@pytest.mark.parametrize("prefixes", [(24,), (3, 10, 24), (1, 2, 23, 24)])
def test_sparse_forward_and_backward_equal_dense_products(prefixes: tuple[int, ...]) -> None:
    x, w, b, d, codes = random_codes(7, 24)
    leaves = [tensor.requires_grad_() for tensor in (x, w, b, d)]
    ends = torch.tensor(prefixes)
    blocks = decode_blocks(encode_sparsely(x, w, b, codes), d, ends)
    mask = codes.dense() > 0
    dense = dense_blocks(torch.addmm(b, x, w.t()) * mask, d, ends)
    assert torch.allclose(blocks, dense, atol=1e-12)
    cotangent = numbers(*blocks.shape, seed=9)
    ours, theirs = (torch.autograd.grad((out * cotangent).sum(), leaves) for out in (blocks, dense))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-11)


def test_a_rank_without_rows_decodes_none_of_them() -> None:
    codes = topk_codes(torch.zeros(0, 8), 3)
    assert decode_blocks(codes, torch.ones(8, 5), torch.tensor([4, 8])).shape == (0, 2, 5)


def test_nothing_active_decodes_to_zero_with_zero_gradients() -> None:
    x, w, b, d, _ = random_codes(4, 8)
    codes = above_threshold(torch.zeros(4, 8, dtype=torch.float64), torch.tensor(0.0))
    leaves = [tensor.requires_grad_() for tensor in (w, b, d)]
    out = decode(encode_sparsely(x, w, b, codes), d)
    assert not out.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), leaves))


def test_entries_of_value_zero_get_no_gradient() -> None:
    """As behind a ReLU: a row with fewer than k positive scores is filled up with zeros."""
    x, w, b, d, _ = random_codes(5, 8)
    codes = topk_codes(torch.addmm(b, x, w.t()), 8)
    assert not codes.active.all()
    w.requires_grad_()
    gradient = torch.autograd.grad(decode(encode_sparsely(x, w, b, codes), d).square().sum(), w)[0]
    expected = torch.autograd.grad((torch.relu(torch.addmm(b, x, w.t())) @ d).square().sum(), w)[0]
    assert torch.allclose(gradient, expected, atol=1e-10)


def test_nested_loss_is_the_weighted_sum_of_the_prefixes_unexplained_fractions() -> None:
    _, _, _, d, codes = random_codes(9, 24)
    target, base, weights = numbers(9, 5, seed=4), numbers(5, seed=5), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    prefixes = (3, 10, 24)
    variance = (target - target.mean(0)).square().sum()
    reconstructions = nested_reconstructions(decode_blocks(codes, d, torch.tensor(prefixes)), base)
    loss, residuals = nested_loss(reconstructions, target, weights, variance)
    dense = codes.dense().numpy()
    expected = [((dense[:, :p] @ d.numpy()[:p] + base.numpy() - target.numpy()) ** 2).sum() for p in prefixes]
    assert np.allclose(residuals.numpy(), expected, atol=1e-10)
    assert math.isclose(float(loss), float((weights.numpy() * expected).sum() / variance), rel_tol=1e-12)


@pytest.mark.parametrize("prefixes", [(24,), (6, 24)])
def test_auxiliary_loss_uses_raw_scores_of_dead_latents_alone(prefixes: tuple[int, ...]) -> None:
    x, w, b, d, _ = random_codes(6, 24)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[[2, 5, 7, 20]] = True
    leaves = [tensor.requires_grad_() for tensor in (w, b, d)]
    scores = torch.addmm(b, x, w.t())
    residual = numbers(6, len(prefixes), 5, seed=8)
    goal = AuxiliaryResidual(residual, torch.tensor(prefixes))
    loss = auxiliary_loss(x, w, b, d, scores.detach(), dead, 3, goal, torch.tensor(2.0))
    masked = torch.where(dead, scores, -math.inf)
    kept = torch.zeros_like(scores).scatter(1, masked.topk(3).indices, 1.0)
    explained = dense_blocks(scores * kept, d, torch.tensor(prefixes))
    expected = (explained - residual).square().sum() / (len(prefixes) * 2.0)
    assert torch.allclose(loss, expected, atol=1e-12)
    ours, theirs = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
    assert all(torch.allclose(one, other, atol=1e-11) for one, other in zip(ours, theirs, strict=True))
    assert not ours[0][~dead].any()
    assert not ours[2][~dead].any()
    assert (scores[kept > 0] < 0).any()


def test_few_dead_latents_count_in_proportion() -> None:
    x, w, b, d, _ = random_codes(6, 24)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[3] = True
    goal = AuxiliaryResidual(numbers(6, 1, 5, seed=8), torch.tensor([24]))
    scores = torch.addmm(b, x, w.t())
    one, four = (auxiliary_loss(x, w, b, d, scores, dead, k, goal, torch.tensor(1.0)) for k in (1, 4))
    assert torch.allclose(one, 4 * four)


def test_jumprelu_gradients_are_the_papers_pseudo_derivatives() -> None:
    z = torch.tensor([[0.30, 0.52, 0.90], [0.48, 0.10, 0.55]], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    width, g = 0.2, numbers(2, 3, seed=1)
    by_z, by_theta = torch.autograd.grad((jumprelu(z, theta, width) * g).sum(), (z, theta))
    near = np.abs(z.detach().numpy() - 0.5) < width / 2
    assert np.allclose(by_z, g.numpy() * (z.detach().numpy() > 0.5))
    assert np.allclose(by_theta, -(0.5 / width * near * g.numpy()).sum(0))
    count = jumprelu_l0(z, theta, width)
    assert float(count.detach()) == 3
    assert np.allclose(torch.autograd.grad(count, theta)[0], -(near / width).sum(0))


def test_running_threshold_is_unbiased_from_the_first_value_on() -> None:
    state, values = torch.zeros(2, dtype=torch.float64), [1.4, 1.3, 1.5, 1.45]
    assert float(mean_of(state)) == 0.0
    for i, value in enumerate(values, start=1):
        state = update_mean(state, torch.tensor(value), 0.999)
        weights = 0.999 ** np.arange(i)[::-1]
        assert math.isclose(float(mean_of(state)), float((weights * values[:i]).sum() / weights.sum()), rel_tol=1e-7)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_histogram_threshold_admits_the_wanted_number(scale: float) -> None:
    scores = numbers(400, 64, dtype=torch.float32) * scale
    parts = [activation_histogram(part) for part in scores.split([100, 250, 50])]
    histogram = parts[0] + parts[1] + parts[2]
    for count in (400, 3200, 10000):
        threshold = threshold_for_count(histogram, count)
        assert abs(int((scores > threshold).sum()) - count) <= max(2, 0.002 * count)
    assert threshold_for_count(histogram, 400 * 64) == 0.0


@pytest.mark.parametrize(
    ("arguments", "ends"),
    [
        ({"prefixes": [256, 4096]}, (256, 4096)),
        ({"prefixes": [0.0625, 0.25, 1]}, (256, 1024, 4096)),
        ({"blocks": [256, 768, 3072]}, (256, 1024, 4096)),
        ({}, (4096,)),
    ],
)
def test_prefixes_have_one_meaning_in_every_form(arguments: dict, ends: tuple[int, ...]) -> None:
    assert resolve_prefixes(4096, **arguments) == ends


@pytest.mark.parametrize("arguments", [{"prefixes": [256, 256, 4096]}, {"prefixes": [256]}, {"blocks": [4096, 1]}, {"prefixes": [0, 4096]}])
def test_prefixes_that_do_not_increase_to_all_latents_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="must increase to the 4096 latents"):
        resolve_prefixes(4096, **arguments)
