"""A checkpoint under its own name is whole, and every run of the command line writes them so."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from theodolite.atomic_checkpoints import AtomicCheckpointIO
from theodolite.cli import RUN_DIR_VARIABLE, TheodoliteCLI


def test_a_checkpoint_is_read_back_and_a_write_that_is_interrupted_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "checkpoints" / "step=2.ckpt"
    io.save_checkpoint({"state_dict": {"w": torch.arange(5)}, "step": 2}, path)
    before = path.read_bytes()
    loaded = io.load_checkpoint(path, weights_only=True)
    assert loaded["step"] == 2
    assert loaded["state_dict"]["w"].tolist() == [0, 1, 2, 3, 4]

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"state_dict": {"w": torch.arange(9)}, "step": 4}, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_command_line_s_trainer_writes_checkpoints_so_unless_another_way_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    model = ["--model=tiny_modules.TinyModel", "--data=tiny_modules.TinyData", "--run_dir=out", "--trainer.fast_dev_run=true"]
    cli = TheodoliteCLI(["fit", *model, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"])
    assert type(cli.trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    other = "--trainer.plugins=lightning.pytorch.plugins.io.AsyncCheckpointIO"
    cli = TheodoliteCLI(["fit", *model, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", other])
    assert type(cli.trainer.strategy.checkpoint_io).__name__ == "AsyncCheckpointIO"
