"""Recipes for real models: their memory by hand, and the recipe end to end with tiny random models of the same architectures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_policies import tokenizer

from theodolite.cli import main
from theodolite.policy_memory import RolloutSize, kept_for_backward, meta_model, policy_memory

ROOT = Path(__file__).resolve().parents[1]
TINY: dict[str, dict[str, Any]] = {
    "qwen3_4b_leetcode": {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                          "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3.5_2b_leetcode": {"model_type": "qwen3_5_text", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
                            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "linear_num_key_heads": 2,
                            "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
                            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]},
}  # fmt: skip


def test_memory_is_counted_from_the_models_own_sizes() -> None:
    config = TINY["qwen3_4b_leetcode"] | {"vocab_size": 128}
    model = meta_model(config, torch.bfloat16, {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]})
    base = sum(p.numel() for name, p in model.named_parameters() if "lora" not in name)
    adapter = 2 * (4 * 32 + 4 * 32)
    parts = policy_memory(model, RolloutSize(rollouts=6, micro=2, prompt=10, completion=5))
    assert parts["weights"] == 2 * base + 4 * adapter, "adapters are float32 over a rounded base"
    assert parts["gradients"] == 4 * adapter
    assert parts["optimizer"] == 8 * adapter
    assert parts["cache of a rollout batch"] == 2 * 2 * 6 * 15 * 2 * 1 * 16
    assert parts["logits of a microbatch"] == 16 * 2 * 5 * 128
    bounded = policy_memory(model, RolloutSize(rollouts=6, micro=4, prompt=10, completion=5, token_budget=12), samples=False)
    assert bounded["cache of a rollout batch"] == 0, "another engine's rollouts are not in this model's cache"
    assert bounded["logits of a microbatch"] == 16 * 12 * 128, "a budget bounds completion tokens"
    assert bounded["activations of a microbatch"] == kept_for_backward(model, 4, 10 + 3), "and no prompts"
    assert RolloutSize(6, 4, 10, 5, token_budget=3).scored == 5, "a longer completion goes alone"
    plain = meta_model(config, torch.float32, None)
    kept = policy_memory(plain, RolloutSize(6, 2, 10, 5), trainable=["*.layers.*_proj.weight"], reference=True)
    trained = sum(p.numel() for name, p in plain.named_parameters() if "_proj.weight" in name)
    assert kept["gradients"] == 4 * trained
    assert kept["weights"] == 2 * 4 * sum(p.numel() for p in plain.parameters())


def test_print_memory_reads_the_layers_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = [
        f"--config={ROOT / 'configs' / 'grpo' / name}" for name in ("leetcode.yaml", "qwen3_4b_leetcode.yaml", "qwen3_4b_fallback.yaml")
    ]
    policy = str(TINY["qwen3_4b_leetcode"] | {"vocab_size": 128}).replace("'", '"').replace("True", "true")
    main(["fit", *layers, f"--model.policy={policy}", "--model.max_new_tokens=64", "--print_memory"])
    text = capsys.readouterr().out
    assert "64 rollouts at once, microbatches of 4, up to 1536 + 64 tokens" in text
    assert "at most, on one rank" in text
    main(
        ["fit", *layers, f"--model.policy={policy}", "--model.lora=null", "--trainer.devices=2", "--trainer.num_nodes=2", "--print_memory"]
    )
    assert "16 rollouts at once" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model.lr=0.1", "--print_memory"])
    assert stop.value.code == 2
    assert "needs model.policy" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_recipe_runs_end_to_end_with_a_tiny_model_of_its_architecture(name: str, tmp_path: Path) -> None:
    policy = str(TINY[name]).replace("'", '"').replace("True", "true")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    layers = ["leetcode.yaml", "qwen3_4b_leetcode.yaml", *([f"{name}.yaml"] if name != "qwen3_4b_leetcode" else [])]
    options = [
        f"--model.policy={policy}", f"--model.tokenizer={tmp_path / 'tokenizer'}", "--model.max_new_tokens=4", "--model.export=false",
        "--model.dtype=float32", "--model.group_size=2", "--model.micro_batch_size=null", "--data.problems=mini", "--data.tokenizer=null",
        "--data.max_prompt_tokens=null", "--data.train_problems=8", "--data.eval_problems=2", "--data.test_problems=2",
        "--data.prompts_per_step=2", "--data.eval_prompts_per_step=2", "--data.limits={cpu_s: 0.5, wall_s: 10}", "--data.workers=1",
        "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.val_check_interval=1", f"--run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "theodolite", "fit", *(f"--config={ROOT / 'configs' / 'grpo' / layer}" for layer in layers), *options]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "val/kl_k3" in text
    assert "train/loss" in text
