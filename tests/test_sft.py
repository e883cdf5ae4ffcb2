"""Supervised fine-tuning: one denominator for any split, a loss that falls, and an export that anyone can load."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_policies import POLICIES, TEXTS, TinyPrompts, weights_of

from theodolite.lightning_modules import SFTModule


def made(**settings: Any) -> SFTModule:
    defaults: dict[str, Any] = {"policy": POLICIES["qwen3"], "train_tokenizer": {"vocab_size": 280}, "max_new_tokens": 8}
    return SFTModule(**(defaults | {"lr": 3e-3, "export": False, "seed": 3} | settings))


def fitted(path: Path, steps: int = 3, prompts: int = 6, **settings: Any) -> tuple[SFTModule, Trainer]:
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(accelerator="cpu", max_steps=steps, max_epochs=-1, limit_val_batches=0, default_root_dir=path, **quiet)
    module = made(**settings)
    trainer.fit(module, datamodule=TinyPrompts(prompts, examples=True))
    return module, trainer


@pytest.mark.parametrize("prompt_weight", [0.0, 0.2])
def test_gradient_and_loss_are_those_of_the_weighted_mean_over_single_examples(tmp_path: Path, prompt_weight: float) -> None:
    module, trainer = fitted(tmp_path, steps=1, prompt_weight=prompt_weight, lr=0.0, max_grad_norm=0.0)
    ours = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    data = TinyPrompts(6, examples=True)
    data.trainer = trainer
    batch = next(iter(data.train_dataloader()))
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for example in batch:
        sequence = module.encode(example.prompt, example.completion)
        ids = torch.tensor([sequence.prompt_ids + sequence.completion_ids])
        log_probs = module.causal_lm(input_ids=ids).logits[0].double().log_softmax(-1)
        for position in range(1, ids.shape[1]):
            w = 1.0 if position >= len(sequence.prompt_ids) else prompt_weight
            total = total - w * log_probs[position - 1, ids[0, position]]
            weight += w
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total / weight, list(module.parameters()))])
    assert (ours - expected).norm() / expected.norm() < 1e-6
    assert float(trainer.logged_metrics["train/loss"]) == pytest.approx(float(total.detach()) / weight, rel=1e-6)


def test_microbatches_of_any_size_give_the_same_weights(tmp_path: Path) -> None:
    whole = weights_of(fitted(tmp_path, prompt_weight=0.2)[0])
    for size in (1, 2, 3):
        split = weights_of(fitted(tmp_path, prompt_weight=0.2, micro_batch_size=size)[0])
        assert max(float((whole[name] - split[name]).abs().max()) for name in whole) < 1e-5


def test_training_on_one_batch_lowers_its_loss(tmp_path: Path) -> None:
    _, first = fitted(tmp_path, steps=1, prompts=20)
    _, last = fitted(tmp_path, steps=40, prompts=20)  # twenty rows, twenty per step: the same batch again and again
    assert float(last.logged_metrics["train/loss"]) < 0.3 * float(first.logged_metrics["train/loss"])


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_exported_policy_loads_with_transformers_and_computes_the_same(tmp_path: Path, kind: str) -> None:
    module, _ = fitted(tmp_path, export=True, policy=POLICIES[kind])
    folder = tmp_path / "policy"
    assert not (tmp_path / "policy.tmp").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[:3]:
        assert tokenizer(text)["input_ids"] == module.tokenizer(text)["input_ids"]
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    module.causal_lm.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, module.causal_lm(input_ids=ids).logits)
    again = made(policy=str(folder), train_tokenizer=None)
    again.configure_model()
    assert again.end_ids == module.end_ids == [module.tokenizer.eos_token_id]
    assert model.generation_config.eos_token_id == module.tokenizer.eos_token_id


def test_exporting_again_replaces_the_folder(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "stale.txt").write_text("old")
    fitted(tmp_path, steps=1, export=True)
    assert not (tmp_path / "policy" / "stale.txt").exists()


def test_adapter_trains_nothing_of_its_base(tmp_path: Path) -> None:
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    module, _ = fitted(tmp_path, lora=lora)
    fresh = made(lora=lora)
    fresh._build_tokenizer = lambda: module.tokenizer  # pyright: ignore
    fresh.configure_model()
    before, after = weights_of(fresh), weights_of(module)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_only_parameters_that_match_a_pattern_move(tmp_path: Path) -> None:
    module, _ = fitted(tmp_path, trainable=["*.layers.1.*_proj.weight"])
    fresh = made()
    fresh._build_tokenizer = lambda: module.tokenizer  # pyright: ignore
    fresh.configure_model()
    moved = {name for name, value in weights_of(fresh).items() if not torch.equal(value, weights_of(module)[name])}
    assert len(moved) == 7
    assert all(".layers.1." in name for name in moved)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt_weight": -1.0}, "prompt_weight"),
        ({"trainable": ["*.nowhere"]}, "matches no parameter"),
        ({"micro_batch_size": 4}, "microbatches of 4; 3 would"),
        ({"schedule": "cosine", "steps": -1}, "needs trainer.max_steps"),
        ({"dtype": "float8"}, "float32, bfloat16, float16"),
        ({"policy": {"hidden_size": 3}}, "without model_type"),
        ({"policy": "./nowhere", "train_tokenizer": None, "tokenizer": "./nowhere"}, "nowhere"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, OSError), match=said):
        fitted(tmp_path, **settings)
