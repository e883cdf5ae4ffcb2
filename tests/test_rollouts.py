"""The decode loop against teacher forcing, against ``generate``, against exact distributions, and against itself in other company."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_policies import ragged, tiny_model, tokenizer

from theodolite.lightning_modules import decoding
from theodolite.lightning_modules.decoding import Sampling, draw, truncate
from theodolite.lightning_modules.policy import add_lora
from theodolite.lightning_modules.prompt_attention import supports_prompt_attention
from theodolite.lightning_modules.rollouts import HFRollout, RolloutEngine, Sample
from theodolite.seeds import derive_seed

END = int(tokenizer().eos_token_id)  # pyright: ignore[reportArgumentType]
PROMPTS = [s.prompt_ids for s in ragged([(n, 1) for n in (5, 9, 1, 12, 3, 7, 15, 2)])]
KINDS = ("qwen3", "llama", "gpt2", "mistral_window", "gemma2_window")


def engine(model: nn.Module, end_ids: tuple[int, ...] = (END,), max_rows: int = 4096) -> HFRollout:
    made = HFRollout(max_rows)
    made.setup(model, end_ids, 0)
    return made


def seeds(prompts: int, group: int) -> list[list[int]]:
    return [[derive_seed("test", p, i) for i in range(group)] for p in range(prompts)]


def plain_log_probs(model: nn.Module, prompt: tuple[int, ...], ids: tuple[int, ...], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].double() / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_sampler_log_probs_equal_a_teacher_forced_forward_pass(kind: str, temperature: float) -> None:
    model = tiny_model(kind)
    groups = engine(model, tuple(range(0, 280, 20))).generate(PROMPTS, Sampling(14, temperature), seeds(8, 3))
    assert {sample.finish for group in groups for sample in group} == {"stop", "length"}
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for sample in group:
            expected = plain_log_probs(model, prompt, sample.ids, temperature)
            torch.testing.assert_close(torch.tensor(sample.log_probs).double(), expected, atol=1e-5, rtol=0)


def test_sample_does_not_depend_on_company_turns_or_group_size() -> None:
    model, sampling, group = tiny_model("qwen3"), Sampling(24), 64
    ends = tuple(range(0, 280, 20))
    together = engine(model, ends).generate(PROMPTS, sampling, seeds(8, group))
    in_turns = engine(model, ends, max_rows=100).generate(PROMPTS, sampling, seeds(8, group))
    backwards = engine(model, ends).generate(PROMPTS[::-1], sampling, [s[::-1] for s in seeds(8, group)[::-1]])
    halves = [engine(model, ends).generate(PROMPTS, sampling, [s[k::2] for s in seeds(8, group)]) for k in (0, 1)]
    alone = [engine(model, ends).generate([p], sampling, [s[:4]])[0] for p, s in zip(PROMPTS, seeds(8, group), strict=True)]
    flat = [sample.ids for samples in together for sample in samples]
    companies = {
        "turns": [sample.ids for samples in in_turns for sample in samples],
        "order": [sample.ids for samples in backwards[::-1] for sample in samples[::-1]],
        "group size": [halves[i % 2][p][i // 2].ids for p in range(8) for i in range(group)],
    }
    for name, ids in companies.items():
        same = sum(a == b for a, b in zip(flat, ids, strict=True))
        print(f"{name}: {same} of {len(flat)} samples identical")
        assert len(flat) >= 500
        assert same >= 0.999 * len(flat), name
    assert [[s.ids for s in samples] for samples in alone] == [[s.ids for s in samples[:4]] for samples in together]
    assert len(set(flat)) > 0.9 * len(flat)


@pytest.mark.parametrize(("kind", "sizes"), [("gpt2", (3,) * 8), ("qwen3", (7, 0, 3, 1, 9, 2, 0, 4)), ("qwen3", (40, 1, 1, 1, 1, 1, 1, 1))])
def test_shared_prompts_and_own_caches_draw_the_same_in_groups_of_any_sizes(kind: str, sizes: tuple[int, ...]) -> None:
    model: Any = tiny_model(kind)
    sampling, ends = Sampling(8), tuple(range(0, 280, 14))
    groups = [[derive_seed("sizes", p, i) for i in range(n)] for p, n in enumerate(sizes)]
    shared, own = engine(model, ends), engine(model, ends)
    own._shares_prompts = False
    found, expected = (made.generate(PROMPTS, sampling, groups) for made in (shared, own))
    assert shared._shares_prompts
    assert [[s.ids for s in group] for group in found] == [[s.ids for s in group] for group in expected]
    for ours, theirs in zip((s for g in found for s in g), (s for g in expected for s in g), strict=True):
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-5)
        assert ours.finish == theirs.finish
    assert model.config._attn_implementation == "sdpa"


def test_only_plain_attention_over_all_tokens_in_full_precision_shares_prompts() -> None:
    for kind in ("qwen3", "llama", "gpt2"):
        assert supports_prompt_attention(tiny_model(kind))
    assert supports_prompt_attention(add_lora(tiny_model("qwen3"), {"r": 2, "target_modules": "all-linear"}, seed=0).eval())
    full: dict[str, Any] = {"layer_types": ["full_attention"] * 2}
    assert not supports_prompt_attention(tiny_model("gemma2_window", **full, attn_logit_softcapping=2.0))
    assert not supports_prompt_attention(tiny_model("mistral_window"))
    assert not supports_prompt_attention(tiny_model("qwen3", dtype="bfloat16"))
    assert not supports_prompt_attention(tiny_model("qwen3", attn_implementation="eager"))
    assert not supports_prompt_attention(nn.Linear(2, 2))


def test_autocast_is_asked_for_at_every_call_and_samples_from_caches_of_each_row() -> None:
    model = tiny_model("qwen3")
    made, own = engine(model), engine(model)
    own._shares_prompts = False
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (one.generate(PROMPTS, Sampling(6), seeds(8, 3)) for one in (made, own))
        assert found == expected
        assert made._shares_prompts is None, "what holds under autocast says nothing of other calls"
    made.generate(PROMPTS, Sampling(2), seeds(8, 1))
    assert made._shares_prompts


@pytest.mark.parametrize("shares", [True, False])
def test_rows_that_have_ended_wait_at_their_last_position_while_others_go_on(shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = tiny_model("gpt2"), Sampling(30)  # a table of 40 positions
    long, short = ragged([(38, 1), (2, 1)])
    prompts, streams = [long.prompt_ids, short.prompt_ids], [[5], [7]]
    (first,) = engine(model, ()).generate(prompts[:1], Sampling(1), streams[:1])[0]
    monkeypatch.setattr(decoding, "CLEAR_OUT", 0.0)  # no row leaves before all have ended
    made = engine(model, first.ids)
    made._shares_prompts = shares
    together = made.generate(prompts, sampling, streams)
    assert together[0][0].ids == first.ids
    assert len(together[1][0].ids) > 4, "the short prompt must go on past the table's end for the long one"
    (alone,) = engine(model, first.ids).generate(prompts[1:], sampling, streams[1:])[0]
    assert together[1][0].ids == alone.ids
    assert together[1][0].log_probs == pytest.approx(alone.log_probs, abs=1e-5)


def test_completion_stops_at_its_first_end_token_or_at_the_limit() -> None:
    ends = tuple(range(0, 280, 20))
    for samples in engine(tiny_model("qwen3"), ends).generate(PROMPTS, Sampling(30), seeds(8, 8)):
        for sample in samples:
            assert len(sample.ids) == len(sample.log_probs) <= 30
            assert not set(sample.ids[:-1]) & set(ends)
            assert (sample.finish == "stop") == (sample.ids[-1] in ends)
            assert sample.finish == "stop" or len(sample.ids) == 30


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_1_equals_greedy_generate(kind: str) -> None:
    model: Any = tiny_model(kind)
    ours = engine(model).generate(PROMPTS, Sampling(16, top_k=1), seeds(8, 1))
    for prompt, (sample,) in zip(PROMPTS, ours, strict=True):
        inputs = torch.tensor([prompt])
        theirs = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=16, do_sample=False, pad_token_id=0)
        assert sample.ids == tuple(theirs[0, len(prompt) :].tolist())


def test_draw_follows_the_softmax_at_its_temperature() -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5)) * 1.5
    uniforms = torch.from_numpy(np.random.default_rng(0).random(40_000))
    tokens, log_probs = draw(logits.expand(40_000, -1), uniforms, Sampling(1, temperature=0.7))
    exact = (logits.double() / 0.7).softmax(0)
    assert chisquare(torch.bincount(tokens, minlength=12).numpy(), (exact * 40_000).numpy()).pvalue > 1e-3
    torch.testing.assert_close(log_probs.double(), exact.log()[tokens], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.8, 0), (1.0, 4), (0.7, 6)])
def test_truncated_frequencies_follow_the_renormalised_nucleus(top_p: float, top_k: int) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5)) * 1.5
    probs = logits.double().softmax(0).numpy()
    order = np.argsort(-probs)[: top_k or 12]
    mass = np.cumsum(probs[order]) / probs[order].sum()
    kept = order[: int(np.searchsorted(mass, top_p) + 1)] if top_p < 1 else order
    exact = np.zeros(12)
    exact[kept] = probs[kept] / probs[kept].sum()
    uniforms = torch.from_numpy(np.random.default_rng(1).random(40_000))
    tokens, log_probs = draw(logits.expand(40_000, -1), uniforms, Sampling(1, top_p=top_p, top_k=top_k))
    counts = torch.bincount(tokens, minlength=12).numpy()
    assert counts[exact == 0].sum() == 0
    assert chisquare(counts[kept], exact[kept] * 40_000).pvalue > 1e-3
    torch.testing.assert_close(log_probs.double(), torch.from_numpy(probs).log()[tokens], atol=1e-5, rtol=0)  # of the untruncated one


def test_extreme_uniforms_never_draw_a_token_of_probability_zero() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(3, -1)
    tokens, _ = draw(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), Sampling(1))
    assert tokens.tolist() == [1, 3, 3]
    assert truncate(torch.tensor([[0.2, 0.5, 0.3]]), 0.5, 0).tolist() == [[0.0, 0.5, 0.0]]


def test_uneven_groups_and_empty_lists_come_back_in_place() -> None:
    model, sampling = tiny_model("qwen3"), Sampling(5)
    uneven = [[1, 2, 3], [], [4], [5, 6]]
    groups = engine(model, max_rows=2).generate(PROMPTS[:4], sampling, uneven)
    assert [len(group) for group in groups] == [3, 0, 1, 2]
    assert groups[3][1].ids == engine(model).generate([PROMPTS[3]], sampling, [[6]])[0][0].ids
    assert engine(model).generate([], sampling, []) == []


def test_sampling_leaves_random_state_modes_and_gradients_alone() -> None:
    model = tiny_model("gpt2")
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.LayerNorm))
    frozen.eval()
    modes = [module.training for module in model.modules()]
    state, samples = torch.get_rng_state(), engine(model).generate(PROMPTS, Sampling(5), seeds(8, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [[s.ids for s in g] for g in samples] == [
        [s.ids for s in g] for g in engine(model.eval()).generate(PROMPTS, Sampling(5), seeds(8, 2))
    ]


def test_samples_carry_the_version_of_the_last_sync() -> None:
    made = engine(tiny_model("qwen3"))
    assert isinstance(made, RolloutEngine)
    made.sync(7)
    assert made.generate(PROMPTS[:1], Sampling(2), [[1]])[0][0].weight_version == 7


def test_misuse_is_one_sentence() -> None:
    with pytest.raises(RuntimeError, match="before setup"):
        HFRollout().generate([[1]], Sampling(2), [[1]])
    with pytest.raises(ValueError, match="each prompt needs one"):
        engine(tiny_model("qwen3")).generate(PROMPTS[:2], Sampling(2), [[1]])
    for wrong in ({"max_new_tokens": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}):
        with pytest.raises(ValueError, match="Cannot sample with"):
            Sampling(**({"max_new_tokens": 4} | wrong))  # pyright: ignore


def test_sample_is_plain_data() -> None:
    sample = engine(tiny_model("qwen3")).generate(PROMPTS[:1], Sampling(3), [[1]])[0][0]
    assert sample == Sample(tuple(map(int, sample.ids)), tuple(map(float, sample.log_probs)), sample.finish, 0)
