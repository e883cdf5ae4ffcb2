"""Tables, heartbeat and clocks of a fit; adapter checkpoints and exports that plain PEFT loads."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from peft import PeftModel
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_fits import fit
from tiny_policies import tiny_model, tokenizer

from theodolite.callbacks import Heartbeat
from theodolite.protocols import Window

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


class Tables(Logger):
    """A logger that takes tables."""

    @property
    def name(self) -> str:
        return "tables"

    @property
    def version(self) -> str:
        return "0"

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[dict[str, Any]] = []
        self.metrics: list[dict[str, float]] = []

    def log_table(self, key: str, **table: Any) -> None:
        self.tables.append(table)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics.append(dict(metrics))

    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None: ...


def test_every_so_many_windows_all_rollouts_are_written_with_what_replaying_them_needs(tmp_path: Path) -> None:
    logger = Tables()
    windows: list[Window] = []

    class Keep(Callback):
        def on_advantages(self, trainer: Any, pl_module: Any, window: Window) -> None:
            windows.append(window)

    fit(tmp_path, Keep(), steps=3, table_every=2, logger=logger)
    files = sorted(path.name for path in (tmp_path / "completions").iterdir())
    assert files == ["step_000000.parquet", "step_000002.parquet"]
    table = pd.read_parquet(tmp_path / "completions" / files[1])
    assert len(table) == 16
    for i, rollout in enumerate(windows[2].rollouts):
        row = table.iloc[i]
        assert (row["slot"], row["sample"], row["problem"], row["source"]) == (rollout.slot, rollout.sample, rollout.problem, "policy")
        assert tuple(row["completion_ids"]) == rollout.tokens.completion_ids
        assert tuple(row["prompt_ids"]) == rollout.tokens.prompt_ids
        assert tuple(row["sampler_log_probs"]) == rollout.sampler_log_probs
        assert row["weight_version"] == 2
        assert row["reward"] == windows[2].rewards[i].value
        assert row["label"] in ("correct", "reward_hack", "incorrect")
    assert [table["step"] for table in logger.tables] == [0, 2]
    assert "completion" in logger.tables[0]["columns"]
    assert len(logger.tables[0]["data"]) == 16


def test_every_phase_is_timed_and_clocks_keep_to_their_own_names(tmp_path: Path) -> None:
    logger = Tables()
    fit(tmp_path, steps=1, logger=logger)
    logged = {name: value for row in logger.metrics for name, value in row.items()}
    phases = ("rollouts", "grading", "advantages", "gradients", "update", "hooks")
    assert all(logged[f"time/{phase}_s"] >= 0 for phase in phases)
    assert logged["time/rollout_tokens_per_s"] > 0
    assert logged["time/gradient_tokens_per_s"] > 0
    assert not any("_s" in name.split("/")[-1][-2:] for name in logged if name.startswith("train/"))
    for name in ("entropy_estimate", "sampler_gap", "sampler_kl", "clip_fraction", "reward_mean", "hack_rate", "pass_rate"):
        assert f"train/{name}" in logged


class UntilDumped(Callback):
    """Goes on when its own stack has been written."""

    def __init__(self, stacks: Path) -> None:
        self.stacks = stacks

    def on_advantages(self, trainer: Any, pl_module: Any, window: Window) -> None:
        deadline = time.monotonic() + 60
        while not (self.stacks.is_file() and "on_advantages" in self.stacks.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)


def test_heartbeat_names_the_phase_and_dumps_the_stacks_of_one_that_is_stuck(tmp_path: Path) -> None:
    heartbeat = Heartbeat(every_s=0.05, limit_s=60, limits={"hooks": 0.2})
    fit(tmp_path, heartbeat, UntilDumped(tmp_path / "stacks-0.txt"), steps=1)
    beat = json.loads((tmp_path / "heartbeat-0.json").read_text())
    assert set(beat) == {"time", "step", "phase", "seconds_in_phase", "late"}
    assert heartbeat.dumps == 1
    stacks = (tmp_path / "stacks-0.txt").read_text()
    assert "step 0: hooks has taken" in stacks
    assert "on_advantages" in stacks
    assert heartbeat._thread is None
    with pytest.raises(ValueError, match="positive times"):
        Heartbeat(every_s=0)


# -- adapters ------------------------------------------------------------------------------------------------------------------------------


def test_an_adapter_s_checkpoint_holds_the_adapter_alone_and_its_export_loads_with_plain_peft(tmp_path: Path) -> None:
    base: Any = tiny_model("qwen3")
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    settings: dict[str, Any] = {"policy": str(tmp_path / "base"), "train_tokenizer": None, "lora": LORA, "lr": 0.5, "export": True}
    module, trainer = fit(tmp_path / "run", steps=2, **settings)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert all("lora_" in name for name in saved)
    resumed, _ = fit(tmp_path / "again", steps=2, ckpt_path=tmp_path / "half.ckpt", **settings)
    for (name, one), other in zip(module.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.arange(2, 12)[None]
    before = plain(input_ids=ids).logits.detach().clone()
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "run" / "policy"))
    expected = module.causal_lm(input_ids=ids).logits
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
    assert not torch.allclose(before, expected, atol=1e-4)
    assert (tmp_path / "run" / "policy" / "README.md").is_file()
    with pytest.raises(ValueError, match="of another adapter"):
        fit(tmp_path / "other", steps=3, ckpt_path=tmp_path / "half.ckpt", **(settings | {"lora": {"r": 4, "target_modules": ["up_proj"]}}))
