"""Activation sites against the models' own arithmetic."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_language_models import FAMILIES, tiny_config, token_rows
from tiny_language_models import tiny_language_model as fresh_model
from torch import Tensor, nn
from transformers import OPTConfig

from theodolite.site_checks import check_sites
from theodolite.site_tables import LAYOUTS, SITES, SiteName
from theodolite.sites import (
    ActivationSite,
    capture_sites,
    collect_sites,
    find_blocks,
    mlp_input_affine,
    model_size,
    parse_site,
    replace_sites,
    sparsify_sites,
)

ALL = [*FAMILIES, "gemma3"]
DTYPES = [torch.float32, torch.bfloat16]
LAYER = 1
tiny_language_model = functools.lru_cache(fresh_model)  # no test changes a model


def everything(model: nn.Module) -> dict[SiteName, Tensor]:
    sites = [ActivationSite(LAYER, name) for name in SITES]
    return {site.name: value for site, value in collect_sites(model, sites, input_ids=token_rows(), use_cache=False).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ALL)
def test_captured_sites_satisfy_the_blocks_equations_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny_language_model(family, dtype)
    found = everything(model)
    blocks = find_blocks(model)
    mlp: Any = blocks.modules[LAYER].get_submodule("mlp")
    norm, _ = blocks.point(ActivationSite(LAYER, "resid_mid"))
    with torch.no_grad():
        assert torch.equal(mlp(found["mlp_in"]), found["mlp_out_raw"])
        assert torch.equal(norm(found["resid_mid"]), found["mlp_in"])
        assert torch.equal(found["resid_mid"] + found["mlp_out"], found["resid_post"])
        assert torch.equal(found["resid_pre"] + found["attn_out"], found["resid_mid"])
        if "gemma2" in family or "gemma3" in family:
            after: Any = blocks.modules[LAYER].get_submodule("post_feedforward_layernorm")
            assert torch.equal(after(found["mlp_out_raw"]), found["mlp_out"])
            assert not torch.equal(found["mlp_out_raw"], found["mlp_out"])
        else:
            assert torch.equal(found["mlp_out_raw"], found["mlp_out"])
    assert all(value.shape == (3, 9, 32) and value.dtype == dtype for value in found.values())


@pytest.mark.parametrize("family", ALL)
def test_mlp_in_is_the_unscaled_site_times_the_norms_own_scale_plus_its_shift(family: str) -> None:
    model = tiny_language_model(family)
    found = everything(model)
    scale, shift = mlp_input_affine(model, LAYER)
    rebuilt = found["mlp_in_unscaled"] * scale + (0.0 if shift is None else shift)
    torch.testing.assert_close(rebuilt, found["mlp_in"], rtol=2e-6, atol=2e-6)
    assert (shift is not None) == (family == "gpt2")
    x = found["resid_mid"].double().numpy()
    centred = x - x.mean(-1, keepdims=True) if family == "gpt2" else x
    expected = centred / ((centred**2).mean(-1, keepdims=True) + 1e-6) ** 0.5
    torch.testing.assert_close(found["mlp_in_unscaled"].double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_the_check_of_a_model_finds_sound_sites_sound_and_a_wrong_scale_wrong(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_model(family, torch.bfloat16)
    found = check_sites(model, LAYER, input_ids=token_rows(), use_cache=False)
    *exact, rounded = found.values()
    assert exact == [0.0] * 4
    assert 0 < rounded < 0.02
    layout = LAYOUTS["gpt2" if family == "gpt2" else "gemma3_text"]
    wrong = dataclasses.replace(layout, unit_offset=not layout.unit_offset)
    monkeypatch.setitem(LAYOUTS, "gpt2" if family == "gpt2" else "gemma3_text", wrong)
    assert list(check_sites(model, LAYER, input_ids=token_rows(), use_cache=False).values())[-1] > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gemma3"])
def test_the_pass_stops_behind_the_last_site_and_leaves_no_hook(family: str) -> None:
    model = tiny_language_model(family)
    reached = []
    handle = find_blocks(model).modules[2].register_forward_hook(lambda *_: reached.append(True))
    early = collect_sites(model, [ActivationSite(1, "mlp_out"), ActivationSite(0, "resid_pre")], input_ids=token_rows())
    assert not reached
    with capture_sites(model, [ActivationSite(1, "mlp_out")]) as whole:
        model(input_ids=token_rows())
    assert reached
    assert torch.equal(early[ActivationSite(1, "mlp_out")], whole[ActivationSite(1, "mlp_out")])
    handle.remove()
    assert not any(part._forward_hooks or part._forward_pre_hooks for block in find_blocks(model).modules for part in block.modules())
    assert not next(iter(early.values())).requires_grad
    assert next(iter(whole.values())).requires_grad


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("name", [name for name in SITES if name != "resid_mid"])
def test_a_replacement_reaches_what_comes_after_the_site(family: str, name: SiteName) -> None:
    model, site = tiny_language_model(family), ActivationSite(LAYER, name)
    ids = token_rows()
    with torch.no_grad():
        plain = model(ids).logits
        with replace_sites(model, {site: lambda x: x}):
            same = model(ids).logits
        with replace_sites(model, {site: torch.zeros_like}), capture_sites(model, [ActivationSite(LAYER, "resid_post")]) as after:
            model(ids)
    torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-5)
    found = everything(model)
    blocks = find_blocks(model).modules
    resid_post = after[ActivationSite(LAYER, "resid_post")]
    if name in ("mlp_out_raw", "mlp_out"):
        assert torch.equal(resid_post, found["resid_mid"])
    elif name == "mlp_in":
        with torch.no_grad():
            mlp: Any = blocks[LAYER].get_submodule("mlp")
            out = mlp(torch.zeros_like(found["mlp_in"]))
            out = blocks[LAYER].get_submodule("post_feedforward_layernorm")(out) if family == "gemma2" else out
        assert torch.equal(resid_post, found["resid_mid"] + out)
    elif name == "resid_post":
        assert not resid_post.any()
    else:
        assert not torch.allclose(resid_post, found["resid_post"])


@pytest.mark.parametrize(
    ("foreign", "own"),
    [
        ("blocks.8.hook_resid_pre", "resid_pre.8"),
        ("blocks.8.hook_resid_mid", "resid_mid.8"),
        ("blocks.8.hook_mlp_in", "resid_mid.8"),
        ("blocks.8.ln2.hook_normalized", "mlp_in_unscaled.8"),
        ("blocks.8.ln2.hook_normalized * ln2.w", "mlp_in.8"),
        ("blocks.8.hook_mlp_out", "mlp_out.8"),
        ("blocks.8.hook_attn_out", "attn_out.8"),
        ("blocks.12.hook_resid_post", "resid_post.12"),
        ("mlp_out_raw.3", "mlp_out_raw.3"),
    ],
)
def test_foreign_names_are_mapped(foreign: str, own: str) -> None:
    assert str(parse_site(foreign)) == own
    assert parse_site(parse_site(foreign)) == parse_site(own)


@pytest.mark.parametrize("name", ["mlp_in", "mlp.8", "blocks.8.hook_z", "mlp_in.-1", "blocks.8.ln2.hook_scale"])
def test_an_unknown_site_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="mlp_in_unscaled"):
        parse_site(name)


def test_sparsify_hookpoints_become_pairs_of_sites() -> None:
    assert [str(site) for site in sparsify_sites("layers.4.mlp", transcode=True)] == ["mlp_in.4", "mlp_out_raw.4"]
    assert [str(site) for site in sparsify_sites("transformer.h.4.mlp", transcode=False)] == ["mlp_out_raw.4", "mlp_out_raw.4"]
    assert [str(site) for site in sparsify_sites("layers.0", transcode=False)] == ["resid_post.0", "resid_post.0"]
    with pytest.raises(ValueError, match="neither a decoder block"):
        sparsify_sites("layers.4.self_attn", transcode=False)


@pytest.mark.parametrize("family", ALL)
def test_width_and_depth_come_from_the_config(family: str) -> None:
    size = model_size(tiny_config(family))
    assert (size.width, size.layers) == (32, 3)


def test_unknown_models_layers_and_replacements_are_refused() -> None:
    model = tiny_language_model("llama")
    with pytest.raises(ValueError, match="layers 0 to 2"):
        collect_sites(model, [parse_site("mlp_in.3")], input_ids=token_rows())
    with pytest.raises(ValueError, match="resid_mid"), replace_sites(model, {parse_site("resid_mid.1"): lambda x: x}):
        pass
    with pytest.raises(ValueError, match="holds no transformers model"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'opt'"):
        model_size(OPTConfig())
    with pytest.raises(ValueError, match="pass the model itself"):
        find_blocks(nn.ModuleList([model, fresh_model("llama")]))


def test_blocks_are_found_inside_a_larger_module_and_named() -> None:
    wrapped = nn.ModuleDict({"policy": tiny_language_model("gemma3")})
    assert find_blocks(wrapped).module_name(parse_site("mlp_out.2")) == (
        "policy.model.language_model.layers.2.post_feedforward_layernorm output"
    )
    assert find_blocks(tiny_language_model("gpt2")).module_name(parse_site("resid_pre.0")) == "transformer.h.0 input"
