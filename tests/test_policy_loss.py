"""Losses against loops over single tokens, and the gradients that the KL estimators claim to have, by enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from theodolite.functional.policy_loss import WindowTotals, clipped_surrogate, kl_penalty, log_ratio, token_weights

LENGTHS = [3, 0, 7, 1, 5]
MAX_LENGTH = 9


def ragged_mask(lengths: list[int], width: int = MAX_LENGTH) -> torch.Tensor:
    return torch.tensor([[float(t < n) for t in range(width)] for n in lengths])


def totals(lengths: list[int] = LENGTHS) -> WindowTotals:
    return WindowTotals(sum(lengths), sum(n > 0 for n in lengths), len(lengths), MAX_LENGTH)


@pytest.mark.parametrize("aggregation", ["dapo", "dr_grpo", "grpo"])
def test_window_loss_equals_a_loop_over_tokens(aggregation: str) -> None:
    losses = np.random.default_rng(0).normal(size=(len(LENGTHS), MAX_LENGTH))
    expected = 0.0
    if aggregation == "dapo":
        expected = sum(losses[i, t] for i, n in enumerate(LENGTHS) for t in range(n)) / sum(LENGTHS)
    if aggregation == "dr_grpo":
        expected = sum(losses[i, t] for i, n in enumerate(LENGTHS) for t in range(n)) / (len(LENGTHS) * MAX_LENGTH)
    if aggregation == "grpo":
        means = [sum(losses[i, t] for t in range(n)) / n for i, n in enumerate(LENGTHS) if n]
        expected = sum(means) / len(means)
    weights = token_weights(ragged_mask(LENGTHS).double(), aggregation, totals())  # pyright: ignore
    assert float((weights * torch.from_numpy(losses)).sum()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("aggregation", ["dapo", "dr_grpo", "grpo", "seq_mean_token_sum"])
def test_weights_of_any_split_add_up_to_those_of_the_whole(aggregation: str) -> None:
    whole = token_weights(ragged_mask(LENGTHS).double(), aggregation, totals())  # pyright: ignore
    for split in ([[0], [1], [2], [3], [4]], [[0, 1, 2], [3, 4]], [[1], [0, 2, 3, 4]]):
        parts = [token_weights(ragged_mask([LENGTHS[i] for i in rows]).double(), aggregation, totals()) for rows in split]  # pyright: ignore
        order = [i for rows in split for i in rows]
        torch.testing.assert_close(torch.cat(parts), whole[order])


@pytest.mark.parametrize("aggregation", ["dapo", "dr_grpo", "grpo", "seq_mean_token_sum"])
def test_window_without_tokens_has_zero_weights(aggregation: str) -> None:
    assert token_weights(torch.zeros(2, 3), aggregation, WindowTotals(0, 0, 0, 3)).tolist() == [[0.0] * 3] * 2  # pyright: ignore


def test_unknown_names_are_refused_with_the_valid_ones() -> None:
    ones = torch.ones(1, 1)
    with pytest.raises(ValueError, match="dapo, dr_grpo or grpo"):
        token_weights(ones, "bnpo", totals())  # pyright: ignore
    with pytest.raises(ValueError, match="k2, k3 or k3_is"):
        kl_penalty(ones, ones, ones, ones, "k1")  # pyright: ignore


def test_clipped_surrogate_and_its_gradient_equal_a_case_by_case_loop() -> None:
    low, high = 0.2, 0.28
    for ratio in [0.1, 0.79, 0.81, 1.0, 1.27, 1.29, 5.0]:
        for advantage in [-2.0, -0.5, 0.0, 0.5, 2.0]:
            r = torch.tensor([[ratio]], dtype=torch.float64, requires_grad=True)
            loss = clipped_surrogate(r, torch.tensor([[advantage]], dtype=torch.float64), low, high)
            (slope,) = torch.autograd.grad(loss.sum(), r)
            stopped = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
            bound = 1 + high if advantage > 0 else 1 - low
            assert float(loss.detach()) == pytest.approx(-advantage * (bound if stopped else ratio))
            assert float(slope) == pytest.approx(0.0 if stopped else -advantage)


def test_ratio_one_has_the_plain_policy_gradient() -> None:
    log_probs = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = torch.tensor([[1.5], [-0.5]], dtype=torch.float64)
    ratio = log_ratio(log_probs, log_probs.detach(), torch.ones(2, 3)).exp()
    (gradient,) = torch.autograd.grad(clipped_surrogate(ratio, advantages).sum(), log_probs)
    torch.testing.assert_close(gradient, -advantages.expand(2, 3))


def test_padding_never_turns_into_nan_in_value_or_gradient() -> None:
    log_probs = torch.tensor([[-1.0, math.inf, -math.inf, math.nan]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    ratio = log_ratio(log_probs, torch.zeros(1, 4), mask).exp()
    loss = (mask * (clipped_surrogate(ratio, torch.ones(1, 1)) + kl_penalty(log_probs, torch.zeros(1, 4), ratio, mask))).sum()
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient[0, 1:].tolist() == [0.0, 0.0, 0.0]


def test_huge_log_ratios_are_bounded() -> None:
    ratio = log_ratio(torch.tensor([[1e4, -1e4]]), torch.zeros(1, 2), torch.ones(1, 2)).exp()
    assert ratio.tolist() == [pytest.approx([math.exp(20), math.exp(-20)])]


# -- KL estimators: expectations over a categorical distribution, by enumeration ----------------------------------------------------------


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_()
    reference = torch.randn(6, dtype=torch.float64, generator=generator).log_softmax(0)
    return theta, reference


def expected_gradient(estimator: str, sampler: torch.Tensor | None = None) -> torch.Tensor:
    """``E_{a ~ sampler} grad estimate(a)``: every action's estimate, weighted by a constant probability."""
    theta, reference = distributions()
    log_probs = theta.log_softmax(0)
    old = log_probs.detach() if sampler is None else sampler
    ratio = (log_probs - old).exp()[None]
    ones = torch.ones(1, 6, dtype=torch.float64)
    estimate = kl_penalty(log_probs[None], reference[None], ratio, ones, estimator)  # pyright: ignore
    return torch.autograd.grad((old.exp() * estimate[0]).sum(), theta)[0]


def true_gradient(direction: str) -> torch.Tensor:
    theta, reference = distributions()
    log_probs = theta.log_softmax(0)
    reverse = (log_probs.exp() * (log_probs - reference)).sum()
    forward = (reference.exp() * (reference - log_probs)).sum()
    return torch.autograd.grad(reverse if direction == "reverse" else forward, theta)[0]


def test_k2_and_k3_is_have_the_gradient_of_the_reverse_kl_and_k3_that_of_the_forward_kl() -> None:
    torch.testing.assert_close(expected_gradient("k2"), true_gradient("reverse"))
    torch.testing.assert_close(expected_gradient("k3_is"), true_gradient("reverse"))
    torch.testing.assert_close(expected_gradient("k3"), true_gradient("forward"))
    assert (true_gradient("reverse") - true_gradient("forward")).norm() > 0.1


def test_k3_is_keeps_the_reverse_gradient_off_policy_and_k2_does_not() -> None:
    sampler = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(8)).log_softmax(0)
    torch.testing.assert_close(expected_gradient("k3_is", sampler), true_gradient("reverse"))
    assert (expected_gradient("k2", sampler) - true_gradient("reverse")).norm() > 0.1


def test_k3_is_unbiased_and_never_negative() -> None:
    theta, reference = distributions()
    log_probs = theta.detach().log_softmax(0)
    ones = torch.ones(1, 6, dtype=torch.float64)
    k3 = kl_penalty(log_probs[None], reference[None], ones, ones, "k3")[0]
    assert (k3 >= 0).all()
    torch.testing.assert_close((log_probs.exp() * k3).sum(), (log_probs.exp() * (log_probs - reference)).sum())
