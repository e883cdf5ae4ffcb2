"""Advantages against a plain loop in float64, and what a group without signal gets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from theodolite.functional.advantages import group_advantages, has_signal

EPS = 1e-4


def by_hand(values: list[float], group_size: int, scale: str) -> list[float]:
    """The three formulas, one sample at a time."""
    everything = [value for value in values if not math.isnan(value)]
    result = []
    for i, value in enumerate(values):
        start = i // group_size * group_size
        group = [v for v in values[start : start + group_size] if not math.isnan(v)]
        if math.isnan(value) or len(group) < 2 or max(group) - min(group) <= 1e-8:
            result.append(0.0)
            continue
        divisor = 1.0
        if scale == "group":
            divisor = float(np.std(np.array(group, dtype=np.float64), ddof=1)) + EPS
        if scale == "batch":
            divisor = float(np.std(np.array(everything, dtype=np.float64), ddof=1)) + EPS
        result.append((value - sum(group) / len(group)) / divisor)
    return result


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_advantages_equal_a_loop_in_float64(scale: str, group_size: int) -> None:
    rng = np.random.default_rng(group_size)
    for _ in range(50):
        values = rng.choice([0.0, 0.1, 1.0, 1.1, math.nan, float(rng.normal())], size=6 * group_size).tolist()
        ours = group_advantages(torch.tensor(values, dtype=torch.float64), group_size, scale, EPS)  # pyright: ignore
        assert ours.dtype == torch.float64
        np.testing.assert_allclose(ours.numpy(), by_hand(values, group_size, scale), rtol=1e-12, atol=1e-12)


rewards = st.one_of(st.floats(-10, 10), st.just(math.nan), st.sampled_from([0.0, 1.0]))


@given(st.lists(st.lists(rewards, min_size=4, max_size=4), min_size=1, max_size=5), st.sampled_from(["none", "group", "batch"]))
def test_advantages_are_finite_centred_in_every_group_and_zero_where_there_is_no_reward(groups: list[list[float]], scale: str) -> None:
    values = torch.tensor(groups, dtype=torch.float64).reshape(-1)
    advantages = group_advantages(values, 4, scale)  # pyright: ignore
    assert advantages.isfinite().all()
    assert (advantages[values.isnan()] == 0).all()
    size = advantages.abs().view(-1, 4).sum(dim=1).clamp_min(1)
    assert (advantages.view(-1, 4).sum(dim=1).abs() / size).max() < 1e-6


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_float_noise_single_survivors_and_empty_groups_teach_nothing(scale: str) -> None:
    nan = math.nan
    values = torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.3, nan, nan, 7.0, nan, nan, nan, nan, nan, 0.0, 1.0, nan, 1.0], dtype=torch.float64)
    assert values[0] != values[1]
    advantages = group_advantages(values, 4, scale)  # pyright: ignore
    assert (advantages[:12] == 0).all()
    assert advantages[12] < 0 < advantages[13] == advantages[15]
    assert has_signal(values, 4).tolist() == [False, False, False, True]


def test_lone_winner_of_a_group_keeps_its_advantage() -> None:
    assert group_advantages(torch.tensor([1.0, 0, 0, 0]), 4, "none").tolist() == [0.75, -0.25, -0.25, -0.25]


def test_group_scale_does_not_depend_on_the_reward_unit_and_none_does() -> None:
    values = torch.tensor([0.0, 1.0, 0.5, 1.0], dtype=torch.float64)
    scaled = group_advantages(1000 * values, 4, "group", eps=0.0)
    torch.testing.assert_close(scaled, group_advantages(values, 4, "group", eps=0.0))
    torch.testing.assert_close(group_advantages(1000 * values, 4, "none"), 1000 * group_advantages(values, 4, "none"))


@pytest.mark.parametrize(
    ("values", "group_size", "said"),
    [
        (torch.zeros(4), 1, "group_size of at least 2"),
        (torch.zeros(4), 0, "group_size of at least 2"),
        (torch.zeros(4), 3, "groups of 3"),
        (torch.zeros(2, 2), 2, "groups of 2"),
        (torch.tensor([0.0, math.inf]), 2, "infinite"),
    ],
)
def test_rewards_that_form_no_groups_or_have_no_mean_are_refused(values: torch.Tensor, group_size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        group_advantages(values, group_size)
