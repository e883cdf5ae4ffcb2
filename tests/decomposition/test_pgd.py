"""The attack itself: against an independent loop, and that what should not matter does not."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_reconstruction import TinyNet

from theodolite.functional.pgd import (
    MASK_SCOPES,
    AttackCurve,
    Rows,
    attack_each,
    attack_groups,
    initial_sources,
    is_shared,
    source_shape,
)

ROWS, POSITIONS, STEPS = 12, 3, (0, 1, 5, 20)


def module(dtype: str = "float64", **settings: Any) -> TinyNet:
    return TinyNet(dtype=dtype, **settings).requires_grad_(False)  # pyright: ignore[reportArgumentType]


def rows(dtype: str = "float64", count: int = ROWS) -> Tensor:
    drawn = torch.randn(count, POSITIONS, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return drawn.to(torch.float64 if dtype == "float64" else torch.float32)


def start(net: TinyNet, shape: tuple[int, ...], init: Any = "zeroes") -> dict[str, Tensor]:
    return initial_sources(net.source_channels(), shape, init, ("test", 1), dtype=net.matrices["first"].dtype)


def curve(net: TinyNet, data: Tensor, micro: int, groups: list[int], init: Any = "zeroes", **settings: Any) -> AttackCurve:
    sources = start(net, (max(groups) + 1, 1), init)
    parts = []
    for begin in range(0, len(data), micro):
        prepared = net.prepare(data[begin : begin + micro])

        def loss(given: Mapping[str, Tensor], prepared: Any = prepared) -> tuple[Tensor, int]:
            return net.loss_sum(prepared, given)

        parts.append(Rows(loss, torch.tensor(groups[begin : begin + micro])))
    return attack_groups(parts, sources, STEPS, 0.1, **settings)


def test_only_the_steps_that_are_reported_take_a_loss_with_a_value() -> None:
    net, data, taken = module(), rows(), []
    prepared = net.prepare(data)

    def loss(given: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        taken.append("loss")
        return net.loss_sum(prepared, given)

    def slope(given: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        taken.append("slope")
        total, count = net.loss_sum(prepared, given)
        return total + torch.nan * total.detach(), count

    for attack in (
        lambda other: attack_each(loss, start(net, (ROWS, 1)), [0, 3], 0.1, other),
        lambda other: attack_groups([Rows(loss, torch.zeros(ROWS, dtype=torch.long), other)], start(net, (1, 1)), [0, 3], 0.1),
    ):
        taken.clear()
        found = attack(slope)
        assert taken == ["loss", "slope", "slope", "loss"]
        assert found == attack(None)


def by_hand(net: TinyNet, data: Tensor, shards: int, n_steps: int) -> float:
    """Ranks that average the gradients of their mean losses, written out."""
    sources = start(net, (1, 1))
    prepared = [net.prepare(shard) for shard in data.chunk(shards)]
    for _ in range(n_steps):
        gradients = {name: torch.zeros_like(source) for name, source in sources.items()}
        for shard in prepared:
            leaves = {name: source.clone().requires_grad_() for name, source in sources.items()}
            total, count = net.loss_sum(shard, leaves)
            (total / count).backward()
            for name, leaf in leaves.items():
                assert leaf.grad is not None
                gradients[name] += leaf.grad / shards
        sources = {name: (source + 0.1 * gradients[name].sign()).clamp(0, 1) for name, source in sources.items()}
    totals = [net.loss_sum(shard, sources) for shard in prepared]
    return float(sum(total for total, _ in totals)) / sum(count for _, count in totals)


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_joint_attack_equals_a_loop_that_averages_over_ranks(kind: str) -> None:
    net = module(kind=kind)
    found = curve(net, rows(), 4, [0] * ROWS)
    for n in STEPS:
        for shards in (1, 3):
            assert found.loss(n) == pytest.approx(by_hand(net, rows(), shards, n), rel=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_microbatches_do_not_matter(dtype: str, tolerance: float) -> None:
    net = module(dtype, kind="kl")
    whole = curve(net, rows(dtype), ROWS, [0] * ROWS, "random")
    for micro in (1, 3, 5):
        parts = curve(net, rows(dtype), micro, [0] * ROWS, "random")
        for n in STEPS if dtype == "float64" else STEPS[:3]:
            assert parts.loss(n) == pytest.approx(whole.loss(n), rel=tolerance)
        assert parts.agreement[1] == pytest.approx(whole.agreement[1], rel=tolerance * 100)


def test_averaged_ranks_equal_the_joint_attack_and_separate_shards_are_stronger() -> None:
    net, data, shards = module(kind="kl"), rows(), [i // 3 for i in range(ROWS)]
    joint, averaged = curve(net, data, 4, [0] * ROWS), curve(net, data, 4, shards, average=True)
    separate = curve(net, data, 4, shards)
    alone = [curve(net, data[i : i + 3], 3, [0] * 3) for i in range(0, ROWS, 3)]
    for n in STEPS:
        assert averaged.loss(n) == pytest.approx(joint.loss(n), rel=1e-12)
        assert separate.loss(n) == pytest.approx(sum(shard.loss(n) for shard in alone) / len(alone), rel=1e-12)
    assert separate.loss(0) == pytest.approx(joint.loss(0), rel=1e-12)
    assert separate.loss(20) > 1.02 * joint.loss(20)


def test_ranks_of_unequal_shards_are_averaged_as_ranks_and_not_as_rows() -> None:
    net, data = module(kind="kl"), rows()
    uneven = curve(net, data, ROWS, [0] * 8 + [1] * 4, average=True)
    sources = start(net, (1, 1))
    prepared = [net.prepare(data[:8]), net.prepare(data[8:])]
    leaves = {name: source.clone().requires_grad_() for name, source in sources.items()}
    means = [total / count for total, count in (net.loss_sum(shard, leaves) for shard in prepared)]
    gradients = torch.autograd.grad(means[0] + means[1], list(leaves.values()))
    moved = {n: (s + 0.1 * g.sign()).clamp(0, 1) for (n, s), g in zip(sources.items(), gradients, strict=True)}
    expected = [net.loss_sum(shard, moved) for shard in prepared]
    assert uneven.loss(1) == pytest.approx(float(sum(t for t, _ in expected)) / sum(c for _, c in expected), rel=1e-12)


@pytest.mark.parametrize("scope", MASK_SCOPES)
def test_a_curve_is_one_attack_and_its_points_are_attacks_of_their_own(scope: Any) -> None:
    net, data = module(), rows()
    prepared = net.prepare(data)

    def attack(steps: tuple[int, ...]) -> tuple[AttackCurve, dict[str, Tensor]]:
        sources = start(net, source_shape(scope, (ROWS, POSITIONS)), "random")
        return attack_each(lambda given: net.loss_sum(prepared, given), sources, steps, 0.05), sources

    together, final = attack(STEPS)
    for n in STEPS:
        assert attack((n,))[0].loss(n) == together.loss(n)
    assert all(float(source.min()) >= 0 and float(source.max()) <= 1 for source in final.values())
    assert together.loss(20) > together.loss(0)


def test_each_row_is_attacked_for_itself() -> None:
    net, data = module(), rows()
    for scope in ("unique_per_datapoint", "unique_per_row"):
        shape = source_shape(scope, (ROWS, POSITIONS))  # pyright: ignore[reportArgumentType]
        together, alone = start(net, shape, "random"), start(net, shape, "random")
        prepared = net.prepare(data)
        whole = attack_each(lambda given, prepared=prepared: net.loss_sum(prepared, given), together, [5], 0.1)
        parts = AttackCurve()
        for i in range(ROWS):
            own, one = {name: source[i : i + 1] for name, source in alone.items()}, net.prepare(data[i : i + 1])
            parts.add(attack_each(lambda given, one=one: net.loss_sum(one, given), own, [5], 0.1))
        assert parts.loss(5) == pytest.approx(whole.loss(5), rel=1e-12)


def test_scopes_have_their_shapes() -> None:
    assert [source_shape(scope, (4, 5)) for scope in MASK_SCOPES] == [(4, 5), (4, 1), (1, 1), (1, 5)]
    assert [source_shape(scope, (4,)) for scope in MASK_SCOPES] == [(4,), (4,), (1,), (1,)]
    assert [is_shared(scope) for scope in MASK_SCOPES] == [False, False, True, True]


def test_random_starts_belong_to_slots() -> None:
    channels = {"a": 3, "b": 2}
    whole = initial_sources(channels, (6, 2), "random", (7,))
    odd = initial_sources(channels, (3, 2), "random", (7,), slots=[1, 3, 5])
    for name in channels:
        torch.testing.assert_close(odd[name], whole[name][1::2], rtol=0, atol=0)
        assert 0 <= float(whole[name].min()) < float(whole[name].max()) < 1


def test_agreement_is_one_for_equal_rows_and_less_for_different_ones() -> None:
    net, data = module(), rows()
    assert curve(net, data[:1].repeat(4, 1, 1), 4, [0] * 4).agreement[1] == pytest.approx(1.0)
    assert 0.5 < curve(net, data, 4, [0] * ROWS).agreement[1] < 0.99


def test_each_source_moves_by_its_own_gradient_where_autograd_hands_several_the_same_one() -> None:
    weights = torch.tensor([[1.0, -2.0, 0.0]])
    sources = {name: torch.full((1, 3), 0.5) for name in ("first", "second", "twice")}

    def loss(given: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        return ((given["first"] + given["second"] + given["twice"] - 3 * given["twice"]) * weights).sum(), 1

    attack_each(loss, sources, [1], 0.25)
    for name, sign in (("first", 1), ("second", 1), ("twice", -1)):
        assert sources[name].tolist() == [[0.5 + 0.25 * sign, 0.5 - 0.25 * sign, 0.5]], name


def test_an_attack_lets_every_gradient_go_before_the_next_and_leaves_none_with_parameters() -> None:
    """Otherwise the gradients of all sites would wait for the last, which is as much memory as the sources."""
    parameter, kept, seen = torch.nn.Parameter(torch.ones(4)), [], []
    sources = {name: torch.full((2, 4), 0.5) for name in "abc"}

    def loss(given: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        kept[:] = given.values()
        total = torch.zeros(())
        for source in given.values():  # a chain, so that gradients come one after the other
            if source.requires_grad:
                source.register_hook(lambda gradient: seen.append(sum(leaf.grad is not None for leaf in kept)))
            total = (total + source * parameter).tanh().sum()
        return total, 2

    attack_each(loss, sources, [2], 0.1)
    assert seen == [0] * 6
    assert parameter.grad is None
    assert all(leaf.grad is None for leaf in kept)


def test_channels_that_do_nothing_are_refused_by_name() -> None:
    sources = {"used": torch.zeros(2, 1), "idle": torch.zeros(2, 1)}
    with pytest.raises(ValueError, match="'idle' do not reach"):
        attack_each(lambda given: (given["used"].sum(), 2), sources, [1], 0.1)
    with pytest.raises(ValueError, match="n_steps"):
        attack_each(lambda given: (given["used"].sum(), 2), sources, [], 0.1)
