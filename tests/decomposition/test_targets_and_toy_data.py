"""Toy data do not depend on ranks, random numbers belong to rows, and a Hugging Face model is a target like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from theodolite.datamodules.toy import ToyDataModule, ToyStream
from theodolite.functional.identity_error import recovery
from theodolite.functional.row_noise import uniform_rows
from theodolite.functional.schedules import schedule_factor
from theodolite.functional.toy_features import induction_answers, induction_tokens
from theodolite.lightning_modules.decomposition.component_model import ComponentModel, ones
from theodolite.lightning_modules.decomposition.decomposition import Decomposition
from theodolite.lightning_modules.decomposition.ground_truth import ComponentRecovery
from theodolite.lightning_modules.decomposition.objectives import StochasticRecon
from theodolite.lightning_modules.decomposition.step import StepBatch
from theodolite.lightning_modules.decomposition.targets.build import build_target


@pytest.mark.parametrize("kind", ["unit", "signed", "induction"])
def test_ranks_share_one_global_batch_and_a_stream_resumes(kind: str) -> None:
    def first(rank: int, ranks: int, state: dict[str, int] | None = None) -> list[Tensor]:
        stream = ToyStream(kind, 6, 8, ("train", 0), rank, ranks)  # pyright: ignore[reportArgumentType]
        if state is not None:
            stream.load_state_dict(state)
        batches = iter(stream)
        return [next(batches) for _ in range(2)]

    whole = first(0, 1)
    for index in range(2):
        assert torch.equal(torch.stack([first(rank, 2)[index] for rank in range(2)], dim=1).flatten(0, 1), whole[index])
    assert torch.equal(first(0, 1, {"given": 1})[0], whole[1])
    assert not torch.equal(whole[0], whole[1])


def test_settings_of_toy_data_that_cannot_work_are_named() -> None:
    with pytest.raises(ValueError, match=r"data\.probability is 0"):
        ToyDataModule(probability=0.0)
    with pytest.raises(ValueError, match="choose unit, signed or induction"):
        ToyDataModule(kind="units")  # pyright: ignore[reportArgumentType]


def test_a_row_has_its_own_random_numbers_in_any_company() -> None:
    for shape in ((3,), (70_000,)):
        alone = [uniform_rows([slot], shape, "seed", 1) for slot in range(7)]
        assert torch.equal(torch.cat(alone), uniform_rows(range(7), shape, "seed", 1))
        assert torch.equal(torch.cat(alone[1::3]), uniform_rows([1, 4], shape, "seed", 1))
        assert not torch.equal(alone[0], alone[1])
    many = uniform_rows(range(60_000), (3,), "seed", 2)
    assert many.mean() == pytest.approx(0.5, abs=0.005)
    assert torch.equal(uniform_rows([59_999], (3,), "seed", 2)[0], many[-1])


def test_the_answer_of_an_induction_sequence_follows_its_first_separator() -> None:
    tokens = induction_tokens(50, 9, 5, torch.Generator().manual_seed(0))
    for row, answer in zip(tokens.tolist(), induction_answers(tokens, 5).tolist(), strict=True):
        assert (row[0], row[-1]) == (6, 5)
        assert answer == row[row.index(5) + 1] < 5


def test_schedules_rise_and_fall_as_described() -> None:
    assert [schedule_factor(step, 11, "linear", final_fraction=0.5) for step in (0, 5, 10)] == pytest.approx([1.0, 0.75, 0.5])
    assert [schedule_factor(step, 12, "constant", warmup_fraction=0.5) for step in (0, 3, 6, 11)] == [0.0, 0.5, 1.0, 1.0]
    assert schedule_factor(5, 11, "cosine") == pytest.approx(0.5)


def test_recovery_is_one_where_components_are_the_weight_s_rows() -> None:
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    cosine, ratio = recovery(weight, torch.eye(4), weight)
    assert torch.allclose(cosine, torch.ones(4))
    assert torch.allclose(ratio, torch.ones(4))
    cosine, _ = recovery(weight.T, weight.T, torch.eye(4), "columns")
    assert torch.allclose(cosine, torch.ones(4))


def test_neurons_are_recovered_by_what_the_features_see_of_them() -> None:
    target = build_target({"kind": "resid_mlp", "n_features": 6, "d_embed": 40, "d_mlp": 4, "n_layers": 1, "steps": 0}, seed=0)
    name = "layers.0.mlp_out"
    parts = Decomposition(ComponentModel(target.module, {name: 5}), {"mode": "layerwise", "fn_type": "mlp", "hidden_dims": [2]})
    components, embedding = parts.model.sites[name].components, target.module.get_buffer("W_E")
    weight = target.module.get_submodule(name).get_parameter("weight").T
    unseen = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    unseen -= unseen @ torch.linalg.pinv(embedding) @ embedding  # nothing of it reaches a feature
    measure = ComponentRecovery(modules={"*.mlp_out": "neurons"}).measure
    with torch.no_grad():
        components.V.copy_(torch.eye(4, 5))
        components.U[:4] = weight
        components.U += 10 * unseen
        found = measure(parts, target)
        assert found == pytest.approx({f"{name}/{key}": 1.0 for key in ("mmcs", "min_cosine", "norm_ratio")}, abs=1e-4)
        components.U.copy_(torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2)))[0] @ components.U)  # mixed
        assert measure(parts, target)[f"{name}/mmcs"] < 0.9
    with pytest.raises(ValueError, match=r"choose rows, columns, or .* features or neurons"):
        ComponentRecovery(modules={"*.mlp_out": "neuron"}).measure(parts, target)


def test_a_hugging_face_model_is_decomposed(tmp_path: Path) -> None:
    settings = GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(settings).save_pretrained(tmp_path)
    target = build_target({"kind": "hf", "model": str(tmp_path)}, seed=0)
    model = ComponentModel(
        target.module, {"transformer.h.*.attn.c_attn": 4, "*.c_fc": 5, "transformer.wte": 3}, output_attr=target.output_attr
    )
    parts = Decomposition(model, {"mode": "layerwise", "fn_type": "mlp", "hidden_dims": [3]}, output_loss="kl")
    parts.initialise(0)
    tokens = torch.randint(0, 13, (4, 8), generator=torch.Generator().manual_seed(0))
    clean = parts.model(tokens)
    assert torch.equal(parts.model(tokens, ones(parts.names, torch.ones(4, 8))).output, clean.output)
    draws = StepBatch([(tokens, range(4))], 4, (0,), 0, 0.0).draws(0, "test")
    total, count = StochasticRecon().sums(parts, parts.look(tokens), draws)
    assert count == 32
    total.backward()
    assert all(p.grad is not None for p in model.component_parameters())
    assert all(p.grad is None for p in target.module.parameters())
