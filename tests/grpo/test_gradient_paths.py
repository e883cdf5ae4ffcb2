"""The split path against the padded one, and the head's own backward pass against autograd."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_fits import fit
from tiny_policies import POLICIES, ragged, tiny_model

from theodolite.functional import head_log_probs as head
from theodolite.lightning_modules.folded_linear import FoldedLinear, folded, folded_layers
from theodolite.lightning_modules.grpo.self_check import check_gradient_path
from theodolite.lightning_modules.policy import add_lora
from theodolite.lightning_modules.scoring import completion_log_probs, pad_sequences
from theodolite.lightning_modules.split_prefix import SplitPrefix, supports_split_prefix, take_apart

SHAPES = [(9, 4), (9, 12), (9, 1), (3, 7), (3, 0), (17, 5), (1, 6), (17, 5), (9, 3)]
# -- the head ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_head_equals_a_plain_log_softmax_in_value_entropy_and_gradient(
    trained_head: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", 5 * 50)  # chunks of five tokens, the last one shorter
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(13, 8, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(50, 8, dtype=torch.float64, generator=generator).requires_grad_(trained_head)
    ids = torch.randint(0, 50, (13,), generator=generator)
    scale = torch.randn(13, dtype=torch.float64, generator=generator)
    wanted = [states, weight] if trained_head else [states]
    plain = (states @ weight.T / temperature).log_softmax(-1)
    expected = plain.gather(1, ids[:, None])[:, 0]
    log_probs, entropies = head.head_log_probs(states, weight, ids, temperature)
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(entropies, -(plain.exp() * plain).sum(-1).detach())
    assert not entropies.requires_grad
    ours, theirs = (torch.autograd.grad((scale * value).sum(), wanted) for value in (log_probs, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_head_without_gradient_keeps_nothing_and_takes_no_tokens_at_all() -> None:
    states, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    with torch.no_grad():
        assert not head.head_log_probs(states, weight, torch.tensor([0, 1, 2]))[0].requires_grad
    none, _ = head.head_log_probs(states[:0], weight, torch.empty(0, dtype=torch.long))
    assert none.shape == (0,)


def test_extreme_logits_neither_overflow_nor_turn_into_nan() -> None:
    states, weight = torch.tensor([[300.0], [-300.0]], requires_grad=True), torch.tensor([[1.0], [-1.0], [0.5]])
    log_probs, entropies = head.head_log_probs(states, weight, torch.tensor([0, 0]))
    assert log_probs.tolist() == pytest.approx([0.0, -600.0])
    assert entropies.abs().max() < 1e-3
    assert torch.autograd.grad(log_probs.sum(), states)[0].isfinite().all()


# -- the split path ------------------------------------------------------------------------------------------------------------------------


def gradient(model: nn.Module, run: Any) -> Tensor:
    model.zero_grad()
    run()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_split_prefix_has_the_padded_path_s_values_and_gradients_in_any_microbatches(kind: str, lora: bool, temperature: float) -> None:
    model = tiny_model(kind).double()
    if lora:
        model = add_lora(model, {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}, seed=0).double().eval()
    assert supports_split_prefix(model)
    sequences = ragged(SHAPES)
    weights = torch.linspace(-1, 2, len(SHAPES) * 12, dtype=torch.float64).view(-1, 12)
    batch = pad_sequences(sequences, 0, "cpu")
    padded = completion_log_probs(model, batch, temperature)
    expected = gradient(model, lambda: (weights * padded).sum().backward())
    backbone = take_apart(model)
    assert backbone is not None
    uneven = [[4, 0], [8, 2, 5], [1], [3, 6, 7]]
    for split, fold in (([list(range(9))], False), (uneven, False), ([[i] for i in range(9)], False), (uneven, lora)):

        def run(split: list[list[int]] = split, fold: bool = fold) -> None:
            prompts = list(dict.fromkeys(s.prompt_ids for s in sequences))
            prefix = SplitPrefix(backbone, prompts, 0, torch.device("cpu"), temperature, fold)
            assert bool(prefix._layers) == (fold and kind != "gpt2")  # its layers are no nn.Linear
            for rows in split:
                log_probs, _, mask = prefix.score([sequences[i] for i in rows])
                torch.testing.assert_close(log_probs, padded[rows, : log_probs.shape[1]].detach())
                assert torch.equal(mask, batch.mask[rows, : mask.shape[1]])
                (weights[rows, : log_probs.shape[1]] * log_probs).sum().backward()
            prefix.finish(lambda scalar: scalar.backward())

        found = gradient(model, run)
        assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert float(expected.norm()) > 0


def test_folded_layers_are_gone_after_every_pass_and_watched_or_switched_off_ones_are_never_replaced() -> None:
    model: Any = add_lora(tiny_model("qwen3"), {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}, seed=0).eval()
    before, ids = dict(model.named_modules()), torch.arange(2, 9)[None]
    expected = model(input_ids=ids).logits
    with folded(folded_layers(model)):
        assert sum(isinstance(module, FoldedLinear) for module in model.modules()) == 4
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=2e-5, rtol=1e-5)
    assert dict(model.named_modules()) == before
    watched = next(module for name, module in before.items() if name.endswith("lora_A.default"))
    handle = watched.register_forward_hook(lambda *_: None)
    assert len(folded_layers(model)) == 3
    handle.remove()
    with model.disable_adapter():
        assert not folded_layers(model)
    assert not folded_layers(add_lora(tiny_model("qwen3"), {"r": 2, "use_dora": True}, seed=0))
    assert not folded_layers(add_lora(tiny_model("qwen3").bfloat16(), {"r": 2}, seed=0).bfloat16())


def test_models_whose_logits_are_more_than_a_head_or_whose_cache_forgets_are_not_split() -> None:
    assert not supports_split_prefix(tiny_model("gemma2_window"))
    full = {"layer_types": ["full_attention"] * 2, "final_logit_softcapping": 30.0}
    assert not supports_split_prefix(tiny_model("gemma2_window", **full))
    assert not supports_split_prefix(tiny_model("mistral_window"))
    assert not supports_split_prefix(nn.Linear(2, 2))
    wrapped = add_lora(tiny_model("qwen3"), {"r": 2, "target_modules": ["lm_head"]}, seed=0)
    assert take_apart(wrapped) is None


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gemma2_window"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_fit_on_the_fast_path_learns_what_the_padded_one_does(tmp_path: Path, kind: str, lora: bool, caplog: Any) -> None:
    adapter = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} if lora else None
    settings: dict[str, Any] = {"policy": POLICIES[kind], "lora": adapter, "lr": 0.1, "max_grad_norm": 0.0}
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fast, trainer = fit(tmp_path, steps=2, split_backward=True, token_budget=40, merge_adapter=lora, **settings)
    slow, plain = fit(tmp_path, steps=2, shared_prefix=False, **settings)
    assert (fast.backbone is None) == (kind == "gemma2_window")
    assert ("not exact for this architecture" in caplog.text) == (kind == "gemma2_window")
    assert fast._checked == (kind != "gemma2_window")
    for name in ("train/loss", "train/reward_mean", "train/completion_tokens"):
        assert float(trainer.logged_metrics[name]) == pytest.approx(float(plain.logged_metrics[name]), abs=1e-6)
    if kind != "gemma2_window":
        exact, estimate = (float(trainer.logged_metrics[f"train/{name}"]) for name in ("entropy", "entropy_estimate"))
        assert exact > 0
        assert math.isfinite(estimate)
    for one, other in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_self_check_passes_once_leaves_no_trace_and_stops_a_run_whose_fast_path_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []

    def noted(*arguments: Any) -> float:
        module = arguments[0]
        before = [p.grad for p in module.trainable_parameters()]
        found.append(check_gradient_path(*arguments))
        assert all(a is p.grad for a, p in zip(before, module.trainable_parameters(), strict=True))
        return found[-1]

    monkeypatch.setattr("theodolite.lightning_modules.grpo.module.check_gradient_path", noted)
    fit(tmp_path, steps=3, split_backward=True)
    assert len(found) == 1
    assert found[0] < 1e-5
    monkeypatch.setattr(SplitPrefix, "finish", lambda self, backward: None)
    with pytest.raises(RuntimeError, match="deviates from the padded one"):
        fit(tmp_path, split_backward=True)
