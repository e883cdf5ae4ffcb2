"""Comparisons against textbook values, enumeration and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from theodolite.functional.statistics import (
    crossed_bootstrap,
    holm,
    literal_paired_t_test,
    matched,
    seed_level_t_test,
    sign_flip_test,
)

# Student 1908, additional hours of sleep gained by ten patients with two drugs: t = -4.0621, p = .00283, interval [-2.46, -0.70]
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_paired_t_test_gives_students_sleep_data() -> None:
    result = seed_level_t_test(SLEEP_1, SLEEP_2)
    assert result.n == 10
    assert result.mean == pytest.approx(-1.58)
    assert result.p_value == pytest.approx(0.002833, abs=1e-6)
    assert (result.low, result.high) == (pytest.approx(-2.4598858), pytest.approx(-0.7001142))
    assert seed_level_t_test(SLEEP_1, SLEEP_2, alternative="less").p_value == pytest.approx(0.002833 / 2, abs=1e-6)


def test_literal_test_counts_samples_as_pairs_and_says_that_they_are_not_independent() -> None:
    generator = np.random.default_rng(0)
    arm, control = generator.random((3, 10)), generator.random((3, 10)) + 0.1
    result = literal_paired_t_test(arm, control)
    assert result.n == 30
    assert result.p_value == pytest.approx(stats.ttest_rel(arm.ravel(), control.ravel()).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    assert not result.independent
    assert "not independent" in result.label


def test_literal_test_rejects_a_true_null_far_more_often_than_the_seed_level_test() -> None:
    generator = np.random.default_rng(1)
    literal = seed_level = 0
    runs = 400
    for _ in range(runs):
        arm, control = (generator.normal(size=(3, 1)) + 0.3 * generator.normal(size=(3, 10)) for _ in range(2))
        literal += literal_paired_t_test(arm, control).p_value < 0.05
        seed_level += seed_level_t_test(arm.mean(1), control.mean(1)).p_value < 0.05
    assert literal / runs > 0.3
    assert seed_level / runs < 0.08


@pytest.mark.parametrize("alternative", ["two-sided", "less", "greater"])
def test_sign_flip_test_counts_every_pattern(alternative: str) -> None:
    generator = np.random.default_rng(2)
    differences = generator.normal(0.5, 1, size=6)
    result = sign_flip_test(differences, np.zeros(6), alternative=alternative)  # pyright: ignore[reportArgumentType]
    turn = {"two-sided": abs, "greater": lambda x: x, "less": lambda x: -x}[alternative]
    observed = turn(math.fsum(differences))
    patterns = [turn(math.fsum(s * d for s, d in zip(signs, differences, strict=True))) for signs in itertools.product((1, -1), repeat=6)]
    assert result.p_value == sum(value >= observed - 1e-12 for value in patterns) / 64


def test_three_seeds_cannot_reach_five_percent_by_signs_alone() -> None:
    assert sign_flip_test([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]).p_value == 0.25


def test_drawn_sign_patterns_agree_with_all_of_them() -> None:
    generator = np.random.default_rng(3)
    differences = generator.normal(0.35, 1, size=18)
    all_sums = np.abs(np.array(list(itertools.product((1.0, -1.0), repeat=18))) @ differences)
    exact = float((all_sums >= abs(differences.sum()) - 1e-12).mean())
    assert sign_flip_test(differences, np.zeros(18)).p_value == pytest.approx(exact, abs=0.005)


def test_seed_level_tests_reject_a_true_null_in_four_to_six_percent() -> None:
    generator = np.random.default_rng(4)
    runs = 3000
    draws = generator.normal(size=(runs, 2, 8))
    t = np.mean([seed_level_t_test(arm, control).p_value < 0.05 for arm, control in draws])
    flips = np.mean([sign_flip_test(arm, control).p_value < 0.05 for arm, control in draws])
    assert 0.04 < t < 0.06
    assert 0.04 < flips < 0.06


def test_crossed_bootstrap_equals_the_t_interval_when_problems_contribute_nothing() -> None:
    per_seed = np.array([0.1, 0.3, 0.2, 0.35, 0.05])
    result = crossed_bootstrap(np.tile(per_seed[:, None], (1, 4)), np.zeros((5, 4)), n_resamples=40_000)
    reference = seed_level_t_test(per_seed, np.zeros(5))
    assert result.mean == pytest.approx(reference.mean)
    assert (result.low, result.high) == (pytest.approx(reference.low, abs=0.002), pytest.approx(reference.high, abs=0.002))


def test_crossed_bootstrap_sees_problems_that_all_seeds_share_and_the_seed_level_test_does_not() -> None:
    generator = np.random.default_rng(5)
    crossed = seed_level = 0
    runs = 300
    for _ in range(runs):
        arm = 0.02 * generator.normal(size=(8, 1)) + 0.2 * generator.normal(size=(1, 30))
        arm = arm + 0.05 * generator.normal(size=(8, 30))
        control = 0.02 * generator.normal(size=(8, 1)) + np.zeros((1, 30))
        crossed += crossed_bootstrap(arm, np.broadcast_to(control, arm.shape), n_resamples=300).p_value < 0.05
        seed_level += seed_level_t_test(arm.mean(1), control[:, 0]).p_value < 0.05
    assert crossed / runs <= 0.06
    assert seed_level / runs > 0.2


def test_holm_gives_a_worked_example() -> None:
    # ordered .005, .01, .03, .04 with factors 4, 3, 2, 1, then made monotone
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": math.nan})
    assert {k: round(v, 12) for k, v in adjusted.items() if k != "e"} == {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    assert math.isnan(adjusted["e"])


def test_holm_bounds_the_chance_of_any_false_rejection() -> None:
    generator = np.random.default_rng(6)
    draws = generator.random((4000, 5))
    any_rejected = np.mean([min(holm(dict(enumerate_names(row))).values()) < 0.05 for row in draws])
    assert 0.04 < any_rejected < 0.06


def enumerate_names(row: np.ndarray) -> list[tuple[str, float]]:
    return [(str(index), float(value)) for index, value in enumerate(row)]


def test_unequal_seeds_are_never_compared() -> None:
    with pytest.raises(ValueError, match="unequal seeds are never compared"):
        seed_level_t_test([0.1, 0.2, 0.3], [0.1, 0.2])
    with pytest.raises(ValueError, match="at least 2 seeds, not 1"):
        sign_flip_test([0.1], [0.2])
    with pytest.raises(ValueError, match="one shape"):
        literal_paired_t_test(np.zeros((3, 10)), np.zeros((2, 10)))


def test_equal_nonzero_differences_have_no_t_and_equal_arms_have_p_one() -> None:
    assert math.isnan(seed_level_t_test([0.5, 0.5], [0.25, 0.25]).p_value)
    assert seed_level_t_test([0.5, 0.4], [0.5, 0.4]).p_value == 1.0


def test_pass_rates_match_within_five_points_at_both_ends() -> None:
    assert matched(0.45, 0.40)
    assert matched(0.35, 0.40)
    assert not matched(0.4501, 0.40)
