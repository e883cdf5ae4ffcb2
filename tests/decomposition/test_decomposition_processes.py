"""Fits through the command line in processes of their own: killed and resumed, and on two ranks, with attacks and persistent sources."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EVERY, STEPS = 2, 6
PERSISTENT: list[dict[str, Any]] = [
    {"source_scope": "single_source", "ascent": "sign"},
    {"source_scope": "repeat_across_batch", "n_sources": 2, "warmup_steps": 1},
    {"source_scope": "per_batch_per_position", "logits": True},
]


def written(path: Path, *more: dict[str, Any]) -> Path:
    """A tiny decomposition under three persistent adversaries and one of a fresh attack, attacked again at every evaluation."""
    settings = yaml.safe_load((ROOT / "configs/decomposition/tms_5-2.yaml").read_text())
    model = settings["model"]["init_args"]
    attacks = [spec | {"name": "persistent_pgd_recon", "key": spec["source_scope"], "coeff": 0.5} for spec in PERSISTENT]
    model["losses"] += [*attacks, {"name": "pgd_recon", "coeff": 0.5, "n_steps": 2}]
    model["metrics"] += [{"name": "persistent_pgd_eval", "loss": spec["key"]} for spec in attacks]
    model["target"] |= {"steps": 10, "batch_size": 32}
    model |= {"modules": {"linear1": 6, "linear2": 6}, "faithfulness_steps": 2, "micro_batch_size": 4}
    settings["data"]["init_args"] |= {"global_batch_size": 16, "eval_batch_size": 16, "eval_batches": 2}
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": EVERY, "save_top_k": -1, "filename": "{step}"}}
    attack = {"n_steps": [1, 5], "attack_batch_size": 16, "legacy_ranks": 4, "micro_batch_size": 4}
    callback = {"class_path": "theodolite.callbacks.pgd_recon_loss.PGDReconLossCallback", "init_args": attack}
    settings["trainer"] |= {"max_steps": STEPS, "val_check_interval": EVERY, "log_every_n_steps": 1, "enable_progress_bar": False}
    settings["trainer"]["callbacks"] = [checkpoint, callback, *more]
    path.write_text(yaml.safe_dump(settings))
    return path


def fit(config: Path, run_dir: Path, *more: str) -> int:
    """Exit code of a fit, which starts further ranks itself."""
    kept = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK", "PL_GLOBAL_SEED")}
    path = os.pathsep.join([str(HERE), kept.get("PYTHONPATH", "")])
    environment = kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "theodolite", "fit", f"--config={config}", f"--run_dir={run_dir}", *more]
    with (config.parent / f"{run_dir.name}.log").open("w") as log:
        return subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=600, check=False, cwd=config.parent).returncode


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal bit for bit, whatever is nested in what."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}/{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("step", "writing"), [(5, False), (3, True)], ids=["in a step", "in a checkpoint"])
def test_a_killed_fit_goes_on_with_its_sources_bit_for_bit(step: int, writing: bool, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert fit(written(tmp_path / "whole.yaml"), whole) == 0
    killer = {"class_path": "killer.KillAt", "init_args": {"step": step, "writing": writing}}
    assert fit(written(tmp_path / "killer.yaml", killer), killed) == -signal.SIGKILL
    last = killed / "checkpoints" / f"step={step // EVERY * EVERY}.ckpt"
    assert fit(tmp_path / "whole.yaml", killed, f"--ckpt_path={last}") == 0
    ends = [torch.load(run / "checkpoints" / f"step={STEPS}.ckpt", weights_only=True) for run in (whole, killed)]
    for part in ("state_dict", "objectives", "optimizer_states"):
        assert_same(dict(enumerate(ends[0][part])) if isinstance(ends[0][part], list) else ends[0][part],
                    dict(enumerate(ends[1][part])) if isinstance(ends[1][part], list) else ends[1][part], part)  # fmt: skip
    assert len(ends[0]["objectives"]) == len(PERSISTENT)
    assert rows(whole) == rows(killed)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_a_trainer_of_two_ranks_trains_and_attacks_as_one_does(tmp_path: Path) -> None:
    config = written(tmp_path / "fit.yaml")
    assert fit(config, tmp_path / "one", "--trainer.precision=64-true") == 0
    assert fit(config, tmp_path / "two", "--trainer.precision=64-true", "--trainer.devices=2", "--trainer.strategy=ddp") == 0
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for first, second in zip(one, two, strict=True):
        assert second == pytest.approx(first, rel=1e-9, abs=1e-12, nan_ok=True)
    last = {key: value for row in one for key, value in row.items()}
    for name in ("joint_16/n5", "averaged_4x4/n5", "separate_4/n5"):
        assert f"val/pgd_recon/{name}" in last
    assert last["val/pgd_recon/joint_16/n5"] == pytest.approx(last["val/pgd_recon/averaged_4x4/n5"], rel=1e-12)
