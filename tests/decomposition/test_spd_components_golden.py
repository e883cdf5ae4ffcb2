"""Components, causal-importance functions, losses and metrics against values that SPD's own code computed.

Every fixture folder named in ``SPD_COMPONENTS_DIRS`` (separated by ``os.pathsep``) goes through all of it. All settings and expected values
are read from its ``expected.json``. Largest differences relative to a tensor's largest entry: float64 1e-9; float32 1e-5, gradients 1e-4.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from spd_components import SPDFixture, folders, largest_error, own_name  # pyright: ignore[reportMissingImports]

from theodolite.functional.causal_importance import jittered_logits, sigmoid_pair
from theodolite.functional.component_masks import ComponentMask
from theodolite.lightning_modules.decomposition.component_model import ones

load = lru_cache(SPDFixture)
pytestmark = pytest.mark.skipif(not folders(), reason="no reference values: name folders in SPD_COMPONENTS_DIRS")
CASES = [pytest.param((folder, precision), id=f"{folder.name}-{precision}") for folder in folders() for precision in ("float64", "float32")]


@pytest.fixture(params=CASES)
def spd(request: pytest.FixtureRequest) -> SPDFixture:
    return load(*request.param)


def gradient_tolerance(spd: SPDFixture) -> float:
    return spd.tolerance * (10 if spd.precision == "float32" else 1)


def compare(spd: SPDFixture, found: dict[str, torch.Tensor], prefix: str, tolerance: float | None = None) -> None:
    """Every reference under ``prefix`` has its value in ``found``."""
    expected = spd.expected(prefix)
    assert expected, prefix
    for name, reference in expected.items():
        assert largest_error(found[name], reference) < (tolerance or spd.tolerance), f"{prefix}{name}"


def sigmoid_names(spd: SPDFixture) -> list[str]:
    return sorted({name.split("/")[1] for name in spd.reference if name.startswith("sigmoid/")} - {"two_sided_leaky_hard_table_entry"})


def test_sigmoids_and_their_gradients(spd: SPDFixture) -> None:
    upstreams = spd.tensors("sigmoid/upstream/")
    names = sigmoid_names(spd)
    assert "leaky_hard" in names
    for name in names:
        for side, function in zip(("lower", "upper"), sigmoid_pair(name), strict=True):
            logits = spd.inputs["sigmoid/logits"].clone().requires_grad_()
            found = {"forward": function(logits)}
            for key, upstream in upstreams.items():
                (found[f"grad_{key}"],) = torch.autograd.grad(function(logits), logits, upstream)
            compare(spd, found, f"sigmoid/{name}/{side}/")


def scalar_of_importances(lower: dict[str, torch.Tensor], upper: dict[str, torch.Tensor]) -> torch.Tensor:
    """The scalar whose gradients are recorded: modules j in alphabetical order, flat index n."""
    total = torch.stack([value.square().sum() for value in upper.values()]).sum()
    for j, name in enumerate(sorted(lower)):
        flat = lower[name].flatten()
        total = total + (torch.cos(torch.arange(flat.numel(), dtype=flat.dtype) + j) * flat).sum()
    return total


def test_causal_importance_functions_and_their_gradients(spd: SPDFixture) -> None:
    lower_of, upper_of = sigmoid_pair(spd.settings["sigmoid_type"])
    for variant, entry in spd.settings["ci_variants"].items():
        kind = entry["fixture"]
        model = spd.model(kind)
        function = spd.importance_function(variant, model)
        part = "toy" if kind == "toy" else "lm"
        inputs = spd.expected(f"{part}/clean/input/") | {"wte": spd.batch("lm")}
        logits = function(inputs)
        correct = f"ci/{variant}_correct/"
        if spd.expected(correct):
            compare(spd, logits, f"{correct}pre_sigmoid/")
            continue
        compare(spd, logits, f"ci/{variant}/pre_sigmoid/")
        lower, upper = ({name: f(z) for name, z in logits.items()} for f in (lower_of, upper_of))
        for side, values in (("lower_leaky", lower), ("upper_leaky", upper)):
            if spd.expected(f"ci/{variant}/{side}/"):
                compare(spd, values, f"ci/{variant}/{side}/")
        scalar = scalar_of_importances(lower, upper)
        assert scalar.item() == pytest.approx(spd.scalar(f"ci/{variant}/scalar"), rel=spd.tolerance)
        parameters = dict(function.named_parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(scalar, list(parameters.values())), strict=True))
        expected = {own_name(name): t for name, t in spd.expected(f"ci/{variant}/grad/").items()}
        assert set(expected) == set(gradients)
        scale = 1e-3 * max(float(reference.abs().max()) for reference in expected.values())
        for name, reference in expected.items():
            assert largest_error(gradients[name], reference, scale) < gradient_tolerance(spd), f"{variant} {name}"


def test_binomial_sampling_of_importances(spd: SPDFixture) -> None:
    variant = "layerwise_shared_mlp_binomial"
    if not spd.expected(f"ci/{variant}/"):
        pytest.skip("not recorded")
    model = spd.model("lm")
    logits = spd.importance_function("layerwise_shared_mlp", model)(spd.expected("lm/clean/input/"))
    lower_of, upper_of = sigmoid_pair(spd.settings["sigmoid_type"])
    noise = spd.tensors("lm/ci_binomial_noise/")
    if spd.expected(f"ci/{variant}/pre_sigmoid/"):
        compare(spd, logits, f"ci/{variant}/pre_sigmoid/")
    if spd.expected(f"ci/{variant}/lower_leaky/"):
        compare(spd, {name: lower_of(jittered_logits(z, noise[name])) for name, z in logits.items()}, f"ci/{variant}/lower_leaky/")
    if spd.expected(f"ci/{variant}/upper_leaky/"):
        compare(spd, {name: upper_of(z) for name, z in logits.items()}, f"ci/{variant}/upper_leaky/")


def test_clean_forward_caches_and_weight_deltas(spd: SPDFixture) -> None:
    model = spd.model("emb")
    clean = model(spd.batch("emb"), keep=("inputs", "outputs"))
    assert largest_error(clean.output, spd.reference["lm/clean/output"]) < spd.tolerance
    compare(spd, clean.inputs, "lm/clean/input/")
    compare(spd, clean.outputs, "forward/clean/output_cache/")
    deltas = {name: delta if name == "wte" else delta.T for name, delta in model.deltas().items()}
    compare(spd, deltas, "forward/weight_delta/")
    toy = spd.model("toy")
    clean = toy(spd.batch("toy"), keep=("inputs", "outputs"))
    assert largest_error(clean.output, spd.reference["toy/clean/output"]) < spd.tolerance
    compare(spd, clean.inputs, "toy/clean/input/")
    compare(spd, clean.outputs, "toy/clean/output_cache/")
    conv_is_transposed = {name: delta.T for name, delta in toy.deltas().items()}
    compare(spd, conv_is_transposed, "toy/weight_delta/")


def test_everything_on_is_the_target_itself(spd: SPDFixture) -> None:
    for kind in ("emb", "toy"):
        model, batch = spd.model(kind), spd.batch(kind)
        leading = batch.shape if kind == "emb" else batch.shape[:-1]
        on = ones(model.names, torch.ones(leading, dtype=spd.dtype))
        assert torch.equal(model(batch, on).output, model(batch).output)


def forward_cases(spd: SPDFixture, prefix: str) -> list[str]:
    return [key for key in spd.values if key.startswith(prefix) and "value_is" in spd.values[key]]


def test_masked_forwards_caches_and_gradients(spd: SPDFixture) -> None:
    cases = forward_cases(spd, "forward/") + [f"toy/{c}" for c in ("mask", "mask_delta", "mask_routing", "mask_delta_routing")]
    assert len(cases) > 4
    for case in cases:
        check_masked_forward(spd, case)


def check_masked_forward(spd: SPDFixture, case: str) -> None:
    kind = "toy" if case.startswith("toy/") else "emb"
    part = "toy" if kind == "toy" else "lm"
    entry = spd.values[case]
    model = spd.model(kind)
    masks = spd.masks(kind, entry.get("modules", model.names), entry["delta"], entry["routing"])
    run = model(spd.batch(kind), masks, keep=("inputs", "outputs", "acts"))
    value = (run.output * spd.inputs[f"{part}/out_weights"]).sum()
    assert value.item() == pytest.approx(spd.scalar(case), rel=spd.tolerance, abs=spd.tolerance)
    assert largest_error(run.output, spd.reference[f"{case}/output"]) < spd.tolerance
    acts = {f"{name}_pre_detach": act for name, act in run.acts.items()}
    for cache, found in (("input_cache", run.inputs), ("output_cache", run.outputs), ("component_acts_cache", acts)):
        if spd.expected(f"{case}/{cache}/"):
            compare(spd, found, f"{case}/{cache}/")
    wanted = {}
    for name, mask in masks.items():
        wanted |= {f"V/{name}": model.sites[name].components.V, f"U/{name}": model.sites[name].components.U}
        wanted |= {f"mask/{name}": mask.component} | ({f"delta_mask/{name}": mask.delta} if mask.delta is not None else {})
    gradients = dict(zip(wanted, torch.autograd.grad(value, list(wanted.values()), allow_unused=True), strict=True))
    for name, reference in spd.expected(f"{case}/grad/").items():
        assert largest_error(gradients[name], reference) < gradient_tolerance(spd), f"{case} {name}"


def test_a_mask_without_batch_axes_broadcasts(spd: SPDFixture) -> None:
    if "forward/mask_broadcast/output" not in spd.reference:
        pytest.skip("not recorded")
    model = spd.model("emb")
    masks = {name: ComponentMask(spd.inputs[f"lm/masks/broadcast/{name}"]) for name in model.names}
    assert largest_error(model(spd.batch("emb"), masks).output, spd.reference["forward/mask_broadcast/output"]) < spd.tolerance
