"""Every objective against a loop over single tokens in plain Python floats, and the claims their gradients make."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from theodolite.functional.advantages import gdpo_advantages, group_advantages, overlong_penalty, weighted_reward
from theodolite.functional.importance import (
    MISMATCH_MODES,
    mismatch_log_ratio,
    mismatch_statistics,
    mismatch_weights,
    sequence_log_ratio,
    sequence_token_log_ratio,
)
from theodolite.functional.policy_loss import WindowTotals, cispo_surrogate, clipped_surrogate, microbatch_token_mean, token_weights

LENGTHS = [3, 7, 1, 0, 5]
WIDTH = 8
MASK = torch.tensor([[float(t < n) for t in range(WIDTH)] for n in LENGTHS], dtype=torch.float64)


def drawn(seed: int, scale: float = 0.4) -> torch.Tensor:
    return scale * torch.randn(len(LENGTHS), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * MASK


# -- advantages ----------------------------------------------------------------------------------------------------------------------------


def test_rloo_is_each_reward_against_the_mean_of_the_others() -> None:
    values = torch.tensor([1.0, 0, 0.25, math.nan, 2, 2, 0, 1], dtype=torch.float64)
    found = group_advantages(values, 4, "rloo").tolist()
    for group in (range(4), range(4, 8)):
        for i in group:
            others = [float(values[j]) for j in group if j != i and not math.isnan(float(values[j]))]
            expected = 0.0 if math.isnan(float(values[i])) else float(values[i]) - statistics.mean(others)
            assert found[i] == pytest.approx(expected)


def test_rewards_that_nobody_scored_stay_unscored_when_added() -> None:
    components = torch.tensor([[1.0, 2.0], [math.nan, 3.0], [math.nan, math.nan]])
    found = weighted_reward(components, torch.tensor([2.0, 0.5]))
    assert found[:2].tolist() == [3.0, 1.5]
    assert math.isnan(float(found[2]))


def test_gdpo_normalises_each_reward_in_its_group_then_whitens_over_the_window() -> None:
    generator = torch.Generator().manual_seed(0)
    components = torch.rand(12, 2, dtype=torch.float64, generator=generator) * torch.tensor([1.0, 100.0])
    components[5, 0] = math.nan
    components[8:] = 0.5  # a group in which nothing varies
    weights = [1.0, 0.3]
    sums = []
    for i in range(8):
        total = 0.0
        for k in range(2):
            group = [float(components[j, k]) for j in range(i // 4 * 4, i // 4 * 4 + 4) if not math.isnan(float(components[j, k]))]
            value = float(components[i, k])
            if not math.isnan(value):
                total += weights[k] * (value - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        sums.append(total)
    expected = [(s - statistics.mean(sums)) / (statistics.stdev(sums) + 1e-4) for s in sums] + [0.0] * 4
    found = gdpo_advantages(components, torch.tensor(weights), 4)
    assert found.tolist() == pytest.approx(expected)
    assert gdpo_advantages(torch.full((4, 2), math.nan), torch.ones(2), 4).tolist() == [0.0] * 4


def test_one_reward_with_a_large_range_drowns_the_other_only_when_rewards_are_summed_first() -> None:
    components = torch.tensor([[1.0, 0], [0, 100], [1, 0], [0, 100], [1, 100], [0, 0], [1, 100], [0, 0]], dtype=torch.float64)
    separate = gdpo_advantages(components, torch.ones(2), 8)
    summed = group_advantages(weighted_reward(components, torch.ones(2)), 8)
    assert float(separate[0] - separate[5]) == pytest.approx(float(separate[1] - separate[5]), rel=1e-3)
    assert float(summed[0] - summed[5]) < 0.02 * float(summed[1] - summed[5])


@pytest.mark.parametrize(("length", "penalty"), [(0, 0.0), (60, 0.0), (70, 0.0), (85, -0.5), (100, -1.0), (130, -1.0)])
def test_overlong_penalty_falls_linearly_over_the_buffer(length: int, penalty: float) -> None:
    assert float(overlong_penalty(torch.tensor([length]), 100, 30)) == pytest.approx(penalty)


def test_buffers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="use 1 to 100"):
        overlong_penalty(torch.tensor([1]), 100, 101)


# -- ratios and surrogates -----------------------------------------------------------------------------------------------------------------


def test_sequence_ratio_is_the_geometric_mean_over_loss_tokens() -> None:
    ratios = drawn(1)
    found = sequence_log_ratio(ratios, MASK).squeeze(1).exp()
    for i, n in enumerate(LENGTHS):
        product = math.prod(math.exp(float(ratios[i, t])) for t in range(n))
        assert float(found[i]) == pytest.approx(product ** (1 / n) if n else 1.0)


def test_gspo_token_has_the_value_and_with_one_advantage_per_sequence_the_gradient_of_gspo() -> None:
    old, advantages = drawn(2), torch.tensor([[0.7], [-1.2], [0.3], [0.0], [1.1]], dtype=torch.float64)
    gradients, values = [], []
    for kind in ("sequence", "token"):
        log_probs = drawn(3).requires_grad_()
        ratio = (log_probs - old) * MASK
        s = sequence_log_ratio(ratio, MASK) if kind == "sequence" else sequence_token_log_ratio(log_probs, ratio, MASK)
        token_loss = clipped_surrogate(s.exp(), advantages, 0.1, 0.2).expand(-1, WIDTH)
        weights = token_weights(MASK, "grpo", WindowTotals(16, 4, 5, WIDTH))
        loss = (weights * token_loss).sum()
        gradients.append(torch.autograd.grad(loss, log_probs)[0])
        values.append(float(loss.detach()))
    assert values[0] == pytest.approx(values[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert float(gradients[0].abs().max()) > 0


@pytest.mark.parametrize("ratio_cap", [None, 3.0])
@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_clips_equal_a_case_by_case_loop(ratio_cap: float | None, dual_clip: float | None) -> None:
    for ratio in [0.1, 0.79, 0.81, 1.0, 1.19, 1.21, 2.5, 3.5, 50.0]:
        for advantage in [-2.0, -0.5, 0.0, 0.5, 2.0]:
            first = min(ratio, ratio_cap) if ratio_cap else ratio
            loss = -min(first * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            if dual_clip and advantage < 0:
                loss = min(loss, -dual_clip * advantage)
            r, a = (torch.tensor([[x]], dtype=torch.float64) for x in (ratio, advantage))
            assert float(clipped_surrogate(r, a, ratio_cap=ratio_cap, dual_clip=dual_clip)) == pytest.approx(loss)


def test_cispo_never_takes_a_token_s_gradient_away() -> None:
    ratio = torch.tensor([[0.01, 0.5, 1.0, 4.0, 90.0]], dtype=torch.float64)
    log_probs = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    for advantage in (-1.5, 2.0):
        loss = cispo_surrogate(log_probs, ratio, torch.tensor([[advantage]]), ratio_cap=5.0, ratio_floor=0.2)
        (found,) = torch.autograd.grad(loss.sum(), log_probs)
        assert found[0].tolist() == pytest.approx([-advantage * min(max(float(r), 0.2), 5.0) for r in ratio[0]])


def test_seq_mean_token_sum_and_bnpo_equal_loops_and_bnpo_alone_depends_on_the_split() -> None:
    losses = drawn(4, 1.0)
    weights = token_weights(MASK, "seq_mean_token_sum", WindowTotals(16, 4, 5, WIDTH))
    sums = [sum(float(losses[i, t]) for t in range(n)) for i, n in enumerate(LENGTHS) if n]
    assert float((weights * losses).sum()) == pytest.approx(statistics.mean(sums))
    whole = float(microbatch_token_mean(losses, MASK))
    assert whole == pytest.approx(sum(sums) / sum(LENGTHS))
    halves = [float(microbatch_token_mean(losses[rows], MASK[rows])) for rows in (slice(0, 2), slice(2, 5))]
    assert statistics.mean(halves) != pytest.approx(whole, rel=1e-3)


# -- sampler and trainer -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MISMATCH_MODES)
def test_mismatch_weights_equal_a_loop(mode: Any) -> None:
    old, sampler, low, high = drawn(5, 1.0), drawn(6, 1.0), 0.5, 2.0
    gap = mismatch_log_ratio(old, sampler, MASK)
    found = mismatch_weights(gap, MASK, mode, low, high).expand(-1, WIDTH)
    kept = 0
    for i, n in enumerate(LENGTHS):
        d = [float(old[i, t] - sampler[i, t]) for t in range(n)]
        for t in range(n):
            ratio = math.exp({"token": d[t], "sequence": sum(d), "geometric": sum(d) / n}[mode.split("_")[0]])
            weight = min(ratio, high) if mode.endswith("tis") else (ratio if low <= ratio <= high else 0.0)
            weight = float(weight > 0) if mode == "geometric_mis" else weight
            assert float(found[i, t]) == pytest.approx(weight)
            kept += weight > 0
    assert kept
    assert kept < sum(LENGTHS) or mode.endswith("tis")


def test_mismatch_bounds_and_modes_that_cannot_work_are_refused() -> None:
    gap = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="keep nothing"):
        mismatch_weights(gap, gap, "token_mis", 2.0, 1.0)
    with pytest.raises(ValueError, match="geometric_mis"):
        mismatch_weights(gap, gap, "tis", 0.0, 1.0)  # pyright: ignore


def test_log_probs_that_are_not_numbers_count_as_no_mismatch_and_huge_ones_are_bounded() -> None:
    sampler = torch.tensor([[math.nan, -1.0, -1e9, -1.0]])
    gap = mismatch_log_ratio(torch.tensor([[-1.0, -1.0, -1.0, math.nan]]), sampler, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    assert gap.tolist() == [[0.0, 0.0, 20.0, 0.0]]


def test_mismatch_statistics_are_token_and_sequence_means_and_zero_for_equal_distributions() -> None:
    old, sampler = drawn(7), drawn(8)
    gap, weights = mismatch_log_ratio(old, sampler, MASK), MASK * torch.tensor([[1.0], [3.0], [1.0], [1.0], [2.0]], dtype=torch.float64)
    found = mismatch_statistics(gap, MASK, weights)
    d = {(i, t): float(old[i, t] - sampler[i, t]) for i, n in enumerate(LENGTHS) for t in range(n)}
    counts = [1, 3, 1, 1, 2]
    assert found["sampler_gap"] == pytest.approx((sum(counts[i] * abs(x) for (i, _), x in d.items()), float(weights.sum())))
    assert found["sampler_kl"][0] == pytest.approx(sum(counts[i] * (math.exp(x) - x - 1) for (i, _), x in d.items()))
    products = [math.exp(sum(d[i, t] for t in range(n))) for i, n in enumerate(LENGTHS)]
    expected = sum(c * p for c, p, n in zip(counts, products, LENGTHS, strict=True) if n)
    assert found["sampler_sequence_ratio"] == pytest.approx((expected, 7.0))
    equal = mismatch_statistics(torch.zeros_like(gap), MASK, MASK)
    assert [total / count for total, count in equal.values()] == [0.0, 0.0, 1.0]
