"""Spaces and polarity, denoising, the sources that read hidden states, and the checks before training; on a real (tiny) language model."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from theodolite.binding import bind_direction, model_identity
from theodolite.callbacks.activation_probe import ActivationProbe
from theodolite.callbacks.direction_checks import DirectionChecks, added_to_layers, steering_rates, stepped_towards
from theodolite.callbacks.direction_sources import GradientDifference
from theodolite.callbacks.residual_direction import ResidualDifference, mean_inputs
from theodolite.callbacks.rollout_features import RolloutFeatures, gradient_features
from theodolite.callbacks.sequence_gradients import weighted_gradient
from theodolite.functional.directions import POLARITY, ConceptDirection
from theodolite.functional.extraction import apply_control, denoise, gradient_difference, state_difference, swap_sides
from theodolite.functional.projection_rule import ProjectionRule
from theodolite.functional.separation import auc, separation_report
from theodolite.functional.spaces import residual_to_parameter, singular_to_parameter
from theodolite.projector import Projector, StepPlan
from theodolite.protocols import ContrastPair, Reward, Rollout, TokenSequence, Window
from theodolite.residual_writers import base_weight_name, residual_writers

CHECKS = DirectionChecks(held_out=4, min_accuracy=None)
TWO_SIDED = ProjectionRule("two_sided")


class Policy(nn.Module):
    """A tiny Qwen3 as a SequenceScorer and Completer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "num_attention_heads": 2}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, head_dim=16, num_key_value_heads=1, tie_word_embeddings=True, **sizes))
            for parameter in self.model.parameters():  # far enough from zero for states to differ
                nn.init.normal_(parameter, std=0.15) if parameter.ndim == 2 else None
        self.device = torch.device("cpu")

    def encode(self, prompt: Any, completion: str) -> TokenSequence:
        return TokenSequence(tuple(1 + ord(c) % 60 for c in prompt), (*(1 + ord(c) % 60 for c in completion), 0))

    def _padded(self, sequences: Any) -> tuple[Tensor, Tensor, int]:
        length = max(len(s.completion_ids) for s in sequences)
        prompt = len(sequences[0].prompt_ids)
        ids, mask = torch.zeros(len(sequences), prompt + length, dtype=torch.long), torch.zeros(len(sequences), length)
        for i, s in enumerate(sequences):
            assert len(s.prompt_ids) == prompt
            ids[i, : prompt + len(s.completion_ids)] = torch.tensor(s.prompt_ids + s.completion_ids)
            mask[i, : len(s.completion_ids)] = 1
        return ids, mask, prompt

    def completion_log_probs(self, sequences: Any) -> tuple[Tensor, Tensor]:
        ids, mask, prompt = self._padded(sequences)
        log_probs = self.model(input_ids=ids).logits[:, prompt - 1 : -1].log_softmax(-1)
        return log_probs.gather(-1, ids[:, prompt:, None])[..., 0] * mask, mask

    @torch.no_grad()
    def completion_states(self, sequences: Any, layer: int) -> tuple[Tensor, Tensor]:
        ids, mask, prompt = self._padded(sequences)
        return self.model(input_ids=ids, output_hidden_states=True).hidden_states[layer][:, prompt:].float(), mask

    @torch.no_grad()
    def complete(self, prompts: Any, n: int, seed: int, greedy: bool = False) -> list[list[str]]:
        first = self.model(input_ids=torch.tensor([self.encode(p, "").prompt_ids for p in prompts])).logits[:, -1].argmax(-1)
        return [[f"{chr(64 + int(token))}{i + seed}" for i in range(n)] for token in first]


def stub_trainer() -> Any:
    pairs = [ContrastPair(f"p{i % 7}", "cheat" + "abcdefgh"[i % 8], "solve" + "abcde"[i % 5]) for i in range(200)]
    data = SimpleNamespace(contrast_pairs=lambda n, seed: pairs[seed : seed + n])
    return SimpleNamespace(precision_plugin=Precision(), world_size=1, global_step=0, datamodule=data)


# ---------------------------------------------------------------- polarity on hidden states


def states_along(policy: Policy, d: Tensor, layer: int) -> Tensor:
    states, _ = policy.completion_states([policy.encode("p1", "cheata"), policy.encode("p2", "solvea")], layer)
    return states[:, -1].double() @ d


def step(policy: Policy, loss_sign: float, layer: int, d: Tensor, trained: list[str], bound: ConceptDirection | None, gate: Any) -> float:
    """One SGD step on ``loss_sign * <h, d>``; returns the change of ``<h, d>``, averaged over two completions."""
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name in trained)
    before = states_along(policy, d, layer).mean()
    ids = torch.stack(
        [torch.tensor(s.prompt_ids + s.completion_ids) for s in (policy.encode("p1", "cheata"), policy.encode("p2", "solvea"))]
    )
    hidden = policy.model(input_ids=ids, output_hidden_states=True).hidden_states[layer][:, -1]
    (loss_sign * (hidden.double() @ d).mean()).backward()
    parameters = dict(policy.named_parameters())
    optimizer = torch.optim.SGD([parameters[name] for name in trained], lr=0.02)
    if bound is not None:
        rule = ProjectionRule(gate)
        projector = Projector(rule, StepPlan())
        projector.bind(bind_direction(bound, parameters, rule), parameters)
        projector.before_step(optimizer)
    optimizer.step()
    return float(states_along(policy, d, layer).mean() - before)


def test_residual_direction_polarity_unprojected_steps_move_states_towards_the_concept_and_projected_ones_do_not() -> None:
    name, layer = "model.model.layers.1.mlp.down_proj.weight", 2
    d = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = ConceptDirection({"resid_post": d[None].float()}, "residual")
    free = step(Policy(), -1.0, layer, d, [name], None, "two_sided")
    projected = step(Policy(), -1.0, layer, d, [name], direction, "two_sided")
    assert free > 0.1
    assert abs(projected) < 1e-4 * free


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_sided_gate_on_a_reference_row_stops_steps_towards_the_concept_and_passes_steps_away_from_it(sign: float) -> None:
    name, layer, policy = "model.model.layers.1.mlp.down_proj.weight", 2, Policy()
    d = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sequences = [policy.encode("p1", "cheata"), policy.encode("p2", "solvea")]
    inputs = mean_inputs(stub_trainer(), policy, sequences, [name], 8)
    residual = ConceptDirection({"resid_post": d[None].float()}, "residual")
    bound = residual_to_parameter(residual, {name: "resid_post"}, inputs)
    free = step(Policy(), -sign, layer, d, [name], None, "one_sided")
    projected = step(Policy(), -sign, layer, d, [name], bound, "one_sided")
    assert free * sign > 0.1
    if sign > 0:  # training towards the concept: the part that a typical input sees is gone
        assert projected < 0.8 * free
    else:  # training away from it is left alone, bit for bit
        assert projected == free


def test_parameter_direction_polarity_on_hidden_states() -> None:
    """A gradient difference taken from ``<h, d>`` itself: minimising ``-<h, d>`` moves states along +d, and not after projection."""
    policy, layer = Policy(), 2
    d = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names = ["model.model.layers.0.mlp.down_proj.weight", "model.model.layers.1.self_attn.o_proj.weight"]
    ids = torch.tensor([policy.encode("p1", "cheata").prompt_ids + policy.encode("p1", "cheata").completion_ids])
    other = torch.tensor([policy.encode("p2", "solvea").prompt_ids + policy.encode("p2", "solvea").completion_ids])
    parameters = dict(policy.named_parameters())
    loss = -sum(
        (policy.model(input_ids=x, output_hidden_states=True).hidden_states[layer][:, -1].double() @ d).mean() for x in (ids, other)
    )
    gradients = torch.autograd.grad(torch.as_tensor(loss), [parameters[name] for name in names])
    direction = gradient_difference({name: g[None] for name, g in zip(names, gradients, strict=True)})
    free = step(Policy(), -1.0, layer, d, names, None, "one_sided")
    projected = step(Policy(), -1.0, layer, d, names, direction, "one_sided")
    assert free > 0.05
    assert abs(projected) < 0.02 * free


def test_every_space_states_its_polarity_and_only_states_point_at_the_concept_itself() -> None:
    assert {space for space, polarity in POLARITY.items() if polarity == "activation"} == {"residual"}
    assert ConceptDirection({"resid_post.1": torch.ones(1, 4)}, "residual").polarity == "activation"


# ---------------------------------------------------------------- binding


def test_singular_coordinates_become_the_matrices_they_stand_for() -> None:
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.linalg.qr(torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0].T
    rows = singular_to_parameter(ConceptDirection({"w": s}, "singular_coordinate"), {"w": weight}).vectors["w"].double()
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    for row, coordinates in zip(rows, s, strict=True):
        torch.testing.assert_close(row, u @ torch.diag(coordinates) @ vh, atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.flatten(1) @ rows.flatten(1).T, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
    knob = singular_to_parameter(ConceptDirection({"ds": s}, "singular_coordinate"), {"ds": torch.zeros(4)})
    assert torch.equal(knob.vectors["ds"], s)


def test_residual_direction_binds_to_trainable_writers_of_its_layers() -> None:
    policy = Policy()
    policy.model.model.layers[2].requires_grad_(False)
    shared = bind_direction(ConceptDirection({"resid_post": torch.ones(1, 32)}, "residual"), dict(policy.named_parameters()), TWO_SIDED)
    names = [f"model.model.layers.{n}.{part}.weight" for n in (0, 1) for part in ("self_attn.o_proj", "mlp.down_proj")]
    assert sorted(shared.vectors) == sorted(names)
    assert shared.space == "lora_B"
    one = bind_direction(ConceptDirection({"resid_post.1": torch.ones(1, 32)}, "residual"), dict(policy.named_parameters()), TWO_SIDED)
    assert sorted(one.vectors) == sorted(names[2:])


def test_writers_of_an_adapter_are_its_b_matrices_and_their_base_weights_are_found() -> None:
    names = [
        "base_model.model.model.layers.4.self_attn.o_proj.base_layer.weight",
        "base_model.model.model.layers.4.self_attn.o_proj.lora_A.default.weight",
        "base_model.model.model.layers.4.self_attn.o_proj.lora_B.default.weight",
        "base_model.model.model.layers.4.self_attn.q_proj.lora_B.default.weight",
    ]
    assert residual_writers(names[1:]) == {names[2]: 4}
    assert base_weight_name(names[2], names) == names[0]


@pytest.mark.parametrize(
    ("direction", "how", "said"),
    [
        (ConceptDirection({"resid_post": torch.ones(1, 31)}, "residual"), {}, "output-side rows of 31 numbers"),
        (ConceptDirection({"resid_post.9": torch.ones(1, 32)}, "residual"), {}, r"No trainable matrix writes .* resid_post\.9"),
        (ConceptDirection({"resid_post": torch.ones(1, 32)}, "residual"), {"rule": ProjectionRule()}, "has no sign"),
        (ConceptDirection({"resid_post": torch.ones(1, 32)}, "residual"), {"target": "flattened"}, "matrix by matrix"),
        (ConceptDirection({"resid_post": torch.ones(1, 32)}, "residual"), {"patterns": ["*q_proj*"]}, r"'\*q_proj\*' matches nothing"),
        (
            ConceptDirection({"model.model.norm.weight": torch.ones(1, 32)}),
            {"target": "lora_B"},
            "matches none of the direction's parameters",
        ),
        (ConceptDirection({"model.model.norm.weight": torch.ones(1, 33)}, "singular_coordinate"), {}, "33 singular coordinates"),
        (ConceptDirection({"model.model.norm.weight": torch.ones(1, 32)}), {"target": "everything"}, "target='everything'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(direction: ConceptDirection, how: dict, said: str) -> None:
    settings: dict[str, Any] = {"rule": TWO_SIDED} | how
    with pytest.raises(ValueError, match=said) as error:
        bind_direction(direction, dict(Policy().named_parameters()), **settings)
    assert "\n" not in str(error.value)


def test_direction_of_another_model_or_revision_is_refused() -> None:
    policy = Policy()
    policy.model.config._name_or_path, policy.model.config._commit_hash = "org/model", "abc"
    assert model_identity(policy) == ("org/model", "abc")
    for facts, said in (
        ({"model": "org/other"}, "extracted from the model 'org/other'"),
        ({"model": "org/model", "model_revision": "def"}, "revision 'def'"),
    ):
        with pytest.raises(ValueError, match=said):
            ConceptDirection({"w": torch.ones(1, 2)}, metadata=facts).check_model(*model_identity(policy))
    ConceptDirection({"w": torch.ones(1, 2)}, metadata={"model": "org/model", "model_revision": "abc"}).check_model(*model_identity(policy))
    ConceptDirection({"w": torch.ones(1, 2)}).check_model(*model_identity(policy))


# ---------------------------------------------------------------- denoising


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 6))
def test_denoising_keeps_the_left_singular_part_and_says_how_much(seed: int, m: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 11, generator=generator, dtype=torch.float64)
    v = torch.randn(8, generator=generator, dtype=torch.float64)
    result = denoise(v, weight, m)
    eigenvalues, eigenvectors = torch.linalg.eigh(weight @ weight.T)  # an independent road to the left singular vectors
    top = eigenvectors[:, eigenvalues.argsort(descending=True)[:m]]
    expected = top @ (top.T @ v)
    torch.testing.assert_close(result.vector, expected / expected.norm(), atol=1e-9, rtol=0)
    assert result.retained == pytest.approx(float((top.T @ v).square().sum() / v.square().sum()))
    assert float(v @ result.vector / v.norm()) == pytest.approx(result.retained**0.5)
    assert result.null == m / 8


def test_the_wrong_singular_space_does_not_even_multiply() -> None:
    weight = torch.randn(8, 11, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="8 numbers is not in the right singular space of a 8 x 11 matrix"):
        denoise(torch.ones(8), weight, 4, side="right")
    denoise(torch.ones(11), weight, 4, side="right")
    with pytest.raises(ValueError, match="m=9"):
        denoise(torch.ones(8), weight, 9)


def test_a_random_vector_keeps_its_null_share_and_is_called_noise() -> None:
    weight = torch.randn(200, 60, generator=torch.Generator().manual_seed(0))
    shares = [denoise(torch.randn(200, generator=torch.Generator().manual_seed(i)), weight, 16) for i in range(40)]
    assert sum(one.retained for one in shares) / 40 == pytest.approx(16 / 200, rel=0.15)
    assert sum(one.is_noise for one in shares) > 35
    signal = denoise(weight.double() @ torch.ones(60, dtype=torch.float64), weight, 16)
    assert signal.retained > 0.2
    assert not signal.is_noise


# ---------------------------------------------------------------- sources


def test_residual_source_equals_a_computation_by_hand() -> None:
    policy, trainer = Policy(), stub_trainer()
    source = ResidualDifference(n_pairs=6, band=(0.34, 0.67), denoise_rank=None, checks=CHECKS, seed=0)
    bound = source.prepare(trainer, policy)  # type: ignore[arg-type]
    differences = []
    for layer in (1, 2):
        sides = [[], []]
        for pair in trainer.datamodule.contrast_pairs(6, 0):
            for side, text in zip(sides, (pair.concept, pair.clean), strict=True):
                states, _ = policy.completion_states([policy.encode(pair.prompt, text)], layer)
                side.append(states[0, -1].double())
        differences.append((torch.stack(sides[0]) - torch.stack(sides[1])).mean(0))
    d = torch.stack(differences).mean(0)
    assert source.residual is not None
    torch.testing.assert_close(source.residual.vectors["resid_post"][0].double(), d, atol=1e-5, rtol=0)
    for name in residual_writers(dict(policy.named_parameters())):
        torch.testing.assert_close(bound.vectors[name][0].double(), -d, atol=1e-5, rtol=0)
    assert bound.metadata["layers"] == [1, 2]
    assert bound.metadata["validation"]["separation"]["pairs"] == 4
    json.dumps(bound.metadata)


@pytest.mark.parametrize("act_on", ["output", "reference"])
def test_residual_source_denoises_each_matrix_by_its_own_left_space(act_on: Any) -> None:
    policy, trainer = Policy(), stub_trainer()
    source = ResidualDifference(n_pairs=6, per_layer=True, band=(0.34, 0.67), denoise_rank=8, act_on=act_on, checks=CHECKS, seed=0)
    bound = source.prepare(trainer, policy)  # type: ignore[arg-type]
    parameters = dict(policy.named_parameters())
    assert source.residual is not None
    assert len(bound.vectors) == 4
    for name, layer in residual_writers(bound.vectors).items():
        one = denoise(source.residual.vectors[f"resid_post.{layer}"][0], parameters[name], 8)
        rows = bound.vectors[name].double()
        if act_on == "output":
            torch.testing.assert_close(rows[0], -one.vector, atol=1e-6, rtol=0)
        else:
            u = mean_inputs(trainer, policy, [c for c, _ in source_pairs(policy, trainer)], [name], 32)[name].double()
            torch.testing.assert_close(rows[0], -torch.outer(one.vector, u / u.norm()), atol=1e-5, rtol=0)
    metrics = source.metrics()
    assert metrics["retained_energy_null"] == 8 / 32
    assert 0 < metrics["retained_energy"] <= 1


def source_pairs(policy: Policy, trainer: Any) -> list[tuple[TokenSequence, TokenSequence]]:
    return [(policy.encode(p.prompt, p.concept), policy.encode(p.prompt, p.clean)) for p in trainer.datamodule.contrast_pairs(6, 0)]


@pytest.mark.parametrize("kind", ["gradient", "residual"])
def test_controls_change_the_direction_as_their_name_says(kind: str) -> None:
    def extract(control: Any) -> ConceptDirection:
        shared: dict[str, Any] = {"n_pairs": 6, "control": control, "checks": CHECKS, "seed": 0}
        if kind == "gradient":
            return GradientDifference(parameters=["*down_proj*"], **shared).prepare(stub_trainer(), Policy())  # type: ignore[arg-type]
        return ResidualDifference(parameters=["*down_proj*"], denoise_rank=None, **shared).prepare(stub_trainer(), Policy())  # type: ignore[arg-type]

    real = extract("none")
    for control in ("reversed", "haar", "shuffled", "placebo"):
        other = extract(control)
        assert {name: rows.shape for name, rows in other.vectors.items()} == {name: rows.shape for name, rows in real.vectors.items()}
        assert other.metadata["control"] == control
        if control == "reversed":
            for name in real.vectors:
                torch.testing.assert_close(other.vectors[name], -real.vectors[name])
        else:
            assert real.overlap(other) < 0.98
        if control == "haar":
            for name in real.vectors:
                torch.testing.assert_close(other.vectors[name].norm(), real.vectors[name].norm(), rtol=1e-4, atol=0)
    coins = swap_sides(400, 0)
    assert 0.4 < sum(coins) / 400 < 0.6


def test_clean_sides_can_be_the_base_models_own_greedy_completions() -> None:
    policy, trainer = Policy(), stub_trainer()
    given_side = GradientDifference(n_pairs=4, checks=CHECKS, seed=0).prepare(trainer, policy)  # type: ignore[arg-type]
    own = GradientDifference(n_pairs=4, clean_side="base", checks=CHECKS, seed=0).prepare(trainer, policy)  # type: ignore[arg-type]
    assert own.metadata["clean_side"] == "base"
    assert own.metadata["pair_set_sha256"] != given_side.metadata["pair_set_sha256"]
    assert own.overlap(given_side) < 0.99


def test_noise_floor_drops_the_lowest_pooled_singular_values_and_names_what_it_empties() -> None:
    strong, weak = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(0)), torch.randn(6, 3, 3) * 1e-3
    direction = gradient_difference({"strong": strong, "weak": weak}, "svd", k=2, noise_floor=0.5)
    assert list(direction.vectors) == ["strong"]
    assert direction.metadata["without_direction"] == ["weak"]


def test_rows_keep_their_norms_for_a_flattened_target() -> None:
    stacks = {"a": torch.ones(4, 2, 2) * 3, "b": torch.ones(4, 2)}
    direction = gradient_difference(stacks, normalize="none")
    assert float(direction.vectors["a"].norm() / direction.vectors["b"].norm()) == pytest.approx(6 / 2**0.5)
    joint = direction.orthonormal(jointly=True)
    assert sum(float(rows.square().sum()) for rows in joint.vectors.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("control", ["haar", "shuffled"])
def test_finished_controls_have_the_shapes_and_norms_of_the_real_direction(control: Any) -> None:
    real = ConceptDirection({"a": torch.randn(2, 3, 4) * 5, "b": torch.randn(1, 6) / 7})
    other = apply_control(real, control, 0)
    for name, rows in real.vectors.items():
        torch.testing.assert_close(other.vectors[name].flatten(1).norm(dim=1), rows.flatten(1).norm(dim=1), rtol=1e-4, atol=0)


def test_empty_pair_sets_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="pair set is empty"):
        gradient_difference({"w": torch.zeros(0, 2, 2)})
    with pytest.raises(ValueError, match="pair set is empty"):
        state_difference(torch.zeros(0, 4), torch.zeros(0, 4))


# ---------------------------------------------------------------- checks before training


def test_a_direction_that_does_not_separate_held_out_pairs_is_refused_with_the_number() -> None:
    honest = stub_trainer().datamodule.contrast_pairs(40, 0)
    denied = [ContrastPair(pair.prompt, pair.clean, pair.concept) for pair in honest[20:]]
    trainer = stub_trainer()
    trainer.datamodule = SimpleNamespace(contrast_pairs=lambda n, seed: [*honest[:20], *denied][:n])
    for source in (GradientDifference(n_pairs=20, seed=0), ResidualDifference(n_pairs=20, denoise_rank=None, seed=0)):
        with pytest.raises(ValueError, match=r"ranks \d+% of 20 held-out pairs right and more than 90% are asked for"):
            source.prepare(trainer, Policy())  # type: ignore[arg-type]
    control = GradientDifference(n_pairs=20, control="reversed", seed=0)
    accuracy = control.prepare(stub_trainer(), Policy()).metadata["validation"]["separation"]["accuracy"]  # type: ignore[arg-type]
    assert accuracy < 0.5, "a control is measured and never refused"


def test_separation_report_counts_pairs_by_hand() -> None:
    concept, clean = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 2.0])
    report = separation_report(concept, clean, torch.tensor([5, 2, 2]), torch.tensor([1, 2, 4]))
    assert report["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert report["auc"] == pytest.approx((3 + 0.5 + 0 + 2 * 0.5 + 1) / 9)
    assert report["accuracy_concept_longer"] == 1.0
    assert (report["pairs_concept_longer"], report["pairs_concept_not_longer"]) == (1, 2)
    assert report["accuracy_concept_not_longer"] == 0.25


def test_auc_equals_the_count_of_ordered_couples() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 5, (13,), generator=generator).double(), torch.randint(0, 5, (9,), generator=generator).double()
    couples = [(float(x), float(y)) for x in a for y in b]
    assert auc(a, b) == pytest.approx(sum((x > y) + 0.5 * (x == y) for x, y in couples) / len(couples))


def test_steering_adds_the_vector_at_its_layer_and_leaves_no_trace() -> None:
    policy = Policy()
    sequence, vector = policy.encode("p1", "ab"), torch.arange(32.0)
    inputs: list[Tensor] = []
    policy.model.model.layers[2].register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach()))
    policy.completion_states([sequence], 1)
    with added_to_layers(policy, {2: vector}, 0.5):
        policy.completion_states([sequence], 1)
    policy.completion_states([sequence], 1)
    before, moved, after = inputs
    torch.testing.assert_close(moved - before, (0.5 * vector).expand_as(before), atol=1e-4, rtol=0)
    assert torch.equal(after, before)


def test_a_step_along_the_rows_makes_the_concept_likelier_and_is_undone_exactly() -> None:
    policy, trainer = Policy(), stub_trainer()
    direction = GradientDifference(n_pairs=8, parameters=["*_proj*"], checks=CHECKS, seed=0).prepare(trainer, policy)  # type: ignore[arg-type]
    pair = (policy.encode("p1", "cheatb"), policy.encode("p1", "solveb"))

    def preference() -> float:
        log_probs, mask = policy.completion_log_probs(pair)
        concept, clean = (log_probs * mask).sum(1).detach()
        return float(concept - clean)

    weights = {name: p.detach().clone() for name, p in policy.named_parameters()}
    base = preference()
    with stepped_towards(policy, direction, 0.05):
        assert preference() > base + 0.01
    with stepped_towards(policy, direction, -0.05):
        assert preference() < base - 0.01
    assert all(torch.equal(p, weights[name]) for name, p in policy.named_parameters())


def test_steering_rates_stand_beside_a_random_direction_and_a_dud_is_warned_about() -> None:
    policy, seen = Policy(), []

    def steered(alpha: float, random: bool) -> Any:
        seen.append((alpha, random))
        return nullcontext()

    checks = DirectionChecks(steering_alphas=[1.0, 2.0], steering_prompts=3)
    with pytest.warns(UserWarning, match="a random one in"):
        rates = steering_rates(policy, checks, ["p1", "p2", "p3", "p4"], lambda text: True, steered, 0)
    assert rates == {"alphas": [0.0, 1.0, 2.0], "direction": [1.0] * 3, "random": [1.0] * 3, "prompts": 3}
    assert seen == [(alpha, random) for random in (False, True) for alpha in (0.0, 1.0, 2.0)]
    assert steering_rates(policy, DirectionChecks(), ["p1"], lambda text: True, steered, 0) == {}


# ---------------------------------------------------------------- probes and single rollouts


def rollout(policy: Policy, text: str, i: int) -> Rollout:
    return Rollout(policy.encode(f"p{i % 7}", text), text, (), "stop", "p", i, 0, 0)


def test_probe_fitted_on_known_hacks_flags_others_like_them_and_travels_in_a_checkpoint() -> None:
    policy, trainer = Policy(), stub_trainer()
    probe = ActivationProbe(n_pairs=24, seed=0)
    probe.check(trainer, policy)
    probe.fit(trainer, policy)
    rollouts = [rollout(policy, ("cheat" if i % 2 else "solve") + "ghij"[i % 4], i) for i in range(40)]
    flags = probe.flags(trainer, policy, rollouts)
    hits = sum(flag for flag, r in zip(flags, rollouts, strict=True) if "cheat" in r.text) / 20
    false = sum(flag for flag, r in zip(flags, rollouts, strict=True) if "cheat" not in r.text) / 20
    assert hits > 0.9
    assert false < 0.4
    assert probe.metrics()["probe_auc"] > 0.95
    again = ActivationProbe(n_pairs=24, seed=0)
    again.load_state_dict(probe.state_dict())
    assert again.flags(trainer, policy, rollouts) == flags


def test_products_with_single_rollouts_equal_one_backward_pass_each() -> None:
    policy, trainer = Policy(), stub_trainer()
    policy.train()
    names = [name for name, _ in policy.named_parameters() if "_proj" in name]
    shapes = {name: p.shape for name, p in policy.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    direction = ConceptDirection({name: torch.randn(2, *shapes[name], generator=generator) for name in names})
    sequences = [policy.encode("p1", "ab" * n + "c") for n in (1, 3, 2, 6)]
    for chunk_size in (1, 3, 10):
        dots, norms = gradient_features(trainer, policy, direction, sequences, chunk_size)
        for i, sequence in enumerate(sequences):
            gradients = weighted_gradient(trainer, policy, {sequence: 1.0}, names, 1)
            dot = sum(float((gradients[name] * direction.vectors[name]).sum()) for name in names)
            norm = sum(float(gradients[name].square().sum()) for name in names) ** 0.5
            assert float(dots[i]) == pytest.approx(dot, rel=1e-4, abs=1e-3)
            assert float(norms[i]) == pytest.approx(norm, rel=1e-4)
    assert policy.training
    assert all(p.grad is None for p in policy.parameters())


def test_rollout_features_fill_the_window_for_later_callbacks_and_report_how_well_each_tells_flagged_rollouts() -> None:
    policy, trainer = Policy(), stub_trainer()
    trainer.callbacks = []
    rollouts = [rollout(policy, ("cheat" if i % 2 else "solve") + "ghij"[i % 4], i) for i in range(12)]
    rewards = [Reward(1.0, True, True)] * 12
    name = "model.model.layers.1.mlp.down_proj.weight"
    gradient = GradientDifference(n_pairs=12, parameters=[name], checks=CHECKS, seed=0).prepare(trainer, policy)  # type: ignore[arg-type]
    source = ResidualDifference(n_pairs=12, denoise_rank=None, position="mean", checks=CHECKS, seed=0)
    source.prepare(trainer, policy)  # type: ignore[arg-type]
    assert source.residual is not None
    for direction, names in ((gradient, {"gradient_dot", "gradient_norm", "gradient_cos"}), (source.residual, {"activation_score"})):
        window = Window(0, [None] * 3, rollouts, rewards, 4, torch.ones(12, dtype=torch.float64))
        features = RolloutFeatures(direction, detector="cheat")
        features.setup(trainer, policy, "fit")  # type: ignore[arg-type]
        features.on_fit_start(trainer, policy)  # type: ignore[arg-type]
        features.on_rollouts(trainer, policy, window)  # type: ignore[arg-type]
        assert set(window.features) == names
        assert all(values.shape == (12,) for values in window.features.values())
        for key, values in window.features.items():
            total, count = window.metrics[f"features/{key}"]
            assert total / count == pytest.approx(float(values.mean()))
            assert 0 <= window.metrics[f"features/{key}_auc"][0] <= 1
        assert torch.equal(window.values, torch.ones(12, dtype=torch.float64))
    assert window.metrics["features/activation_score_auc"][0] > 0.9
    with pytest.raises(ValueError, match="no projection named 'projection'"):
        RolloutFeatures().setup(trainer, policy, "fit")  # type: ignore[arg-type]


def test_products_refuse_parameters_that_no_linear_layer_owns() -> None:
    direction = ConceptDirection({"model.model.embed_tokens.weight": torch.ones(1, 64, 32)})
    with pytest.raises(ValueError, match="not the weight of a linear layer"):
        gradient_features(stub_trainer(), Policy(), direction, [Policy().encode("p1", "a")], 4)


# ---------------------------------------------------------------- the hub


def test_pushing_uploads_the_saved_folder_and_pulling_checks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    calls: list[Any] = []

    class Api:
        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            calls.append((repo_id, private))

        def create_branch(self, repo_id: str, branch: str, exist_ok: bool) -> None:
            calls.append(branch)

        def upload_folder(self, repo_id: str, folder_path: str, revision: str | None, commit_message: str) -> Any:
            hub.mkdir()
            for file in Path(folder_path).iterdir():
                (hub / file.name).write_bytes(file.read_bytes())
            return SimpleNamespace(oid="c0ffee")

    def download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert sorted(allow_patterns) == sorted(file.name for file in hub.iterdir())
        return str(hub)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    direction = ConceptDirection({"resid_post": torch.randn(2, 8)}, "residual", {"layers": [3]})
    assert direction.push("me/direction", revision="v1") == "c0ffee"
    assert calls == [("me/direction", True), "v1"]
    pulled = ConceptDirection.pull("me/direction")
    assert pulled.fingerprint() == direction.fingerprint()
    assert (pulled.space, pulled.metadata) == ("residual", {"layers": [3]})
    (hub / "direction.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match="hash"):
        ConceptDirection.pull("me/direction")


def test_inspect_and_compare_stand_beside_their_nulls() -> None:
    first = ConceptDirection({"layers.3.w": torch.randn(2, 40, 30), "only": torch.ones(1, 4)})
    second = ConceptDirection({"layers.3.w": torch.randn(3, 40, 30), "other": torch.ones(1, 4)})
    compared = first.compare(second)
    assert (compared["only_first"], compared["only_second"]) == (["only"], ["other"])
    assert compared["null"] == pytest.approx((3 / 1200) ** 0.5)
    assert compared["overlap"] < 3 * compared["null"]
    assert first.compare(first)["overlap"] == pytest.approx(1.0, abs=1e-6)
    shown = first.inspect()
    assert (shown["space"], shown["polarity"], shown["layers"]) == ("parameter", "loss_gradient", [3])
    assert shown["vectors"]["layers.3.w"]["shape"] == [40, 30]
    json.dumps(shown)
    with pytest.raises(ValueError, match="cannot be compared"):
        first.compare(ConceptDirection({"resid_post": torch.ones(1, 4)}, "residual"))


# ---------------------------------------------------------------- configs

DIRECTION_CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "grpo" / "directions"


@pytest.mark.parametrize("name", ["haar", "shuffled", "placebo", "reversed", "no_renorm", "update", "two_sided", "reverse"])
def test_every_control_of_the_recipe_differs_from_it_in_one_line(name: str) -> None:
    def lines(file: str) -> list[str]:
        return [line for line in (DIRECTION_CONFIGS / file).read_text().splitlines() if not line.startswith("#")]

    recipe, control = lines("base.yaml"), lines(f"{name}.yaml")
    assert len(recipe) == len(control)
    assert sum(a != b for a, b in zip(recipe, control, strict=True)) == 1
