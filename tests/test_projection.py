from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theodolite.functional.projection import coefficients, project
from theodolite.functional.projection_rule import check_projection_settings


def draw(seed: int, k: int, shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient and k orthonormal rows (by QR, not by the code under test)."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(math.prod(shape), k, generator=generator, dtype=torch.float64))
    return gradient.to(dtype), basis.T.reshape(k, *shape).to(dtype)


Problem = tuple[int, int, tuple[int, int]]
problems = st.tuples(st.integers(0, 10_000), st.integers(1, 4), st.tuples(st.integers(2, 6), st.integers(2, 6)))
property_test = settings(max_examples=40, deadline=None)


@property_test
@given(problems)
def test_two_sided_projection_leaves_no_component(problem: Problem) -> None:
    gradient, basis = draw(*problem)
    projected, stats = project(gradient, basis, gate="two_sided")
    assert torch.tensordot(basis, projected, dims=2).abs().max() < 1e-12
    assert abs(float(stats.cos_after)) < 1e-9 or float(projected.norm()) < 1e-9


@property_test
@given(problems, st.sampled_from(["one_sided", "two_sided"]), st.booleans())
def test_projection_is_idempotent(problem: Problem, gate: str, preserve: bool) -> None:
    gradient, basis = draw(*problem)
    once, _ = project(gradient, basis, gate=gate, preserve_magnitude=preserve)  # pyright: ignore[reportArgumentType]
    twice, _ = project(once, basis, gate=gate, preserve_magnitude=preserve)  # pyright: ignore[reportArgumentType]
    if preserve and once.norm() < gradient.norm() * (1 - 1e-9):  # the bound was met: the second pass that is told another norm
        twice = twice * (once.norm() / twice.norm())
    torch.testing.assert_close(twice, once, atol=1e-10, rtol=1e-10)


@property_test
@given(problems, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.floats(0.5, 3.0))
def test_one_sided_leaves_anti_aligned_gradients_bit_identical(problem: Problem, dtype: torch.dtype, overshoot: float) -> None:
    gradient, basis = draw(*problem)
    against = basis * -torch.sign(torch.tensordot(basis, gradient, dims=2)).view(-1, 1, 1)
    given_gradient = gradient.to(dtype)
    if (coefficients(given_gradient, against.to(dtype)) > 0).any():  # rounding turned a row round
        return
    projected, stats = project(given_gradient, against.to(dtype), overshoot=overshoot, preserve_magnitude=True)
    assert torch.equal(projected, given_gradient)
    assert projected.dtype == dtype
    assert not bool(stats.fired)


@property_test
@given(problems, st.floats(1.0, 8.0), st.floats(0.5, 3.0))
def test_magnitude_is_preserved_exactly_within_the_bound(problem: Problem, bound: float, overshoot: float) -> None:
    gradient, basis = draw(*problem)
    plain, _ = project(gradient, basis, gate="two_sided", overshoot=overshoot)
    kept, _ = project(gradient, basis, gate="two_sided", overshoot=overshoot, preserve_magnitude=True, max_magnitude_factor=bound)
    assert float(kept.norm()) == pytest.approx(min(float(gradient.norm()), bound * float(plain.norm())), rel=1e-9)


@property_test
@given(problems)
def test_overshoot_two_reflects(problem: Problem) -> None:
    gradient, basis = draw(*problem)
    reflected, _ = project(gradient, basis, gate="two_sided", overshoot=2.0)
    torch.testing.assert_close(torch.tensordot(basis, reflected, dims=2), -torch.tensordot(basis, gradient, dims=2))
    torch.testing.assert_close(reflected.norm(), gradient.norm())
    back, _ = project(reflected, basis, gate="two_sided", overshoot=2.0)
    torch.testing.assert_close(back, gradient)


@property_test
@given(problems, st.floats(0.01, 0.9))
def test_push_subtracts_a_constant_share_of_the_norm_whatever_the_gradient_says(problem: Problem, push: float) -> None:
    gradient, basis = draw(*problem)
    middle = basis.sum(0) / basis.sum(0).norm()
    for sign in (1.0, -1.0):
        pushed, stats = project(sign * gradient, basis, push=push)
        torch.testing.assert_close(pushed, sign * gradient - push * gradient.norm() * middle)
        assert float(stats.removed_fraction) == pytest.approx(push)


def test_statistics_of_a_gradient_at_sixty_degrees() -> None:
    gradient, basis = torch.tensor([1.0, math.sqrt(3)]), torch.tensor([[1.0, 0.0]])
    projected, stats = project(gradient, basis)
    assert projected.tolist() == pytest.approx([0.0, math.sqrt(3)])
    assert float(stats.cos_before) == pytest.approx(0.5)
    assert float(stats.cos_after) == pytest.approx(0.0)
    assert float(stats.removed_fraction) == pytest.approx(0.5)
    assert bool(stats.fired)


def test_gate_opens_per_row() -> None:
    gradient, basis = torch.tensor([2.0, -3.0, 1.0]), torch.eye(3)[:2]
    projected, _ = project(gradient, basis)
    assert projected.tolist() == [0.0, -3.0, 1.0]


def test_gradient_along_the_direction_becomes_zero_and_stays_zero_under_magnitude_preservation() -> None:
    projected, stats = project(torch.tensor([3.0, 0.0]), torch.tensor([[1.0, 0.0]]), preserve_magnitude=True)
    assert projected.tolist() == [0.0, 0.0]
    assert float(stats.cos_after) == 0.0


def test_zero_gradient_is_left_alone_with_finite_statistics() -> None:
    projected, stats = project(torch.zeros(2, 2), torch.ones(1, 2, 2) / 2, gate="two_sided", preserve_magnitude=True)
    assert not projected.any()
    assert [float(stats.cos_before), float(stats.cos_after), float(stats.removed_fraction), bool(stats.fired)] == [0.0, 0.0, 0.0, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", [{"gate": "one_sided"}, {"gate": "two_sided"}, {"push": 0.3}])
def test_non_finite_gradient_comes_back_as_it_was(bad: float, how: dict) -> None:
    gradient = torch.tensor([1.0, bad, 2.0])
    projected, stats = project(gradient, torch.tensor([[1.0, 0.0, 0.0]]), preserve_magnitude=True, **how)
    assert torch.equal(projected.nan_to_num(nan=7.0), gradient.nan_to_num(nan=7.0))
    assert not bool(stats.fired)


def test_half_precision_gradients_are_projected_in_float32() -> None:
    gradient, basis = draw(0, 1, (64, 64))
    low = gradient.to(torch.bfloat16)
    projected, _ = project(low, basis.float(), gate="two_sided")
    reference = low.double() - (low.double() * basis[0]).sum() * basis[0]
    torch.testing.assert_close(projected, reference.to(torch.bfloat16), rtol=0.01, atol=1e-3)
    assert projected.dtype == torch.bfloat16


def test_wrong_shape_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"rows of shape \(3,\), the gradient has \(2,\)"):
        project(torch.zeros(2), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("upward", 1.0, 0.0, 2.0), "gate='upward'"),
        (("one_sided", 0.0, 0.0, 2.0), "overshoot=0.0"),
        (("one_sided", 1.0, -0.1, 2.0), "push=-0.1"),
        (("two_sided", 1.0, 0.3, 2.0), "push=0.3"),
        (("one_sided", 2.0, 0.3, 2.0), "push=0.3"),
        (("one_sided", 1.0, 0.0, 0.5), "max_magnitude_factor=0.5"),
    ],
)
def test_contradictory_settings_are_refused_by_name(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_projection_settings(*arguments)
