"""Training on features with known ground truth: nesting, recovery, thresholds, norms, and what evaluation must not touch."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_features import FeatureData, feature_pairs

from theodolite.functional.fvu import fraction_of_variance_unexplained
from theodolite.lightning_modules.transcoder import Transcoder, TranscoderModule
from theodolite.lightning_modules.transcoder.selection import global_batch_topk, global_moments
from theodolite.lightning_modules.transcoder.training import LossSettings, training_loss
from theodolite.lightning_modules.transcoder.weights import load_own


def trainer(folder: Path, steps: int, **other: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"num_sanity_val_steps": 0, "limit_val_batches": 0, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1}
    return Trainer(max_steps=steps, max_epochs=-1, default_root_dir=folder, **(quiet | other))


def module(**settings: Any) -> TranscoderModule:
    defaults: dict[str, Any] = {"latents": 24, "k": 3, "lr": 3e-3, "warmup_steps": 5, "dead_after_tokens": 2560, "seed": 0, "export": False}
    return TranscoderModule(**(defaults | settings))


def settings(prefixes: int = 1, **other: Any) -> LossSettings:
    values: dict[str, Any] = {
        "weights": torch.full((prefixes,), 1 / prefixes),
        "auxiliary": 0.0,
        "auxiliary_k": 4,
        "auxiliary_levels": True,
    }
    return LossSettings(**(values | {"dead_after_tokens": 100, "l0_coefficient": 0.0, "width": 0.1} | other))


def gradients(coder: Transcoder, inputs: Tensor, target: Tensor, chosen: LossSettings) -> dict[str, Tensor]:
    coder.zero_grad()
    training_loss(coder, inputs, target, global_moments(target), chosen).loss.backward()
    return {name: p.grad.clone() for name, p in coder.named_parameters() if p.grad is not None}


def coder_and_pairs(**other: Any) -> tuple[Transcoder, Tensor, Tensor]:
    coder = Transcoder(16, 12, 24, 3, **({"init": "random", "prefixes": [4, 12, 24]} | other))
    inputs, target, _, _ = feature_pairs(64, 12, 16, 12, seed=3)
    return coder, inputs, target


def test_nested_loss_reaches_the_decoder_and_plain_batchtopk_does_not() -> None:
    """The control: the same coder and batch with all weight on the last prefix."""
    coder, inputs, target = coder_and_pairs()
    plain = gradients(coder, inputs, target, settings(3, weights=torch.tensor([0.0, 0.0, 1.0])))["W_dec"]
    nested = gradients(coder, inputs, target, settings(3))["W_dec"]
    one = gradients(Transcoder(16, 12, 24, 3, init="random"), inputs, target, settings(1))["W_dec"]
    assert torch.allclose(plain, one, atol=1e-7)
    assert (nested - plain).norm() > 0.1 * plain.norm()
    first = gradients(coder, inputs, target, settings(3, weights=torch.tensor([1.0, 0.0, 0.0])))["W_dec"]
    assert first[:4].any()
    assert not first[4:].any(), "the first prefix's loss must not touch later blocks"


def test_gradients_are_those_of_a_dense_float64_coder() -> None:
    coder, inputs, target = coder_and_pairs(skip=True)
    ours = gradients(coder, inputs, target, settings(3))
    p = {name: value.detach().double().requires_grad_() for name, value in coder.named_parameters()}
    x, y = inputs.double(), target.double()
    z = x @ p["W_enc"].t() + p["b_enc"]
    kept = z >= z.flatten().sort(descending=True).values[3 * 64 - 1]
    a = torch.where(kept, z.relu(), 0)
    losses = [(a[:, :e] @ p["W_dec"][:e] + p["b_dec"] + x @ p["W_skip"].t() - y).square().sum() for e in (4, 12, 24)]
    loss = torch.stack(losses).mean() / (y - y.mean(0)).square().sum()
    for name, expected in zip(p, torch.autograd.grad(loss, list(p.values())), strict=True):
        assert torch.allclose(ours[name].double(), expected, atol=1e-6), name


def test_dead_latents_learn_the_residual_and_nothing_else_feels_it() -> None:
    coder, inputs, target = coder_and_pairs()
    coder.b_enc.data[20:] = -10.0  # never selected
    without = gradients(coder, inputs, target, settings(3))
    coder.tokens_since_active[20:] = 1000
    for levels in (False, True):
        with_aux = gradients(coder, inputs, target, settings(3, auxiliary=1.0, auxiliary_levels=levels))
        assert not without["W_enc"][20:].any()
        assert with_aux["W_enc"][20:].abs().sum() > 0
        assert all(torch.equal(with_aux[name][:20], without[name][:20]) for name in ("W_enc", "b_enc", "W_dec"))
        assert torch.equal(with_aux["b_dec"], without["b_dec"])


def test_batchtopk_keeps_k_per_token_on_average_over_the_batch() -> None:
    scores = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 1, 50)[:, None]
    codes, threshold = global_batch_topk(scores, 50 * 5)
    expected = scores >= scores.flatten().sort(descending=True).values[249]
    assert torch.equal(codes.dense() > 0, expected)
    assert float(threshold) == float(scores[expected].min())
    assert len(set(expected.sum(1).tolist())) > 3, "tokens differ in how many latents they get"
    few, none = global_batch_topk(-scores.abs(), 50)
    assert (len(few.values), float(none)) == (0, 0.0)


@pytest.mark.parametrize("d_out", [20, pytest.param(None, marks=pytest.mark.slow)])
def test_known_features_are_recovered_and_prefixes_nest(d_out: int | None, tmp_path: Path) -> None:
    data = FeatureData(tokens=16384, features=16, d_in=32, d_out=d_out, global_batch_size=256)
    coder_module = module(latents=24, k=2, prefixes=[6, 12, 24], lr=5e-3, schedule="linear", min_lr_fraction=0.02)
    trainer(tmp_path, 450).fit(coder_module, data)
    coder = coder_module.coder
    _, _, inputs_truth, targets_truth = feature_pairs(1, 16, 32, d_out or 32, seed=1)
    truth = inputs_truth if d_out is None else targets_truth
    cosine = (truth @ coder.W_dec.detach().t()).max(dim=1).values
    assert cosine.mean() > 0.9, cosine
    inputs, target, _, _ = feature_pairs(2048, 16, 32, d_out or 32, seed=5)
    target = inputs if d_out is None else target
    fvu = fraction_of_variance_unexplained(target, coder.reconstructions(inputs, coder.encode(inputs)))
    assert fvu[0] > fvu[1] > fvu[2]
    assert fvu[2] < 0.15
    assert (coder.W_dec.norm(dim=1) - 1).abs().max() < 1e-6
    l0 = coder.encode(inputs).active.sum() / len(inputs)
    assert abs(float(l0) - 2) < 0.1, "calibrated on held-out tokens"


def test_running_threshold_gives_the_trained_l0_before_any_calibration(tmp_path: Path) -> None:
    """A mean that starts at zero would be at 14 % of its value here."""
    data = FeatureData(tokens=8192, global_batch_size=256)
    coder_module = module(threshold_decay=0.999, calibrate=False)
    trainer(tmp_path, 150).fit(coder_module, data)
    inputs = data.parts[1].inputs
    assert not coder_module.coder.calibrated
    assert abs(float(coder_module.coder.encode(inputs).active.sum()) / len(inputs) - 3) < 0.4


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_other_activations_learn_too(activation: str, tmp_path: Path) -> None:
    coder_module = module(activation=activation, jumprelu_threshold=0.1, jumprelu_width=0.1, l0_coefficient=0.01, l0_warmup_steps=20)
    run = trainer(tmp_path, 80)
    run.fit(coder_module, FeatureData(global_batch_size=128))
    assert float(run.callback_metrics["train/fvu"]) < 0.6
    assert float(run.callback_metrics["train/l0"]) < 12


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_mixed_precision_keeps_float32_weights_and_learns(activation: str, tmp_path: Path) -> None:
    coder_module = module(activation=activation, prefixes=[8, 24], jumprelu_threshold=0.1, jumprelu_width=0.1, auxiliary=0.5)
    run = trainer(tmp_path, 40, precision="bf16-mixed")
    run.fit(coder_module, FeatureData(global_batch_size=128, d_out=12))
    assert all(p.dtype == torch.float32 for p in coder_module.parameters())
    assert float(run.callback_metrics["train/fvu"]) < 0.9
    assert not coder_module.coder.W_enc.isnan().any()


def test_a_loaded_coder_can_be_trained_on(tmp_path: Path) -> None:
    data, first = FeatureData(d_out=12), module(export=True)
    trainer(tmp_path, 30).fit(first, data)
    again = module(pretrained=str(tmp_path / "transcoder"), warmup_steps=0)
    run = trainer(tmp_path, 30)
    run.fit(again, data)
    assert again.coder.activation == "jumprelu", "a coder with a threshold"
    assert not again.coder.calibrated
    assert float(run.callback_metrics["train/fvu"]) < 0.6


def test_decoder_norms_and_initialisations_are_what_they_say() -> None:
    tied = Transcoder(16, 16, 24, 3, init="tied")
    assert torch.equal(tied.W_enc, tied.W_dec)
    assert torch.equal(tied.W_enc, Transcoder(16, 16, 24, 3, init="tied").W_enc)
    assert not torch.equal(tied.W_enc, Transcoder(16, 16, 24, 3, init="tied", seed=1).W_enc)
    assert not Transcoder(16, 12, 24, 3, init="zeros", decoder_norm="free").W_dec.any()
    coder, inputs, target = coder_and_pairs(decoder_norm="unit")
    gradients(coder, inputs, target, settings(3))
    coder.project_decoder_gradient()
    assert coder.W_dec.grad is not None
    assert ((coder.W_dec.grad * coder.W_dec).sum(dim=1)).abs().max() < 1e-6
    scaled = Transcoder(16, 12, 24, 3, "topk", init="random", decoder_norm="rescaled")
    with torch.no_grad():
        scaled.W_dec[7] *= 100
    codes = scaled.encode(inputs)
    with_seven = (scaled.scores(inputs)[:, 7] > 0).sum()
    assert int((codes.latents[codes.active] == 7).sum()) == int(with_seven), "a long decoder row is chosen wherever it is positive"


def test_learning_rate_follows_the_rule_where_none_is_given() -> None:
    for latents, lr in ((2**14, 2e-4), (2**16, 1e-4)):
        coder_module = TranscoderModule(latents=latents, k=2, d_in=2, d_out=2)
        coder_module.configure_model()
        assert math.isclose(coder_module.lr or 0, lr)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation": "gated"}, "activation is 'gated'"),
        ({"k": 99}, "k is 99"),
        ({"init": "tied", "d_out": 3}, "init is tied, but the input is 16 wide and the target 3"),
        ({"init": "zeros"}, "init is zeros"),
        ({"prefixes": [4, 8]}, "must increase to the 24 latents"),
        ({"prefixes": [4, 24], "prefix_weights": [1.0]}, "give 2 weights"),
        ({"schedule": "step"}, "model.schedule is 'step'"),
        ({"d_in": None}, "does not say its input_width"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**({"d_in": 16, "d_out": 16} | wrong)).configure_model()


def test_weights_in_bfloat16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bf16-mixed"):
        trainer(tmp_path, 1, precision="bf16-true").fit(module(), FeatureData())


def test_evaluation_leaves_no_trace_and_is_the_definition(tmp_path: Path) -> None:
    data, coder_module = FeatureData(), module(prefixes=[8, 24])
    trainer(tmp_path, 20).fit(coder_module, data)
    before = {name: value.clone() for name, value in coder_module.state_dict().items()}
    random_state = torch.get_rng_state()
    logged = trainer(tmp_path, 1, limit_val_batches=1.0).validate(coder_module, data, verbose=False)[0]
    assert all(torch.equal(before[name], value) for name, value in coder_module.state_dict().items() if not value.isnan().any())
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(p.grad is None for p in coder_module.parameters()) or not coder_module.training
    inputs, coder = data.parts[1].inputs, coder_module.coder
    codes = coder.encode(inputs)
    fvu = fraction_of_variance_unexplained(inputs, coder.reconstructions(inputs, codes))
    assert math.isclose(logged["val/fvu_8"], float(fvu[0]), rel_tol=1e-6)
    assert math.isclose(logged["val/fvu"], float(fvu[1]), rel_tol=1e-6)
    assert math.isclose(logged["val/l0"], float(codes.active.sum()) / len(inputs), rel_tol=1e-6)
    assert math.isclose(logged["val/dead_fraction"], float((codes.counts() == 0).double().mean()), abs_tol=1e-7)


def test_units_do_not_change_what_is_learnt(tmp_path: Path) -> None:
    """Activations a thousand times smaller, with other units for the target: the same coder in its own units."""
    found = []
    for scale in (1.0, 1e-3):
        data = FeatureData(d_out=12)
        for part in data.parts:
            part.inputs, part.target = part.inputs * scale, part.target * 7 * scale
        coder_module = module(normalise="standardise")
        trainer(tmp_path, 30).fit(coder_module, data)
        found.append(coder_module.coder.W_enc.detach().clone())
    assert torch.allclose(*found, atol=1e-4)


def test_export_is_read_back_and_reconstructs_the_same(tmp_path: Path) -> None:
    data, coder_module = FeatureData(d_out=12), module(export=True, prefixes=[8, 24], normalise="standardise")
    data.input_site, data.target_site = "mlp_in.3", "mlp_out.3"  # type: ignore[attr-defined]
    trainer(tmp_path, 30).fit(coder_module, data)
    weights = load_own(tmp_path / "transcoder")
    assert (weights.input_site, weights.target_site, weights.prefixes) == ("mlp_in.3", "mlp_out.3", (8, 24))
    again = TranscoderModule(pretrained=str(tmp_path / "transcoder"))
    again.configure_model()
    inputs = data.parts[1].inputs
    assert torch.allclose(again(inputs), coder_module(inputs), atol=1e-5)
    assert (tmp_path / "transcoder" / "saelens" / "cfg.json").is_file()
    for name in ("input_site", "target_site"):
        setattr(data, name, "resid_mid.3")
    with pytest.raises(ValueError, match=r"has the input_site mlp_in\.3, but the data has resid_mid\.3"):
        trainer(tmp_path, 1, limit_val_batches=1.0).validate(TranscoderModule(pretrained=str(tmp_path / "transcoder")), data)
