"""Layers computed once more going backwards: the same gradients for less memory, and nothing else of a run is touched."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_fits import Gradients, deviation, fit
from tiny_policies import ragged, tiny_model

from theodolite.lightning_modules import policy
from theodolite.lightning_modules.policy import add_lora, check_attention, load_policy
from theodolite.lightning_modules.recomputation import recomputing
from theodolite.lightning_modules.scoring import completion_log_probs, pad_sequences

LORA: dict[str, Any] = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}


def gradients_and_bytes_kept(model: torch.nn.Module, recompute: bool) -> tuple[list[torch.Tensor], int]:
    model.zero_grad()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = pad_sequences(ragged([(9, 4), (9, 12), (3, 7), (17, 5)]), 0, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if recompute:
            with recomputing(model):
                log_probs = completion_log_probs(model, batch)
        else:
            log_probs = completion_log_probs(model, batch)
    held = sum(kept.values())
    log_probs.square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], held


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gemma2_window"])
@pytest.mark.parametrize("lora", [False, True])
def test_recomputed_layers_give_the_same_gradients_and_keep_less(kind: str, lora: bool) -> None:
    model = tiny_model(kind).eval()
    if lora:
        model = add_lora(model, LORA, seed=0).eval()
    modes = {name: module.training for name, module in model.named_modules()}
    plain, all_of_it = gradients_and_bytes_kept(model, False)
    ours, little = gradients_and_bytes_kept(model, True)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert little < all_of_it / 2
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert gradients_and_bytes_kept(model, False)[1] == all_of_it  # and afterwards nothing is recomputed


def test_a_model_in_training_mode_recomputes_under_the_same_dropout() -> None:
    model = add_lora(tiny_model("qwen3"), LORA | {"lora_dropout": 0.3}, seed=0).train()
    found = []
    for recompute in (False, True):
        torch.manual_seed(1)
        found.append(gradients_and_bytes_kept(model, recompute)[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("extra", [{}, {"split_backward": True}, {"beta": 0.1, "lora": LORA, "updates_per_window": 2}])
def test_a_fit_with_gradient_checkpointing_has_the_gradients_of_one_without(extra: dict[str, Any], tmp_path: Path) -> None:
    seen = []
    for name, on in (("without", False), ("with", True)):
        gradients = Gradients()
        module, _ = fit(tmp_path / name, gradients, micro_batch_size=4, gradient_checkpointing=on, **extra)
        assert (module.backbone is None) == (on or not extra.get("split_backward"))
        seen.append(gradients.seen)
    assert len(seen[0]) == extra.get("updates_per_window", 1)
    assert all(deviation(one, other) < 1e-5 for one, other in zip(seen[1], seen[0], strict=True))
    assert float(seen[0][0].norm()) > 0


def test_layers_that_cannot_be_computed_once_more_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.gradient_checkpointing: the layers of Linear models"), recomputing(torch.nn.Linear(2, 2)):
        pass


def test_attention_kernels_are_chosen_by_name_and_refused_where_they_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    for name in ("sdpa", "eager"):
        model: Any = load_policy(dict(fields), None, "float32", 0, 20, 1, name)
        assert model.config._attn_implementation == name
    with pytest.raises(ValueError, match=r"model\.attention is 'fast'; choose one of sdpa, eager, flash_attention_2"):
        check_attention("fast")
    monkeypatch.setattr(policy, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match="needs the package flash-attn"):
        check_attention("flash_attention_2")
    monkeypatch.setattr(policy, "is_flash_attn_2_available", lambda: True)
    check_attention("flash_attention_2", "float32", "bf16-mixed")
    with pytest.raises(ValueError, match="half precision only"):
        check_attention("flash_attention_2", "float32", "32-true")
