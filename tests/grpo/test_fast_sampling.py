"""Drawing from large vocabularies and with a merged adapter: the same tokens as the plain way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_policies import POLICIES, tiny_model, tokenizer

from theodolite.lightning_modules import GRPOModule, decoding
from theodolite.lightning_modules.decoding import Sampling, draw
from theodolite.lightning_modules.merged_adapter import merged_adapter
from theodolite.lightning_modules.policy import add_lora
from theodolite.lightning_modules.rollouts import HFRollout

LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.mark.parametrize("vocabulary", [1024, 1000, 256, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_drawing_by_block_finds_the_plain_draw_s_tokens(vocabulary: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, vocabulary, generator=generator)
    logits[:, ::3] = -torch.inf
    uniforms = torch.rand(2000, dtype=torch.float64, generator=generator)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    plain, expected = draw(logits, uniforms, Sampling(1, temperature))
    monkeypatch.setattr(decoding, "LARGE_VOCABULARY", 1)
    tokens, log_probs = draw(logits, uniforms, Sampling(1, temperature))
    same = tokens == plain
    assert float(same.float().mean()) > 0.998, "only a uniform number within 1e-7 of a boundary may fall on its other side"
    torch.testing.assert_close(log_probs[same], expected[same], atol=2e-6, rtol=0)
    assert log_probs.isfinite().all(), "a token of probability 0 was drawn"


def test_merged_adapter_computes_the_same_policy_and_leaves_the_very_same_tensors() -> None:
    for kind in ("qwen3", "gpt2"):
        model = add_lora(tiny_model(kind), LORA, seed=0).eval()
        ids = torch.arange(2, 12)[None]
        expected = model(input_ids=ids).logits
        before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
        with merged_adapter(model), torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=2e-5, rtol=1e-5)
        for name, p in model.named_parameters():
            assert p.data_ptr() == before[name][0]
            assert torch.equal(p, before[name][1])
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_rollouts_with_a_merged_adapter_are_those_without() -> None:
    model = add_lora(tiny_model("qwen3"), LORA, seed=0).eval()
    found = []
    for merge in (False, True):
        engine = HFRollout(merge_adapter=merge)
        engine.setup(model, [int(tokenizer().eos_token_id)], 0)  # pyright: ignore[reportArgumentType]
        found.append(engine.generate([(5, 6, 7), (8, 9)], Sampling(8), [[1, 2, 3], [4]]))
    plain, merged = ([sample for group in groups for sample in group] for groups in found)
    assert [sample.ids for sample in plain] == [sample.ids for sample in merged]
    for one, other in zip(plain, merged, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_merging_is_refused_where_it_would_round() -> None:
    with pytest.raises(ValueError, match="rounds the merged weights"):
        GRPOModule(policy=POLICIES["qwen3"], train_tokenizer={"vocab_size": 280}, dtype="bfloat16", merge_adapter=True)
