"""Weights of other libraries, of this one, and between sites: the same function, checked in NumPy float64."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from tiny_language_models import tiny_language_model  # noqa: E402

from theodolite.lightning_modules.transcoder.interop import load_weights, saelens_architecture, save_saelens  # noqa: E402
from theodolite.lightning_modules.transcoder.selection import Moments  # noqa: E402
from theodolite.lightning_modules.transcoder.transcoder import Transcoder  # noqa: E402
from theodolite.lightning_modules.transcoder.weights import (  # noqa: E402
    TENSORS,
    CoderWeights,
    coder_from,
    convert_mlp_input,
    load_own,
    save_weights,
    weights_of,
)
from theodolite.sites import collect_sites, mlp_input_affine, parse_site  # noqa: E402


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weights(m: int = 24, d_in: int = 6, d_out: int = 5, skip: bool = False, **other: Any) -> CoderWeights:
    settings: dict[str, Any] = {"threshold": numbers(m, seed=5).abs()} | other
    tensors = (numbers(m, d_in), numbers(m, seed=1), numbers(m, d_out, seed=2), numbers(d_out, seed=3))
    return CoderWeights(*tensors, numbers(d_out, d_in, seed=4) if skip else None, **settings)


def evaluate(weights: CoderWeights, x: Tensor) -> np.ndarray:
    """The function that weights stand for."""
    w: dict[str, Any] = {name: getattr(weights, name) for name in TENSORS}
    w = {name: None if tensor is None else tensor.double().numpy() for name, tensor in w.items()}
    pre = x.double().numpy() @ w["W_enc"].T + w["b_enc"]
    scores = pre * np.linalg.norm(w["W_dec"], axis=1) if weights.rescaled else pre
    kept = scores > w["threshold"] if weights.k is None else scores >= np.sort(scores, axis=1)[:, [-weights.k]]
    out = np.where(kept, np.maximum(pre, 0), 0) @ w["W_dec"] + w["b_dec"]
    return out if w["W_skip"] is None else out + x.double().numpy() @ w["W_skip"].T


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("decoder_norm", ["unit", "free", "rescaled"])
@pytest.mark.parametrize("skip", [False, True])
def test_units_fold_into_the_weights(activation: Any, decoder_norm: Any, skip: bool) -> None:
    coder = Transcoder(6, 5, 24, 4, activation, [8, 24], skip, decoder_norm, "random", threshold=0.3)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (coder.b_enc, coder.b_dec, *([coder.W_skip] if coder.W_skip is not None else [])):
            parameter.normal_()
        if decoder_norm != "unit":
            coder.W_dec.mul_(torch.rand(24, 1) + 0.5)
    moments = [Moments(9, numbers(d, seed=d).double(), torch.tensor(40.0).double(), torch.tensor(90.0).double()) for d in (6, 5)]
    coder.initialise(moments[0], moments[1], "standardise", centre_bias=False)
    if activation == "batchtopk":
        coder.calibrate(0.4)
    x = 3 * numbers(64, 6, seed=7) + 1
    folded = weights_of(coder)
    assert np.abs(coder(x).numpy() - evaluate(folded, x)).max() < 2e-5
    assert torch.allclose(coder_from(folded)(x), coder(x), atol=2e-5)
    assert torch.allclose(coder_from(folded)(x, prefix=0), coder(x, prefix=0), atol=2e-5)


def test_own_format_gives_back_the_same_bits(tmp_path: Path) -> None:
    weights = random_weights(skip=True, prefixes=(8, 24), input_site="mlp_in.1", target_site="mlp_out.1", model="someone/model")
    save_weights(weights, tmp_path, note="a fact")
    back = load_weights(tmp_path)
    assert back.facts() == weights.facts()
    assert all(torch.equal(getattr(back, name), getattr(weights, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"))
    assert json.loads((tmp_path / "transcoder.json").read_text())["note"] == "a fact"
    (tmp_path / "transcoder.safetensors").write_bytes(b"x" + (tmp_path / "transcoder.safetensors").read_bytes()[1:])
    with pytest.raises(ValueError, match=r"is not the file that transcoder\.json describes"):
        load_own(tmp_path)


def test_sites_before_and_after_the_norms_weight_convert_exactly() -> None:
    """On a real architecture: the converted coder of the other vector says the same."""
    for family in ("gpt2", "gemma2", "llama"):
        model = tiny_language_model(family)
        sites = [parse_site("mlp_in.1"), parse_site("mlp_in_unscaled.1")]
        found = collect_sites(model, sites, input_ids=torch.arange(20)[None] % 60)
        weights = random_weights(d_in=32, skip=True, input_site="mlp_in.1")
        moved = convert_mlp_input(weights, *mlp_input_affine(model, 1), to="mlp_in_unscaled")
        assert moved.input_site == "mlp_in_unscaled.1"
        x, u = (found[site][0].float() for site in sites)
        assert np.abs(evaluate(weights, x) - evaluate(moved, u)).max() < 1e-4, family
        back = convert_mlp_input(moved, *mlp_input_affine(model, 1), to="mlp_in")
        assert torch.allclose(back.W_enc, weights.W_enc, atol=1e-5)
        assert torch.allclose(back.b_enc, weights.b_enc, atol=1e-4)


def test_conversion_refuses_other_sites_and_an_erased_dimension() -> None:
    with pytest.raises(ValueError, match=r"resid_mid\.3 cannot be converted to mlp_in"):
        convert_mlp_input(random_weights(input_site="resid_mid.3"), torch.ones(6), None, "mlp_in")
    with pytest.raises(ValueError, match="has zeros"):
        convert_mlp_input(random_weights(input_site="mlp_in_unscaled.3"), torch.zeros(6), None, "mlp_in")


@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "transcoder", "skip_transcoder", "jumprelu_skip_transcoder"])
def test_saelens_files_are_read_by_their_rules(kind: str, tmp_path: Path) -> None:
    transcoder = "transcoder" in kind
    d_out = 5 if transcoder else 6
    state = {"W_enc": numbers(6, 24), "b_enc": numbers(24, seed=1), "W_dec": numbers(24, d_out, seed=2), "b_dec": numbers(d_out, seed=3)}
    if "jumprelu" in kind:
        state["threshold"] = numbers(24, seed=5).abs()
    if "skip" in kind:
        state["W_skip"] = numbers(d_out, 6, seed=4)
    save_file(state, tmp_path / "sae_weights.safetensors")
    hooks = {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out", "model_name": "m"}
    config: dict[str, Any] = {"architecture": kind, "d_in": 6, "d_sae": 24, "k": 4, "normalize_activations": "none", "metadata": hooks}
    config |= {"rescale_acts_by_decoder_norm": kind == "topk", "apply_b_dec_to_input": not transcoder}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    weights, x = load_weights(tmp_path), numbers(40, 6, seed=8)
    assert (weights.input_site, weights.target_site, weights.model) == ("mlp_in_unscaled.3", "mlp_out.3", "m")
    s = {name: tensor.double().numpy() for name, tensor in state.items()}
    pre = (x.double().numpy() - (0 if transcoder else s["b_dec"])) @ s["W_enc"] + s["b_enc"]
    score = pre * np.linalg.norm(s["W_dec"], axis=1) if kind == "topk" else pre
    kept = score >= np.sort(score, axis=1)[:, [-4]] if kind == "topk" else pre > s.get("threshold", 0)
    expected = (np.maximum(pre, 0) * kept) @ s["W_dec"] + s["b_dec"] + (x.double().numpy() @ s["W_skip"].T if "W_skip" in s else 0)
    assert np.abs(coder_from(weights)(x).numpy() - expected).max() < 2e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gated"}, "architecture 'gated'"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations 'expected_average_only_in'"),
    ],
)
def test_saelens_files_that_need_more_than_weights_are_refused(change: dict[str, str], message: str, tmp_path: Path) -> None:
    save_file({"W_enc": torch.zeros(1)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "standard"} | change))
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path)


def test_a_folder_without_a_coder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no coder"):
        load_weights(tmp_path)


def test_what_saelens_cannot_say_is_refused_and_the_rest_survives_the_round_trip(tmp_path: Path) -> None:
    sites: dict[str, Any] = {"input_site": "mlp_in.2", "target_site": "mlp_out.2", "model": "m"}
    with pytest.raises(ValueError, match="no TopK transcoder"):
        save_saelens(random_weights(threshold=None, k=4, **sites), tmp_path)
    x = numbers(30, 6, seed=9)
    same: dict[str, Any] = {"input_site": "resid_post.2", "target_site": "resid_post.2"}
    cases = {
        "topk": random_weights(d_out=6, threshold=None, k=4, rescaled=True, **same),
        "jumprelu": random_weights(d_out=6, **same),
        "jumprelu_transcoder": random_weights(rescaled=True, **sites),
        "jumprelu_skip_transcoder": random_weights(skip=True, **sites),
    }
    for kind, weights in cases.items():
        assert saelens_architecture(weights) == kind
        save_saelens(weights, tmp_path / kind)
        back = load_weights(tmp_path / kind)
        assert np.abs(evaluate(back, x) - evaluate(weights, x)).max() < 1e-5
        assert (back.input_site, back.target_site) == (weights.input_site, weights.target_site)
    untouched = replace(cases["jumprelu_transcoder"], rescaled=False)
    assert torch.equal(cases["jumprelu_transcoder"].W_enc, untouched.W_enc)
