"""TransformerLens' own activations beside the sites that its names are mapped to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_language_models import tiny_language_model, token_rows

from theodolite.sites import collect_sites, parse_site

HOOKS = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_in", "ln2.hook_normalized", "hook_mlp_out", "hook_resid_post")


@pytest.mark.peers
def test_gemma_2_in_transformer_lens_has_the_same_activations_under_its_own_names() -> None:
    lens: Any = pytest.importorskip("transformer_lens")
    conversions: Any = pytest.importorskip("transformer_lens.pretrained.weight_conversions")
    model: Any = tiny_language_model("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=8)
    config = lens.HookedTransformerConfig(
        n_layers=3, d_model=32, n_ctx=64, d_head=8, n_heads=4, n_key_value_heads=2, d_mlp=48, d_vocab=64, act_fn="gelu_pytorch_tanh",
        normalization_type="RMS", eps=1e-6, positional_embedding_type="rotary", rotary_dim=8, rotary_base=10000, gated_mlp=True,
        final_rms=True, use_normalization_before_and_after=True, use_attn_scale=True, attn_scale=8**0.5, initializer_range=0.02,
        original_architecture="Gemma2ForCausalLM", use_hook_mlp_in=True,
    )  # fmt: skip
    theirs = lens.HookedTransformer(config)
    theirs.load_state_dict(conversions.convert_gemma_weights(model, config), strict=False)
    ids = token_rows(2, 7)
    logits, cache = theirs.run_with_cache(ids)
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    values = {name: cache[f"blocks.1.{name}"] for name in HOOKS}
    values["hook_mlp_in"] = values["hook_mlp_in"].reshape(2, 7, 32)
    values["ln2.hook_normalized*ln2.w"] = values["ln2.hook_normalized"] * theirs.blocks[1].ln2.w
    for name, value in values.items():
        site = parse_site(f"blocks.1.{name}")
        ours = collect_sites(model, [site], input_ids=ids)[site]
        assert float((ours - value).abs().max() / ours.abs().max()) < 2e-6, name
