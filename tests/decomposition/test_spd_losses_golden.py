"""Losses, their gradients, evaluation metrics and identity errors against values that SPD's own code computed.

Folders and tolerances as in ``test_spd_components_golden.py``. Recorded noise and routing take the place of our own draws.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from spd_components import SPDFixture, folders, largest_error, own_name  # pyright: ignore[reportMissingImports]

from theodolite.functional.component_masks import ComponentMask, routing_of_ranks, static_routing
from theodolite.functional.decomposition_losses import importance_minimality
from theodolite.lightning_modules.decomposition.attacked import PGDRecon
from theodolite.lightning_modules.decomposition.decomposition import Decomposition, Prepared
from theodolite.lightning_modules.decomposition.draws import Draws, Routing
from theodolite.lightning_modules.decomposition.ground_truth import IdentityCIError, one_hot_importances
from theodolite.lightning_modules.decomposition.measures import CIL0, CEAndKL, Measure, Sums
from theodolite.lightning_modules.decomposition.objectives import (
    CIHiddenActsRecon,
    CIMaskedRecon,
    Faithfulness,
    ImportanceMinimality,
    StochasticHiddenActsRecon,
    StochasticRecon,
    UnmaskedRecon,
)

pytestmark = pytest.mark.skipif(not folders(), reason="no reference values: name folders in SPD_COMPONENTS_DIRS")
CASES = [pytest.param((folder, precision), id=f"{folder.name}-{precision}") for folder in folders() for precision in ("float64", "float32")]
load = lru_cache(SPDFixture)


@pytest.fixture(params=CASES)
def spd(request: pytest.FixtureRequest) -> SPDFixture:
    return load(*request.param)


class RecordedDraws(Draws):
    """Noise sample s and routing set r of the fixture, where ours would be drawn."""

    def __init__(self, spd: SPDFixture, names: Sequence[str], samples: Sequence[int] = (), routing: Sequence[int] = (), part: str = "lm"):
        super().__init__((0,), range(spd.settings["batch"]))
        settings: dict[str, Any] = {
            "spd": spd,
            "names": names,
            "samples": samples,
            "sets": routing,
            "part": part,
            "component": None,
            "batch": 0,
        }
        self.__dict__.update(settings)

    def mask_noise(self, leading: tuple[int, ...], channels: int, sample: int = 0) -> Tensor:
        d = self.__dict__
        place = f"{d['part']}/noise" + (f"/{d['samples'][sample]}" if d["part"] == "lm" else "")
        inputs = d["spd"].inputs
        component = [inputs[f"{d['component'] or place + '/component'}/{name}"].to(d["spd"].dtype) for name in d["names"]]
        return torch.cat([*component, *(inputs[f"{place}/delta/{name}"][..., None] for name in d["names"])], dim=-1)

    def routing(self, routing: Routing, names: Sequence[str], leading: tuple[int, ...], sample: int = 0) -> dict[str, Tensor]:
        r = self.__dict__["sets"][sample]
        return {name: self.__dict__["spd"].inputs[f"lm/routing/{r}/mask/{name}"] for name in names}

    def uniform(self, shape: Sequence[int], what: str, sample: int = 0) -> Tensor:
        assert what == "random masks"
        d = self.__dict__
        return torch.cat([d["spd"].inputs[f"lm/noise/random_mask/{d['batch']}/{name}"] for name in d["names"]], dim=-1)


@lru_cache
def decomposition(spd: SPDFixture, kind: str, variant: str, loss: str = "kl", delta: bool = True) -> Decomposition:
    model = spd.model(kind)
    config = spd.settings["ci_variants"][variant]["ci_config"]
    parts = Decomposition(model, config, spd.settings["sigmoid_type"], "continuous", delta, loss)  # pyright: ignore[reportArgumentType]
    parts.ci_fn = spd.importance_function(variant, model)
    return parts


def gradients_of(parts: Decomposition, value: Tensor) -> dict[str, Tensor]:
    """Gradients by the names of the fixture."""
    named: dict[str, Tensor] = {}
    for name, site in parts.model.sites.items():
        named |= {f"V/{name}": site.components.V, f"U/{name}": site.components.U}
    named |= dict(parts.ci_fn.named_parameters())
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def check_gradients(spd: SPDFixture, parts: Decomposition, value: Tensor, key: str) -> None:
    tolerance = spd.tolerance * (10 if spd.precision == "float32" else 1)
    found = gradients_of(parts, value)
    norms = spd.values.get(f"{key}/grad_norms", {}).get(spd.precision, {})
    for group, norm in norms.items():
        chosen = [g for name, g in found.items() if name.startswith(("V/", "U/")) == (group == "components")]
        ours = float(torch.stack([g.square().sum() for g in chosen]).sum().sqrt()) if chosen else 0.0
        assert ours == pytest.approx(norm, rel=tolerance, abs=tolerance), f"{key} {group}"
    expected = {own_name(name): t for name, t in spd.expected(f"{key}/grad/").items()}
    scale = 1e-3 * max([float(t.abs().max()) for t in expected.values()], default=1.0)
    for name, reference in expected.items():
        assert largest_error(found[name], reference, scale) < tolerance, f"{key} {name}"


def objective_of(spd: SPDFixture, key: str) -> tuple[Any, RecordedDraws, Decomposition]:
    """The loss, draws and decomposition of an entry ``loss/<name>/...``."""
    entry, name = spd.values[key], key.split("/")[1]
    variant = spd.settings["default_ci_variant"]
    kind = "mse" if "/mse" in key else entry.get("output_loss_type", "kl")
    parts = decomposition(spd, "lm", variant, kind, entry.get("use_delta_component", "no_delta" not in key))
    samples = entry.get("noise_samples", [0])
    draws = RecordedDraws(spd, parts.names, samples, entry.get("routing_sets", []))
    if "component_noise" in entry:
        draws.__dict__["component"] = entry["component_noise"]
    scope: Any = next((s for s in ("layerwise", "subset") if name.endswith(s)), "all")
    base = name.removesuffix(f"_{scope}")
    makers: dict[str, Any] = {
        "unmasked_recon": lambda: UnmaskedRecon(),
        "ci_masked_recon": lambda: CIMaskedRecon(scope=scope),
        "stochastic_recon": lambda: StochasticRecon(scope=scope, samples=len(samples)),
        "stochastic_hidden_acts_recon": lambda: StochasticHiddenActsRecon(samples=len(samples)),
        "pgd_recon": lambda: PGDRecon(scope=scope, **{k: entry[k] for k in ("init", "step_size", "n_steps", "mask_scope")}),
    }
    return makers[base](), draws, parts


RECON = ("pgd_recon", "unmasked_recon", "ci_masked_recon", "stochastic_recon", "stochastic_hidden_acts_recon")


def test_reconstruction_losses_and_their_gradients(spd: SPDFixture) -> None:
    keys = [key for key in spd.values if key.split("/")[0] == "loss" and key.split("/")[1].startswith(RECON) and not key.endswith("norms")]
    assert len(keys) > 10
    for key in keys:
        objective, draws, parts = objective_of(spd, key)
        prepared = parts.look(spd.batch("lm"))
        if isinstance(objective, PGDRecon):
            objective.begin(parts, [(prepared.detached(), draws)], 0, training=True)
        total, count = objective.sums(parts, prepared, draws)
        assert (total / count).item() == pytest.approx(spd.scalar(key), rel=spd.tolerance), key
        check_gradients(spd, parts, total / count, key)


def test_faithfulness_and_its_gradients(spd: SPDFixture) -> None:
    parts = decomposition(spd, "lm", spd.settings["default_ci_variant"])
    value = Faithfulness().value(parts)
    assert value.item() == pytest.approx(spd.scalar("loss/faithfulness"), rel=spd.tolerance)
    check_gradients(spd, parts, value, "loss/faithfulness")


def minimality_of(entry: dict[str, Any]) -> ImportanceMinimality:
    names = ("pnorm", "beta", "eps", "p_anneal_start_frac", "p_anneal_final_p", "p_anneal_end_frac")
    return ImportanceMinimality(**{name: entry[name] for name in names if name in entry})


def test_importance_minimality_and_its_gradients(spd: SPDFixture) -> None:
    keys = [key for key in spd.values if key.startswith("loss/importance_minimality/") and not key.endswith("norms")]
    assert len(keys) > 5
    for key in keys:
        entry = spd.values[key]
        parts = decomposition(spd, "lm", spd.settings["default_ci_variant"])
        prepared = parts.look(spd.batch("lm"))
        objective = minimality_of(entry)
        fraction = entry.get("current_frac_of_training", 0.0)
        if "p_used" in entry:
            assert objective.power(fraction) == pytest.approx(entry["p_used"], rel=1e-12)
        copies = entry.get("world_size", 1)  # as many ranks with the same rows
        sums = {name: s * copies for name, s in objective.component_sums(prepared.upper, fraction).items()}
        value = importance_minimality(sums, prepared.positions * copies, objective.beta)
        assert value.item() == pytest.approx(spd.scalar(key), rel=spd.tolerance), key
        if copies == 1:
            check_gradients(spd, parts, value, key)


def test_totals_with_other_importance_functions_and_all_gradients(spd: SPDFixture) -> None:
    for key in [key for key in spd.values if key.startswith("loss/total_with_")]:
        parts = decomposition(spd, "emb", key.removeprefix("loss/total_with_"))
        prepared = parts.look(spd.batch("emb"))
        total, count = StochasticRecon().sums(parts, prepared, RecordedDraws(spd, parts.names, [0]))
        minimal = ImportanceMinimality(pnorm=0.9, beta=1.0, eps=1e-6)
        penalty = importance_minimality(minimal.component_sums(prepared.upper, 0.0), prepared.positions, 1.0)
        value = total / count + 0.01 * penalty + 0.5 * Faithfulness().value(parts)
        for name, found in (("stochastic_recon", total / count), ("importance_minimality", penalty), ("total", value)):
            assert found.item() == pytest.approx(spd.scalar(key, name), rel=spd.tolerance), f"{key} {name}"
        check_gradients(spd, parts, value, key)


def test_routing_follows_from_the_recorded_draws(spd: SPDFixture) -> None:
    names = spd.order("lm")
    for r in range(4):
        found = routing_of_ranks(names, spd.inputs[f"lm/routing/{r}/k"], spd.inputs[f"lm/routing/{r}/noise"])
        for name in names:
            assert torch.equal(found[name], spd.inputs[f"lm/routing/{r}/mask/{name}"])
    prefix = next(name for name in spd.inputs if name.startswith("lm/routing/static_p")).rsplit("/noise", 1)[0].rsplit("/mask", 1)[0]
    noise = torch.stack([spd.inputs[f"{prefix}/noise/{name}"] for name in names])
    static = static_routing(names, noise, float(prefix.split("static_p")[1]))
    assert all(torch.equal(static[name], spd.inputs[f"{prefix}/mask/{name}"]) for name in names)


EVALUATED = {
    "UnmaskedReconLoss": lambda samples: UnmaskedRecon(),
    "CIMaskedReconLoss": lambda samples: CIMaskedRecon(),
    "CIMaskedReconLayerwiseLoss": lambda samples: CIMaskedRecon(scope="layerwise"),
    "StochasticReconLoss": lambda samples: StochasticRecon(samples=samples),
    "StochasticReconLayerwiseLoss": lambda samples: StochasticRecon(scope="layerwise", samples=samples),
    "CIHiddenActsReconLoss": lambda samples: CIHiddenActsRecon(),
    "StochasticHiddenActsReconLoss": lambda samples: StochasticHiddenActsRecon(samples=samples),
}


def test_evaluated_losses_over_two_batches(spd: SPDFixture) -> None:
    keys = [key for key in spd.values if key.split("/")[0] == "eval" and key.split("/")[1] in EVALUATED]
    assert len(keys) > 5
    for key in keys:
        entry, name = spd.values[key], key.split("/")[1]
        parts = decomposition(spd, "lm", spd.settings["default_ci_variant"], "mse" if "/mse" in key else "kl", "no_delta" not in key)
        recorded = entry.get("noise_samples", {})
        sums: dict[str, list[float]] = {}
        for batch in entry["batches"]:
            samples = recorded.get(f"batch{batch}", [])
            objective = EVALUATED[name](max(1, len(samples)))
            prepared, draws = parts.prepare(spd.batch("lm", batch)), RecordedDraws(spd, parts.names, samples)
            found = objective.by_module(parts, prepared, draws) if "HiddenActs" in name else {"": objective.sums(parts, prepared, draws)}
            for module, (total, count) in found.items():
                before = sums.setdefault(module, [0.0, 0.0])
                before[0] += float(total.detach())
                before[1] += count
        if "HiddenActs" not in name:
            assert sums[""][0] / sums[""][1] == pytest.approx(spd.scalar(key), rel=spd.tolerance), key
            continue
        for module, (total, count) in sums.items():
            assert total / count == pytest.approx(spd.scalar(key, f"{name}/{module}"), rel=spd.tolerance), (key, module)
        mean = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
        assert mean == pytest.approx(spd.scalar(key, name), rel=spd.tolerance), key


def test_evaluated_importance_minimality_of_all_batches_as_one(spd: SPDFixture) -> None:
    parts = decomposition(spd, "lm", spd.settings["default_ci_variant"])
    for key in [key for key in spd.values if key.startswith("eval/ImportanceMinimalityLoss/")]:
        objective = minimality_of(spd.values[key])
        prepared = parts.prepare(torch.cat([spd.batch("lm", batch) for batch in spd.values[key]["batches"]]))
        value = importance_minimality(objective.component_sums(prepared.upper, 0.0), prepared.positions, objective.beta)
        assert value.item() == pytest.approx(spd.scalar(key), rel=spd.tolerance), key


def measured(spd: SPDFixture, parts: Decomposition, measure: Measure, entry: dict[str, Any]) -> dict[str, float]:
    totals: Sums = {}
    for batch in entry["batches"]:
        named = entry.get("stochastic_noise", {}).get(f"batch{batch}", "sample 0")
        draws = RecordedDraws(spd, parts.names, [int(named.split()[1])])
        draws.__dict__["batch"] = batch
        prepared: Prepared = parts.prepare(spd.batch("lm", batch))
        for key, (total, count) in measure.update(parts, prepared, draws).items():
            before = totals.get(key, (torch.zeros_like(total), 0.0))
            totals[key] = (before[0] + total, before[1] + count)
    return measure.compute(totals)


def test_cross_entropy_and_kl_under_six_maskings(spd: SPDFixture) -> None:
    for key in [key for key in spd.values if key.startswith("eval/CEandKLLosses/")]:
        entry = spd.values[key]
        measure = CEAndKL(rounding_threshold=entry["rounding_threshold"])
        for delta, expected in ((True, entry[spd.precision]), (False, entry.get("correct", {}))):
            parts = decomposition(spd, "lm", spd.settings["default_ci_variant"], delta=delta)
            # recorded is the mean of the batches' own ratios; ours over both is a ratio of means, which no split of the rows changes
            each = [measured(spd, parts, measure, entry | {"batches": [batch]}) for batch in entry["batches"]]
            found = measured(spd, parts, measure, entry)
            for name, value in expected.items():
                mean = sum(numbers[name] for numbers in each) / len(each)
                assert mean == pytest.approx(value, rel=spd.tolerance, abs=spd.tolerance), (key, name)
                assert "unrecovered" in name or found[name] == pytest.approx(value, rel=spd.tolerance, abs=spd.tolerance), (key, name)


def test_l0_by_module_and_group(spd: SPDFixture) -> None:
    parts = decomposition(spd, "lm", spd.settings["default_ci_variant"])
    for key in [key for key in spd.values if key.startswith("eval/CI_L0/")]:
        entry = spd.values[key]
        threshold = float(key.split("threshold_")[1])
        found = measured(spd, parts, CIL0(threshold=threshold, groups=entry["groups"]), entry)
        expected = {name.split("_", 1)[1]: value for name, value in (entry[spd.precision] | entry.get("correct", {})).items()}
        assert set(expected) == set(found) - {"total"}
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-6), (key, name)


def test_toy_losses(spd: SPDFixture) -> None:
    toy_variants = [v for v, entry in spd.settings["ci_variants"].items() if entry["fixture"] == "toy"]
    recorded = {key.split("/")[2] for key in spd.values if key.startswith("toy/loss/")}
    values: dict[str, list[float]] = {name: [] for name in recorded}
    for variant in toy_variants:  # which of them was used is not recorded for all losses
        parts = decomposition(spd, "toy", variant, "mse")
        prepared = parts.prepare(spd.batch("toy"))
        draws = RecordedDraws(spd, parts.names, [0], part="toy")
        for name in recorded:
            if name == "faithfulness":
                values[name].append(Faithfulness().value(parts).item())
                continue
            scope = "layerwise" if name.endswith("layerwise") else "all"
            kind = name.removesuffix("_layerwise")
            objective = {"unmasked_recon": UnmaskedRecon(), "ci_masked_recon": CIMaskedRecon(scope=scope)}.get(
                kind, StochasticRecon(scope=scope)
            )
            total, count = objective.sums(parts, prepared, draws)
            values[name].append((total / count).item())
    for name, candidates in values.items():
        expected = spd.scalar(f"toy/loss/{name}")
        assert min(abs(value - expected) for value in candidates) < spd.tolerance * max(1e-2, abs(expected)), name


def test_identity_errors(spd: SPDFixture) -> None:
    cases = [key for key in spd.values if key.startswith("identity/")]
    assert cases
    for key in cases:
        entry = spd.values[key]
        matrices = {name.removeprefix(f"{key}/"): t for name, t in spd.inputs.items() if name.startswith(f"{key}/")}
        assert identity_measure(entry).of(matrices) == entry[spd.precision], key


def identity_measure(entry: dict[str, Any]) -> IdentityCIError:
    identity = {rule["layer_pattern"]: rule["n_features"] for rule in entry["identity_ci"]}
    return IdentityCIError(identity=identity, dense={rule["layer_pattern"]: rule["k"] for rule in entry["dense_ci"]})


def test_identity_error_of_a_model_with_and_without_position_axis(spd: SPDFixture) -> None:
    entry = spd.values["identity_toy"]
    parts = decomposition(spd, "toy", entry["ci_variant"], "mse")
    importances = one_hot_importances(parts, spd.settings["toy_model"]["d_in"])
    for name, reference in spd.expected("identity_toy/ci/").items():
        assert largest_error(importances[name], reference) < spd.tolerance
    assert identity_measure(entry).of(importances) == entry[spd.precision]
    assert identity_measure(entry).of({name: g[:, None] for name, g in importances.items()}) == entry[spd.precision]


def test_masks_of_all_zeros_leave_the_bias_alone(spd: SPDFixture) -> None:
    model = spd.model("toy")
    off = {"lin1": ComponentMask(torch.zeros((), dtype=spd.dtype))}
    outputs = model(spd.batch("toy"), off, keep=("outputs",)).outputs["lin1"]
    assert torch.equal(outputs, spd.inputs["toy/target/lin1.bias"].expand_as(outputs))
