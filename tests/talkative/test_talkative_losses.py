"""Losses of talkative autoencoders against NumPy, and the straight-through gradient against finite differences of its relaxation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from theodolite.functional.talkative_losses import (
    directional_error,
    gumbel_noise,
    kl_to_reference,
    mean_squared_error,
    relative_mse,
    straight_through_gumbel,
    token_entropy,
)

RNG = np.random.default_rng(0)


def test_row_losses_equal_their_definitions() -> None:
    read, target = RNG.normal(size=(5, 7)), RNG.normal(size=(5, 7)) * 3
    both = torch.from_numpy(read), torch.from_numpy(target)
    np.testing.assert_allclose(mean_squared_error(*both), ((read - target) ** 2).mean(1), atol=1e-12)
    np.testing.assert_allclose(relative_mse(*both), ((read - target) ** 2).mean(1) / (target**2).mean(1), atol=1e-12)
    scaled = [x * np.sqrt(7) / np.linalg.norm(x, axis=1, keepdims=True) for x in (read, target)]
    np.testing.assert_allclose(directional_error(*both), ((scaled[0] - scaled[1]) ** 2).mean(1), atol=1e-12)


def test_a_reconstruction_that_says_nothing_scores_one_in_square_and_two_in_direction() -> None:
    nothing, target = torch.zeros(3, 4), torch.from_numpy(RNG.normal(size=(3, 4))).float()
    assert relative_mse(nothing, target).tolist() == [1.0, 1.0, 1.0]
    assert directional_error(nothing, target).tolist() == [2.0, 2.0, 2.0]


def test_kl_and_entropy_equal_sums_over_the_vocabulary_and_pass_over_forbidden_tokens() -> None:
    first, second = RNG.normal(size=(2, 3, 6)), RNG.normal(size=(2, 3, 6))
    kept = [0, 1, 3, 5]
    probs = [np.exp(x[..., kept]) / np.exp(x[..., kept]).sum(-1, keepdims=True) for x in (first, second)]
    tensors = [torch.from_numpy(x.copy()) for x in (first, second)]
    for tensor in tensors:
        tensor[..., [2, 4]] = -torch.inf
    expected = (probs[0] * (np.log(probs[0]) - np.log(probs[1]))).sum(-1)
    np.testing.assert_allclose(kl_to_reference(*tensors), expected, atol=1e-12)
    np.testing.assert_allclose(token_entropy(tensors[0]), -(probs[0] * np.log(probs[0])).sum(-1), atol=1e-12)
    logits = tensors[1].requires_grad_()
    (kl_to_reference(tensors[0], logits) - token_entropy(logits)).sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("tau", [0.3, 1.0, 5.0])
def test_straight_through_gradient_is_that_of_the_soft_relaxation(tau: float) -> None:
    logits, weights = torch.from_numpy(RNG.normal(size=(3, 5))).requires_grad_(), torch.from_numpy(RNG.normal(size=(3, 5)))
    noise = gumbel_noise(torch.from_numpy(RNG.random((3, 5))))
    hot = straight_through_gumbel(logits, noise, tau)
    assert torch.equal(hot.detach().round(), torch.nn.functional.one_hot((logits + noise).argmax(-1), 5).double())
    (hot * weights).sum().backward()

    def relaxed(values: np.ndarray) -> float:
        exponent = (values + noise.numpy()) / tau
        soft = np.exp(exponent - exponent.max(-1, keepdims=True))
        return float((soft / soft.sum(-1, keepdims=True) * weights.numpy()).sum())

    values, step = logits.detach().numpy(), 1e-6
    for row, column in np.ndindex(3, 5):
        up, down = values.copy(), values.copy()
        up[row, column] += step
        down[row, column] -= step
        assert logits.grad is not None
        assert float(logits.grad[row, column]) == pytest.approx((relaxed(up) - relaxed(down)) / (2 * step), abs=1e-7)


def test_gumbel_samples_follow_the_softmax_whatever_tau_is() -> None:
    logits = torch.from_numpy(RNG.normal(size=6)) * 1.5
    noise = gumbel_noise(torch.from_numpy(np.random.default_rng(1).random((40_000, 6))))
    counts = straight_through_gumbel(logits.expand(40_000, -1), noise, 0.1).sum(0).round().numpy()
    assert chisquare(counts, logits.softmax(0).numpy() * 40_000).pvalue > 1e-3


def test_extreme_uniform_numbers_give_finite_noise() -> None:
    assert bool(gumbel_noise(torch.tensor([0.0, 1.0])).isfinite().all())
