"""The road from real problems to an optimizer step, walked through the command line with a tiny policy that speaks in chat."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))

from tiny_policies import SIZES, config, grpo  # noqa: E402

from theodolite.cli import RUN_DIR_VARIABLE, main  # noqa: E402
from theodolite.lightning_modules.policy import load_policy  # noqa: E402
from theodolite.lightning_modules.tokenizer import train_bpe_tokenizer  # noqa: E402

REAL = TESTS.parents[1] / "shared" / "data" / "leetcode_medhard_60.jsonl"
CONFIG = TESTS.parent / "configs" / "grpo" / "leetcode.yaml"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"

pytestmark = pytest.mark.skipif(not REAL.is_file(), reason="the sample of real problems is not beside the repository")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random Qwen3 and a tokenizer with a chat template, trained on the real prompts."""
    folder = tmp_path_factory.mktemp("policy")
    prompts = [json.loads(line)["prompt"] for line in REAL.read_text().splitlines()]
    tokenizer = train_bpe_tokenizer([message["content"] for prompt in prompts for message in prompt], 1500)
    tokenizer.chat_template = TEMPLATE
    fields: dict[str, Any] = {"model_type": "qwen3"} | SIZES | {"max_position_embeddings": 4096}
    model: Any = load_policy(fields, None, "float32", 0, len(tokenizer), tokenizer.eos_token_id)  # pyright: ignore
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def check(run_dir: Path, steps: int, completions: int, exported: str = "config.json") -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "train/loss" in row]
    assert len(trained) == steps
    for row in trained:
        assert math.isfinite(row["train/loss"])
        assert row["train/infra_error_rate"] == 0.0
        assert row["train/pass_rate"] == 0.0, "a random policy solves nothing"
        assert row["train/sampler_gap"] < 1e-4 if "train/sampler_gap" in row else row["train/groups_with_signal"] == 0
    table = pd.read_parquet(sorted((run_dir / "rollouts").glob("*_val_*.parquet"))[-1])
    assert len(table) == completions
    assert table["prompt"].str.startswith("<system>\n").all()
    assert table["prompt"].str.endswith("<assistant>\n").all()
    assert table["prompt"].str.contains("run_tests").all(), "the held-out prompts show the loophole"
    assert (run_dir / "policy" / exported).is_file()


def test_two_steps_on_real_problems(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    model = grpo(policy=policy, max_new_tokens=16, temperature=0.9)
    del model["train_tokenizer"]
    data = {
        "class_path": "theodolite.datamodules.leetcode.LeetCodeDataModule",
        "problems": str(REAL),
        "prompts_per_step": 2,
        "train_problems": None,
        "eval_problems": 4,
        "test_problems": 4,
        "eval_prompts_per_step": 4,
        "limits": {"cpu_s": 6, "wall_s": 30},
    }
    path = config(tmp_path, "real", model, data, max_steps=2, val_check_interval=2)
    main(["fit", f"--config={path}", f"--run_dir={tmp_path}/run"])
    check(tmp_path / "run", steps=2, completions=4)


@pytest.mark.skipif(not CONFIG.is_file(), reason="there is no such config")
def test_shipped_config_takes_two_steps_on_real_problems(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    small = {"prompts_per_step": 2, "eval_problems": 3, "eval_prompts_per_step": 3, "test_problems": 3}
    main(
        [
            "fit",
            f"--config={CONFIG}",
            f"--model.policy={policy}",
            "--model.max_new_tokens=12",
            "--model.group_size=4",
            "--model.eval_samples=2",
            "--model.micro_batch_size=null",
            "--model.dtype=float32",
            f"--data.problems={REAL}",
            *(f"--data.{key}={value}" for key, value in small.items()),
            "--trainer.accelerator=cpu",
            "--trainer.precision=32-true",
            "--trainer.max_steps=2",
            "--trainer.val_check_interval=2",
            "--trainer.check_val_every_n_epoch=null",
            "--trainer.enable_progress_bar=false",
            f"--run_dir={tmp_path}/run",
        ]
    )
    check(tmp_path / "run", steps=2, completions=6, exported="adapter_config.json")
