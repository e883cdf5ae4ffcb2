"""Whole optimizer steps: gradient against update, LoRA, moments, routing, gate scopes. References are written out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from theodolite.binding import bind_direction
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.extraction import haar_random_like
from theodolite.functional.projection import Basis, project_all
from theodolite.functional.projection_rule import ProjectionRule
from theodolite.functional.subspaces import jointly_orthonormal
from theodolite.projector import Projector, StepPlan

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
}


class LoRA(nn.Module):
    """y = W0 x + B A x with B = 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.frozen = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(5, 3, bias=False, dtype=torch.float64)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, 6, bias=False, dtype=torch.float64)})
        with torch.no_grad():
            nn.init.normal_(self.get_parameter("lora_A.default.weight"), generator=generator)
            nn.init.zeros_(self.get_parameter("lora_B.default.weight"))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.frozen.T + self.lora_B["default"](self.lora_A["default"](x))


def train(module: nn.Module, direction: ConceptDirection, optimizer: str, steps: int = 12, **how: Any) -> tuple[Projector, list[Any]]:
    """Fit random targets; every step is projected."""
    plan = StepPlan(**{key: how.pop(key) for key in ("apply_to", "purge_moments", "route", "measure_update") if key in how})
    target = how.pop("target", "all")
    rule = ProjectionRule(**({"gate": "two_sided", "flattened": target == "flattened"} | how))
    parameters = dict(module.named_parameters())
    projector = Projector(rule, plan)
    projector.bind(bind_direction(direction, parameters, rule, target), parameters)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(32, 6, generator=generator, dtype=torch.float64) * 3
    stepper, stats = OPTIMIZERS[optimizer](module.parameters()), []
    for _ in range(steps):
        stepper.zero_grad()
        (module(x) - y).square().mean().backward()
        before = projector.before_step(stepper)
        stepper.step()
        stats.append((before, projector.after_step(stepper)))
    return projector, stats


def unit(size: int, seed: int = 3) -> Tensor:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vector / vector.norm()


def plain() -> nn.Module:
    module = nn.Linear(5, 6, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.randn(6, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    return module


def weight_direction(k: int = 1, seed: int = 3) -> ConceptDirection:
    rows, _ = torch.linalg.qr(torch.randn(30, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return ConceptDirection({"weight": rows.T.reshape(k, 6, 5)})


# ---------------------------------------------------------------- LoRA


@pytest.mark.parametrize(
    ("optimizer", "apply_to", "stays"),
    [
        ("sgd", "gradient", True),
        ("momentum", "gradient", True),
        ("adamw", "gradient", False),
        ("adamw", "update", True),
        ("adamw", "both", True),
    ],
)
def test_lora_never_writes_along_the_direction_under_sgd_and_under_adamw_only_with_update_projection(
    optimizer: str, apply_to: str, stays: bool
) -> None:
    module, v = LoRA(), unit(6)
    train(module, ConceptDirection({"lora_B.default.weight": v[None]}, "lora_B"), optimizer, apply_to=apply_to)
    weights: Any = {name: parameter.detach() for name, parameter in module.named_parameters()}
    product = weights["lora_B.default.weight"] @ weights["lora_A.default.weight"]
    written = float((v @ product).norm() / product.norm())
    assert product.norm() > 0.5
    assert (written < 1e-12) if stays else (written > 1e-2)


# ---------------------------------------------------------------- gradient and update


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("k", [1, 4])
def test_two_sided_update_projection_leaves_the_coordinates_where_they_were(optimizer: str, k: int) -> None:
    module, direction = plain(), weight_direction(k)
    start = module.weight.detach().clone()  # type: ignore[union-attr]
    train(module, direction, optimizer, apply_to="update")
    moved = module.weight.detach() - start  # type: ignore[union-attr, operator]
    assert moved.norm() > 0.1
    assert (direction.vectors["weight"].flatten(1) @ moved.flatten()).abs().max() < 1e-12


def test_adam_brings_back_what_gradient_projection_removes_and_the_log_says_so() -> None:
    module, direction = plain(), weight_direction()
    start = module.weight.detach().clone()  # type: ignore[union-attr]
    _, stats = train(module, direction, "adamw", apply_to="gradient", measure_update=True)
    moved = (module.weight.detach() - start).flatten()  # type: ignore[union-attr, operator]
    assert abs(float(direction.vectors["weight"].flatten() @ moved / moved.norm())) > 1e-2
    before, after = stats[-1]
    assert abs(float(before["weight"].cos_after)) < 1e-12
    assert abs(float(after["weight"].cos_before)) > 1e-3


def test_one_sided_update_projection_never_moves_towards_the_concept_and_may_move_away() -> None:
    direction = weight_direction()
    for sign in (1.0, -1.0):
        turned = ConceptDirection({"weight": sign * direction.vectors["weight"]})
        module = plain()
        positions = [float((turned.vectors["weight"][0] * module.weight).sum())]  # type: ignore[operator]
        train(module, turned, "adamw", steps=1, gate="one_sided", apply_to="update")
        for _ in range(6):
            train(module, turned, "adamw", steps=1, gate="one_sided", apply_to="update")
            positions.append(float((turned.vectors["weight"][0] * module.weight).sum()))  # type: ignore[operator]
        # rows are loss gradients: towards the concept is down
        assert all(b >= a - 1e-12 for a, b in itertools.pairwise(positions))


def test_measuring_only_changes_no_bit() -> None:
    measured, free = plain(), plain()
    _, stats = train(measured, weight_direction(2), "adamw", apply_to="both", measure_only=True)
    train(free, weight_direction(2), "adamw", measure_only=True)
    reference = plain()
    stepper = OPTIMIZERS["adamw"](reference.parameters())
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 5, generator=generator, dtype=torch.float64), torch.randn(32, 6, generator=generator, dtype=torch.float64) * 3
    for _ in range(12):
        stepper.zero_grad()
        (reference(x) - y).square().mean().backward()
        stepper.step()
    assert torch.equal(measured.weight, reference.weight)  # type: ignore[arg-type]
    assert torch.equal(free.weight, reference.weight)  # type: ignore[arg-type]
    assert abs(float(stats[0][0]["weight"].cos_before)) > 1e-3
    assert float(stats[0][1]["weight"].removed_fraction) == 0.0


def test_purging_takes_the_component_out_of_first_moments() -> None:
    module, direction = plain(), weight_direction(2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    rows = direction.vectors["weight"].flatten(1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        module.weight.grad = torch.randn(6, 5, generator=generator, dtype=torch.float64)  # type: ignore[union-attr]
        optimizer.step()
    moment = optimizer.state[module.weight]["exp_avg"]  # type: ignore[index]
    assert (rows @ moment.flatten()).abs().max() > 1e-3
    for plan, purged in ((StepPlan(), False), (StepPlan(purge_moments=True), True)):
        projector = Projector(ProjectionRule("two_sided"), plan)
        projector.bind(direction, dict(module.named_parameters()))
        kept = moment - (rows.T @ (rows @ moment.flatten())).view_as(moment)
        projector.before_step(optimizer)
        torch.testing.assert_close(moment, kept if purged else moment)
    assert (rows @ moment.flatten()).abs().max() < 1e-12


# ---------------------------------------------------------------- routing


def test_routing_trains_as_if_nothing_were_projected_and_deploys_without_the_direction() -> None:
    routed, free = plain(), plain()
    start = routed.weight.detach().clone()  # type: ignore[union-attr]
    direction = weight_direction()
    projector, _ = train(routed, direction, "adamw", apply_to="update", route=True)
    train(free, direction, "adamw", measure_only=True)
    assert torch.equal(routed.weight, free.weight)  # type: ignore[arg-type]
    training = routed.weight.detach().clone()  # type: ignore[union-attr]
    v = direction.vectors["weight"].flatten()
    assert abs(float(v @ (training - start).flatten())) > 1e-3
    with projector.deployed():
        moved = (routed.weight.detach() - start).flatten()  # type: ignore[union-attr, operator]
        assert abs(float(v @ moved)) < 1e-12
        assert moved.norm() > 0.1
    assert torch.equal(routed.weight, training)  # type: ignore[arg-type]


# ---------------------------------------------------------------- gates


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bases_of(shapes: list[tuple[int, ...]], k: int, seed: int) -> list[Basis]:
    direction = haar_random_like({str(i): shape for i, shape in enumerate(shapes)}, k, seed)
    return [Basis(rows.double()) for rows in direction.orthonormal().vectors.values()]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["module", "global"]), st.integers(1, 3))
def test_a_shared_gate_decides_once_from_the_sum_of_coefficients(seed: int, scope: Any, k: int) -> None:
    shapes: list[tuple[int, ...]] = [(3, 4), (4, 2), (5, 3)]
    gradients = [randn(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    bases, groups = bases_of(shapes, k, seed), ["a", "a", "b"]
    results, _ = project_all(gradients, bases, ProjectionRule(gate_scope=scope), groups)
    c = [basis.rows.flatten(1) @ g.flatten() for basis, g in zip(bases, gradients, strict=True)]
    members = {"a": [0, 1], "b": [2]} if scope == "module" else {"all": [0, 1, 2]}
    for indices in members.values():
        is_open = sum(float(c[i].sum()) for i in indices) > 0
        for i in indices:
            removed = (c[i] @ bases[i].rows.flatten(1)).view_as(gradients[i]) if is_open else torch.zeros_like(gradients[i])
            torch.testing.assert_close(results[i], gradients[i] - removed, atol=1e-6, rtol=1e-6)
            if not is_open:
                assert torch.equal(results[i], gradients[i])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["one_sided", "two_sided", "reverse"]), st.booleans(), st.integers(1, 3))
def test_a_flattened_gradient_is_projected_like_one_long_vector(seed: int, gate: Any, preserve: bool, k: int) -> None:
    shapes: list[tuple[int, ...]] = [(3, 4), (4, 2), (5,)]
    gradients = [randn(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    rows = jointly_orthonormal({str(i): randn(k, *shape, seed=seed + 10 + i) for i, shape in enumerate(shapes)})
    rule = ProjectionRule(gate, preserve_magnitude=preserve, flattened=True)
    results, stats = project_all(gradients, [Basis(part) for part in rows.values()], rule)
    long, basis = torch.cat([g.flatten() for g in gradients]), torch.cat([part.flatten(1) for part in rows.values()], dim=1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(k, dtype=torch.float64))
    c = basis @ long
    share = {"one_sided": c.clamp_min(0), "two_sided": c, "reverse": 2 * c}[gate]
    expected = long - share @ basis
    if preserve and bool((share != 0).any()):
        expected = expected * min(float(long.norm() / expected.norm()), 2.0)
    torch.testing.assert_close(torch.cat([r.flatten() for r in results]), expected)
    assert float(stats.cos_before) == pytest.approx(float(c.sum() / (math.sqrt(k) * long.norm())))


def test_reverse_reflects_every_component_of_either_sign() -> None:
    gradient, basis = randn(4, 3, seed=0), bases_of([(4, 3)], 3, 1)[0]
    (result,), _ = project_all([gradient], [basis], ProjectionRule("reverse"))
    rows = basis.rows.flatten(1)
    torch.testing.assert_close(rows @ result.flatten(), -(rows @ gradient.flatten()), atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 3))
def test_an_output_side_projection_leaves_nothing_for_any_input(seed: int, k: int) -> None:
    gradient, rows = randn(6, 4, seed=seed), torch.linalg.qr(randn(6, k, seed=seed + 1))[0].T
    (result,), stats = project_all([gradient], [Basis(rows, columns=4)], ProjectionRule("two_sided"))
    torch.testing.assert_close(result, (torch.eye(6, dtype=torch.float64) - rows.T @ rows) @ gradient)
    assert (rows @ result @ randn(4, seed=seed + 2)).abs().max() < 1e-12
    assert float(stats.cin) == pytest.approx(float((rows @ gradient).norm() / gradient.norm()))


def test_mean_square_of_cin_of_random_gradients_is_its_null_value() -> None:
    n, k = 48, 3
    basis = Basis(torch.linalg.qr(randn(n, k, seed=0))[0].T.reshape(k, 8, 6))
    gradients = [randn(8, 6, seed=i) for i in range(3000)]
    for gate, half in (("one_sided", 2), ("two_sided", 1)):
        stats = [project_all([g], [basis], ProjectionRule(gate))[1] for g in gradients]  # type: ignore[arg-type]
        mean_square = sum(float(one.cin) ** 2 for one in stats) / len(stats)
        assert mean_square == pytest.approx(k / n / half, rel=0.08)
    assert basis.null_share(n) == k / n


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("plan", "rule", "said"),
    [
        ({"apply_to": "both"}, {"push": 0.3}, "twice"),
        ({"apply_to": "both"}, {"gate": "reverse"}, "twice"),
        ({"apply_to": "both"}, {"gate": "two_sided", "overshoot": 2.0}, "twice"),
        ({"apply_to": "gradient", "route": True}, {}, "apply_to='update'"),
        ({"apply_to": "update", "route": True}, {"preserve_magnitude": True}, "without preserve_magnitude"),
        ({"apply_to": "sideways"}, {}, "apply_to='sideways'"),
    ],
)
def test_plans_that_undo_themselves_are_refused(plan: dict, rule: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Projector(ProjectionRule(**rule), StepPlan(**plan))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"gate": "reverse", "overshoot": 2.0}, "overshoot of 4.0"),
        ({"gate_scope": "layer"}, "gate_scope='layer'"),
        ({"gate_scope": "global", "push": 0.1}, "push=0.1"),
        ({"gate_scope": "module", "flattened": True}, "flattened"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(rule: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ProjectionRule(**rule)
