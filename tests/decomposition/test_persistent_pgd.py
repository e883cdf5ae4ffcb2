"""Persistent adversarial sources: SPD's recorded trajectories, and that ranks, microbatches and interruptions do not matter."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from spd_components import PRECISIONS, SPDFixture, folders, largest_error

from theodolite.cli import RUN_DIR_VARIABLE, main
from theodolite.functional.component_masks import routing_of_ranks
from theodolite.functional.persistent_sources import Ascent, SourceState, move, stored_rows, stored_shape
from theodolite.lightning_modules.decomposition.decomposition import Decomposition
from theodolite.lightning_modules.decomposition.draws import Draws, Routing
from theodolite.lightning_modules.decomposition.persistent_pgd import PersistentPGDEval, PersistentPGDRecon
from theodolite.lightning_modules.decomposition.step import StepBatch, microbatches, step_gradients

GOLDEN = [(folder, precision) for folder in folders() for precision in PRECISIONS]


@pytest.fixture(params=GOLDEN, ids=[f"{folder.name}-{precision}" for folder, precision in GOLDEN], scope="module")
def spd(request: pytest.FixtureRequest) -> SPDFixture:
    return SPDFixture(*request.param)


@dataclass(frozen=True)
class RecordedRouting(Draws):
    """Draws whose routing masks are a recorded set."""

    masks: Mapping[str, Tensor] | None = None

    def routing(self, routing: Routing, names: Sequence[str], leading: tuple[int, ...], sample: int = 0) -> dict[str, Tensor]:
        assert self.masks is not None
        return dict(self.masks)


def decomposition(spd: SPDFixture, kind: Any = "kl", delta: bool = True) -> Decomposition:
    variant = spd.settings["default_ci_variant"]
    model = spd.model("lm")
    parts = Decomposition(model, spd.settings["ci_variants"][variant]["ci_config"], use_delta=delta, output_loss=kind).to(spd.dtype)
    parts.ci_fn = spd.importance_function(variant, model)
    return parts


def recorded_state(spd: SPDFixture, objective: PersistentPGDRecon, delta: bool) -> SourceState:
    what = "init_logits" if objective.logits else "init"
    sources = spd.tensors(f"ppgd/{objective.source_scope}/{what}/")
    values = {name: (sources[name] if delta else sources[name][..., :-1]).clone() for name in spd.order("lm")}
    first, second = ({n: torch.zeros_like(v) for n, v in values.items() if objective.ascent == "adam"} for _ in range(2))
    return SourceState(values, first, second)


def objective_of(spd: SPDFixture, key: str, **more: Any) -> tuple[PersistentPGDRecon, Decomposition]:
    entry, (_, ascent, source_scope, scope, *_) = spd.values[key], key.split("/")
    rates: dict[str, Any] = {"lr": entry["step_size"]} if ascent == "sign" else {n: entry[n] for n in ("lr", "beta1", "beta2", "eps")}
    settings: dict[str, Any] = {"ascent": ascent, "source_scope": source_scope, "scope": scope, "coeff": 0.5, **rates, **more}
    state = spd.tensors(f"ppgd/{source_scope}/init/")[spd.order("lm")[0]]
    n_sources = len(state) if source_scope == "repeat_across_batch" else 1
    objective = PersistentPGDRecon(n_sources=n_sources, logits=entry["use_sigmoid_parameterization"], **settings)
    parts = decomposition(spd, entry["output_loss_type"], entry["use_delta_component"])
    objective.plan(3)
    memory = objective._memory
    memory.state = recorded_state(spd, objective, entry["use_delta_component"])
    memory.rows = {place: place for place in range(len(next(iter(memory.state.values.values()))))}
    return objective, parts


def draws_of(spd: SPDFixture, key: str, step: int) -> Draws:
    sets = spd.values[key].get("routing_sets")
    masks = spd.tensors(f"lm/routing/{sets[step]}/mask/") if sets else None
    return RecordedRouting((0, "train", step), list(range(spd.settings["batch"])), masks=masks)


def keys_of(spd: SPDFixture) -> list[str]:
    return [key for key in spd.values if key.startswith(("ppgd/sign/", "ppgd/adam/"))]


def trained_step(parts: Decomposition, objective: PersistentPGDRecon, batch: Tensor, draws: Draws, step: int) -> tuple[float, Any]:
    prepared = parts.look(batch)
    objective.begin(parts, [(prepared.detached(), draws)], step, training=True)
    total, count = objective.sums(parts, prepared, draws)
    assert objective.coeff is not None
    (objective.coeff * total / count).backward()
    leaves = [leaves for _, leaves in objective._memory.leaves]
    objective.finish(step)
    return total.item() / count, leaves


def test_trajectories_equal_spds(spd: SPDFixture) -> None:
    assert len(keys_of(spd)) > 10
    loose = 1e-9 if spd.precision == "float64" else 1e-4
    for key in keys_of(spd):
        objective, parts = objective_of(spd, key)
        for step in range(3):
            draws = draws_of(spd, key, step)
            loss, _ = trained_step(parts, objective, spd.batch("lm"), draws, step)
            assert loss == pytest.approx(spd.values[key][spd.precision]["losses"][step], rel=spd.tolerance), (key, step)
            if step == 2:
                with torch.no_grad():
                    after = objective.sums(parts, parts.look(spd.batch("lm")), draws_of(spd, key, 3))
                wanted = spd.values[key][spd.precision]["losses"][3]
                assert float(after[0]) / after[1] == pytest.approx(wanted, rel=spd.tolerance), key
            assert objective._memory.state is not None
            for name, expected in spd.expected(f"{key}/after{step + 1}/").items():
                reliable = spd.expected(f"{key}/reliable/")[name].bool()
                assert largest_error(objective._memory.state.values[name][reliable], expected[reliable]) < loose, (key, step, name)


def test_inner_ascents_and_their_schedule_equal_spds(spd: SPDFixture) -> None:
    for kind in ("sign", "adam"):
        entry = spd.values[f"ppgd/warmup2_plus_1/{kind}"]
        matches = [key for key in keys_of(spd) if key.startswith(f"ppgd/{kind}/") and key.endswith("/all")]
        wanted = entry[spd.precision]["loss"]
        (key,) = [key for key in matches if spd.values[key][spd.precision]["losses"][2] == pytest.approx(wanted, rel=1e-6)]
        objective, parts = objective_of(spd, key, warmup_steps=entry["n_warmup_steps"])
        loss, _ = trained_step(parts, objective, spd.batch("lm"), draws_of(spd, key, 0), 0)
        assert loss == pytest.approx(wanted, rel=spd.tolerance)
        assert objective._memory.state is not None
        assert objective._memory.state.updates == 3


def test_evaluations_under_the_sources_equal_spds(spd: SPDFixture) -> None:
    for key in [key for key in spd.values if key.startswith("ppgd/eval/")]:
        _, _, scope, kind = key.split("/")
        source = next(k for k in keys_of(spd) if k.startswith(f"ppgd/sign/{scope}/all"))
        objective, _ = objective_of(spd, source)
        parts = decomposition(spd, kind)
        measure = PersistentPGDEval()
        measure.bind([objective])
        with torch.no_grad():
            found = measure.compute(measure.update(parts, parts.prepare(spd.batch("lm")), draws_of(spd, source, 0)))
        entry = spd.values[key]
        for name, expected in entry[spd.precision].items():
            expected = entry.get("correct", {}).get(name, expected)
            assert found[name.split("/", 1)[1]] == pytest.approx(expected, rel=10 * spd.tolerance), (key, name)


# ---------------------------------------------------------------------- ours alone


def small(seed: int = 1) -> Decomposition:
    from theodolite.lightning_modules.decomposition.component_model import ComponentModel
    from theodolite.lightning_modules.decomposition.targets.llama_simple_mlp import LlamaSimpleMLP

    target = LlamaSimpleMLP(13, 1, 2, 8, 12, 6)
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) / 2)
    model = ComponentModel(target, {"h.*.mlp.*": 5, "h.*.attn.v_proj": 4})
    parts = Decomposition(model, {"mode": "layerwise", "fn_type": "shared_mlp", "hidden_dims": [4]}, output_loss="kl")
    parts.initialise(seed)
    return parts.double()


TOKENS = torch.randint(0, 13, (8, 6), generator=torch.Generator().manual_seed(4))
SETTINGS: list[dict[str, Any]] = [
    {"source_scope": "single_source"},
    {"source_scope": "broadcast_across_batch", "ascent": "sign", "scope": "subset"},
    {"source_scope": "repeat_across_batch", "n_sources": 2, "warmup_steps": 2, "schedule": "cosine", "warmup_fraction": 0.5},
    {"source_scope": "per_batch_per_position", "warmup_steps": 1, "logits": True, "scope": "subset", "routing": {"probability": 0.6}},
]


def run(objective: PersistentPGDRecon, parts: Decomposition, steps: Sequence[int], micro: int | None = None) -> list[float]:
    objective.plan(6)
    losses = []
    for step in steps:
        batch = StepBatch(microbatches(TOKENS, 0, 1, micro), len(TOKENS), (3, "train", step), step, step / 6)
        shares = step_gradients(parts, [objective], batch, torch.Tensor.backward)
        losses.append(float(shares["total"]))
    return losses


def state_of(objective: PersistentPGDRecon) -> dict[str, Tensor]:
    saved = objective.state_dict()
    return {f"{kind}/{name}": tensor for kind, part in saved["tensors"].items() for name, tensor in part.items()}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["source_scope"])
def test_microbatches_do_not_matter(settings: dict[str, Any]) -> None:
    parts = small()
    whole = PersistentPGDRecon(coeff=0.7, lr=0.05, **settings)
    expected = run(whole, parts, range(4))
    for micro in (3, 1):
        objective = PersistentPGDRecon(coeff=0.7, lr=0.05, **settings)
        assert run(objective, parts, range(4), micro) == pytest.approx(expected, rel=1e-9)
        for name, tensor in state_of(objective).items():
            torch.testing.assert_close(tensor, state_of(whole)[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["source_scope"])
def test_resumed_sources_take_the_steps_of_those_that_went_on(settings: dict[str, Any], tmp_path: Path) -> None:
    parts = small()
    straight, before, after = (PersistentPGDRecon(coeff=0.7, lr=0.05, **settings) for _ in range(3))
    expected = run(straight, parts, range(5))
    first = run(before, parts, range(2))
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert after.state_dict()["updates"] == before.state_dict()["updates"]
    assert first + run(after, parts, range(2, 5)) == expected
    for name, tensor in state_of(after).items():
        assert torch.equal(tensor, state_of(straight)[name]), name


def test_sources_hurt_more_as_training_goes_on_and_an_evaluation_changes_nothing() -> None:
    parts = small()
    objective = PersistentPGDRecon(coeff=1.0, lr=0.1, ascent="sign")
    measure = PersistentPGDEval()
    measure.bind([objective])
    prepared, draws = parts.prepare(TOKENS), Draws((3, "eval", 0), list(range(8)))
    parts.requires_grad_(False)
    fresh = measure.compute(measure.update(parts, prepared, draws))["output_recon"]
    parts.model.components.requires_grad_(True)
    losses = run(objective, parts, range(6))
    assert losses[0] == pytest.approx(fresh, rel=1e-12), "sources of step 0 are those that an evaluation before it draws"
    assert losses[5] > losses[0]
    before = state_of(objective)
    reached = measure.compute(measure.update(parts, prepared, draws))["output_recon"]
    assert reached >= losses[5] * 0.98
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(objective).items())


def test_persistent_sign_ascent_of_one_source_on_constant_data_is_a_shared_attack() -> None:
    from theodolite.functional.pgd import Rows, attack_groups

    parts = small()
    objective = PersistentPGDRecon(coeff=1.0, lr=0.1, ascent="sign")
    run(objective, parts, [0])
    start = {name: value.clone() for name, value in state_of(objective).items()}
    losses = run(objective, parts, range(1, 5))
    prepared = parts.prepare(TOKENS)
    sources = {name.removeprefix("values/"): value for name, value in start.items()}
    part = Rows(lambda given: parts.loss_sum(prepared, given), torch.zeros(8, dtype=torch.long))
    curve = attack_groups([part], sources, range(4), 0.1)
    assert losses == pytest.approx([curve.loss(n) for n in range(4)], rel=1e-9)


def test_a_resumed_fit_has_the_sources_and_numbers_of_one_that_went_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    settings = yaml.safe_load((Path(__file__).parents[2] / "configs/decomposition/tms_5-2.yaml").read_text())
    model, attacks = settings["model"]["init_args"], []
    for spec in SETTINGS[:1] + SETTINGS[2:]:
        attacks.append(spec | {"name": "persistent_pgd_recon", "key": spec["source_scope"], "coeff": 0.5})
    model["target"] |= {"steps": 5, "batch_size": 16}
    evaluated = [{"name": "persistent_pgd_eval", "loss": spec["key"]} for spec in attacks]
    model |= {"losses": [{"name": "stochastic_recon", "coeff": 1.0}, *attacks], "metrics": evaluated, "faithfulness_steps": 0}
    settings["data"]["init_args"] |= {"global_batch_size": 8, "eval_batch_size": 8, "eval_batches": 1}
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}}
    settings["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1, "callbacks": [checkpoint]}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(settings))
    line = ["fit", f"--config={tmp_path}/fit.yaml"]
    main([*line, f"--run_dir={tmp_path}/whole"])
    main([*line, f"--run_dir={tmp_path}/resumed", f"--ckpt_path={tmp_path}/whole/checkpoints/step=2.ckpt"])
    whole, resumed = (torch.load(tmp_path / run / "checkpoints" / "step=4.ckpt", weights_only=True) for run in ("whole", "resumed"))
    for label, saved in whole["objectives"].items():
        assert saved["updates"] == resumed["objectives"][label]["updates"] >= 4
        for kind, tensors in saved["tensors"].items():
            assert all(torch.equal(tensor, resumed["objectives"][label]["tensors"][kind][name]) for name, tensor in tensors.items())
    rows = [[json.loads(row) for row in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("whole", "resumed")]
    later = [row for row in rows[0] if row["step"] >= 2]
    assert later[-1] == rows[1][-1]
    assert "val/persistent_pgd_eval/single_source/output_recon" in later[-1]


def test_stored_rows_of_slots() -> None:
    assert stored_rows("repeat_across_batch", 3, [0, 2, 4, 6]) == [0, 2, 1, 0]
    assert stored_rows("per_batch_per_position", 1, [1, 3]) == [1, 3]
    assert stored_rows("single_source", 1, [1, 3]) == stored_rows("broadcast_across_batch", 1, [1, 3]) == [0, 0]
    assert stored_shape("single_source", (7,)) == (1,)
    assert stored_shape("repeat_across_batch", (7,)) == (7,)


def test_adam_ascent_is_adam_on_the_negated_loss() -> None:
    value = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    state = SourceState({"x": value.clone()}, {"x": torch.zeros_like(value)}, {"x": torch.zeros_like(value)})
    parameter = torch.nn.Parameter(value.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.01, betas=(0.5, 0.99), eps=1e-8, maximize=True)
    for step in range(5):
        gradient = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        parameter.grad = gradient.clone()
        optimizer.step()
        move(state, {"x": gradient}, Ascent("adam", 0.5, 0.99, 1e-8), 0.01)
    torch.testing.assert_close(state.values["x"], parameter.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source_scope": "everything"}, "source_scope"),
        ({"n_sources": 2}, "repeat_across_batch"),
        ({"ascent": "newton"}, "adam or sign"),
        ({"schedule": "stairs"}, "stairs"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PersistentPGDRecon(coeff=1.0, **settings)


def test_batches_that_do_not_fit_the_sources_are_refused() -> None:
    parts = small()
    objective = PersistentPGDRecon(coeff=1.0, source_scope="per_batch_per_position")
    run(objective, parts, [0])
    for tokens, slots in ((TOKENS[:, :4], range(8)), (TOKENS, range(4, 12))):
        with pytest.raises(ValueError, match="keeps sources of shape"):
            objective.sources_of(parts, parts.prepare(tokens), Draws((3, "eval", 0), list(slots)))
    with pytest.raises(ValueError, match="needs one persistent_pgd_recon"):
        PersistentPGDEval(loss="other").bind([objective])
    assert routing_of_ranks(["a"], torch.tensor([1]), torch.tensor([[0.5]]))["a"].all()
