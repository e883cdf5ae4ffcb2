"""Gradients of every loss against float64 finite differences, and what masks must do exactly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_decomposition import LOSSES, ROWS, tiny, tokens

from theodolite.functional.component_masks import ComponentMask
from theodolite.functional.decomposition_losses import importance_minimality
from theodolite.lightning_modules.decomposition.component_model import ComponentModel
from theodolite.lightning_modules.decomposition.decomposition import Decomposition, Prepared
from theodolite.lightning_modules.decomposition.objectives import ImportanceMinimality
from theodolite.lightning_modules.decomposition.registry import OBJECTIVES, build_entry
from theodolite.lightning_modules.decomposition.step import StepBatch, microbatches, step_gradients
from theodolite.lightning_modules.decomposition.targets.toy_models import TMS

BATCH = StepBatch(microbatches(tokens(), 0, 1, None), ROWS, (0, "train", 7), 7, 0.3)
LABELS = [build_entry(spec, OBJECTIVES, "").label for spec in LOSSES]


def value_and_gradients(parts: Decomposition, index: int) -> tuple[float, list[Tensor]]:
    objective = build_entry(LOSSES[index] | {"coeff": 1.0}, OBJECTIVES, "")
    parameters = [p for p in parts.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    shares = step_gradients(parts, [objective], BATCH, lambda loss: loss.backward())
    return float(shares["total"]), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


@pytest.mark.parametrize("index", range(len(LOSSES)), ids=LABELS)
def test_gradients_are_those_of_finite_differences(index: int) -> None:
    # the leaky sigmoids have gradients of their own on purpose, so an honest one takes their place
    parts = tiny(torch.float64, sigmoid="normal")
    _, gradients = value_and_gradients(parts, index)
    parameters = [p for p in parts.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(index)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    step = 1e-6
    ends: list[float] = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=sign * step)
        ends.append(value_and_gradients(parts, index)[0])
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-5, abs=1e-7)


def test_unrouted_positions_keep_the_module_s_output_bit_for_bit() -> None:
    parts = tiny(torch.float32)
    routing = torch.rand(ROWS, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    zero = torch.zeros(())
    clean = parts.model(tokens(), keep=("outputs",)).outputs
    for name in parts.names:  # one at a time, so that inputs are the clean ones
        for delta in (None, torch.full((ROWS, 5), 0.25)):
            outputs = parts.model(tokens(), {name: ComponentMask(zero, delta, routing)}, keep=("outputs",)).outputs[name]
            assert torch.equal(outputs[~routing], clean[name][~routing])
            assert not torch.equal(outputs[routing], clean[name][routing])


def test_the_delta_identity_equals_the_explicit_delta() -> None:
    parts = tiny(torch.float64)
    generator = torch.Generator().manual_seed(0)
    name = "h.0.mlp.c_fc"
    mask = torch.rand(ROWS, 5, 6, generator=generator, dtype=torch.float64)
    delta = torch.rand(ROWS, 5, generator=generator, dtype=torch.float64)
    run = parts.model(tokens(), {name: ComponentMask(mask, delta)}, keep=("inputs", "outputs"))
    site, inputs = parts.model.sites[name].components, run.inputs[name]
    explicit = ((inputs @ site.V) * mask) @ site.U + delta[..., None] * (inputs @ parts.model.deltas()[name])
    assert torch.allclose(run.outputs[name], explicit, rtol=0, atol=1e-13)


def test_what_no_source_reaches_is_computed_once_and_changes_nothing() -> None:
    parts = tiny(torch.float64)

    def attacked(prepared: Prepared, value: float) -> tuple[float, dict[str, Tensor]]:
        leaves = {n: torch.full((ROWS, 1, c), value, dtype=torch.float64).requires_grad_() for n, c in parts.source_channels().items()}
        total, _ = parts.loss_sum(prepared, leaves)
        return float(total.detach()), dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    once = parts.prepare(tokens())
    attacked(once, 0.2)
    (unreached,) = once.known.acts.values()
    assert set(unreached) == {"wte"}, "everything behind the embedding depends on its sources"
    (value, gradients), (expected, references) = attacked(once, 0.7), attacked(parts.prepare(tokens()), 0.7)
    assert value == expected
    assert all(torch.equal(gradient, references[name]) for name, gradient in gradients.items())


def test_tied_modules_share_their_components_and_their_gradient() -> None:
    target = TMS(4, 2)
    target.initialise(torch.Generator().manual_seed(0))
    model = ComponentModel(target, {"linear1": 3, "linear2": 3}, tied=[("linear1", "linear2")])
    model.initialise(0)
    assert len(model.component_parameters()) == 2
    deltas = model.deltas()
    assert torch.allclose(deltas["linear1"].T, deltas["linear2"])
    features = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    model(features, {"linear2": ComponentMask()}).output.sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.component_parameters())


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({"linear3": 2}, "matches no module of the target; the closest is 'linear"),
        ({"linear*": 2, "linear1": 2}, "matched by 'linear\\*' and by 'linear1'"),
        ({"": 2}, "matches no module"),
    ],
)
def test_patterns_that_cannot_work_are_named(modules: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ComponentModel(TMS(4, 2), modules)


def test_a_mask_for_an_unknown_module_is_named() -> None:
    model = ComponentModel(TMS(4, 2), {"linear1": 2})
    with pytest.raises(ValueError, match="no decomposed module 'linear2'; the closest is 'linear1'"):
        model(torch.zeros(1, 4), {"linear2": ComponentMask()})


def test_modules_can_be_charged_apart() -> None:
    upper = {name: torch.rand(6, 5, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(("a.mlp_in", "a.mlp_out"))}

    def penalty(modules: str, pnorm: float) -> float:
        return float(importance_minimality(ImportanceMinimality(modules=modules, pnorm=pnorm).component_sums(upper, 0.0), 6, 0.5))

    assert penalty("*mlp_in", 2.0) + penalty("*mlp_out", 2.0) == pytest.approx(penalty("*", 2.0), rel=1e-6)
    assert penalty("*mlp_in", 2.0) != pytest.approx(penalty("*mlp_out", 2.0), rel=1e-3)
    with pytest.raises(ValueError, match=r"importance_minimality: modules '\*attn' matches no decomposed module"):
        ImportanceMinimality(modules="*attn").charged(list(upper))
