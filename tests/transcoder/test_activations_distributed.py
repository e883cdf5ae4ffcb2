"""The same training on one rank and on two, through the real command line: same rows, same weights, same FVU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODEL = {
    "model_type": "gemma2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
TEXT = {"class_path": "theodolite.datamodules.text.documents.SyntheticEnglish", "init_args": {"documents": 100, "sentences": 3}}
DATA: dict[str, Any] = {
    "model": MODEL, "tokenizer": "bytes", "text": TEXT, "input_site": "mlp_in.1", "target_site": "mlp_out.1", "global_batch_size": 64,
    "buffer_rows": 32, "model_batch_rows": 4, "packing": {"length": 24}, "validation_rows": 7, "validation_share": 0.2, "test_share": 0.2,
}  # fmt: skip


def numbers(folder: Path, kind: str, data: dict[str, Any], ranks: int) -> list[dict[str, float]]:
    """Everything a run logs."""
    callbacks = [{"class_path": "FVUCallback", "init_args": {"forward": True, "name": "coder_fvu"}}]
    trainer: dict[str, Any] = {
        "accelerator": "cpu", "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", "max_steps": 6, "log_every_n_steps": 2,
        "check_val_every_n_epoch": None, "val_check_interval": 3, "num_sanity_val_steps": 0, "callbacks": callbacks,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    model = {"class_path": "TranscoderModule", "init_args": {"latents": 64, "k": 4, "warmup_steps": 2}}
    config = folder / f"{kind}{ranks}.yaml"
    config.write_text(
        json.dumps({"seed_everything": 2, "model": model, "data": {"class_path": kind, "init_args": data}, "trainer": trainer})
    )
    run = folder / f"run-{kind}{ranks}"
    command = [sys.executable, "-m", "theodolite", "fit", "--config", str(config), "--run_dir", str(run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks that it started, too
        raise
    assert process.returncode == 0, errors[-3000:]
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ActivationDataModule", "CachedActivationDataModule"])
def test_two_ranks_log_what_one_logs(tmp_path: Path, kind: str) -> None:
    data = DATA | ({"repeat": True} if kind == "ActivationDataModule" else {"train_rows": 900, "rows_per_shard": 128})
    runs = []
    for ranks in (1, 2):
        cache = {"cache_dir": str(tmp_path / f"cache{ranks}")} if kind != "ActivationDataModule" else {}
        runs.append(numbers(tmp_path, kind, data | cache, ranks))
    one, two = runs
    assert len(one) == len(two) > 3
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=2e-6, abs=1e-9), key
    assert "val/coder_fvu" in one[-1] or "val/coder_fvu" in one[-2]
