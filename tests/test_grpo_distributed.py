"""One rank, two ranks and an interrupted run, through the real command line: the same numbers. Run as a script, this is one rank."""

from __future__ import annotations

import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))

from tiny_policies import callback, config, grpo, prompts, sft  # noqa: E402
from warm_processes import run, run_ranks  # noqa: E402

from theodolite.cli import RUN_DIR_VARIABLE, main  # noqa: E402

PROJECTION = {
    "class_path": "theodolite.callbacks.gradient_projection.GradientProjectionCallback",
    "init_args": {
        "gate": "two_sided",
        "direction": {
            "class_path": "theodolite.callbacks.live_direction.LiveGradientDifference",
            "init_args": {"capacity": 6, "refresh_every": 2, "detector": "[a-m]", "seed": 1},
        },
    },
}


@pytest.fixture(autouse=True)
def _no_inherited_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def two_ranks(folder: Path, *command_lines: list[str]) -> None:
    """Run command lines, one after the other, on two processes that form a group."""
    (folder / "commands.json").write_text(json.dumps([[*line, "--trainer.devices=2", "--trainer.strategy=ddp"] for line in command_lines]))
    run_ranks([__file__, str(folder / "commands.json")], folder)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def largest_difference(one: Path, other: Path) -> float:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def assert_same_rows(one: Path, two: Path, tolerance: float) -> None:
    assert len(rows(one)) == len(rows(two))
    for first, second in zip(rows(one), rows(two), strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == (pytest.approx(value, abs=tolerance, rel=tolerance) if isinstance(value, float) else value), name


def rollouts(folder: Path, ranks: int) -> list[str]:
    return sorted(line for rank in range(ranks) for line in (folder / f"rollouts-{rank}.jsonl").read_text().splitlines())


@pytest.mark.distributed
def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    lines: dict[str, list[list[str]]] = {"one": [], "two": []}
    for name, commands in lines.items():
        witness, sft_witness = (callback("tiny_policies.Witness", folder=str(tmp_path / name / kind)) for kind in ("grpo", "sft"))
        policy = config(
            tmp_path,
            f"grpo-{name}",
            # the demo's rate: Adam turns a gradient of 1e-9 that is nothing but summation order into a move of up to lr
            grpo(lr=1.5e-4, micro_batch_size=4, warmup_steps=2, beta=0.05, advantage_scale="batch"),
            prompts(rewards="nan"),
            max_steps=4,
            val_check_interval=2,
            callbacks=[witness],
        )
        examples = prompts(examples=True, prompts_per_step=6)
        # on one rank as one microbatch of six, on two as three of one each
        tuning = sft(micro_batch_size=None if name == "one" else 1, prompt_weight=0.2)
        tuned = config(tmp_path, f"sft-{name}", tuning, examples, max_steps=4, val_check_interval=2, callbacks=[sft_witness])
        commands += [["fit", f"--config={policy}", f"--run_dir={tmp_path}/run-{name}"]]
        commands += [["fit", f"--config={tuned}", f"--run_dir={tmp_path}/run-sft-{name}"]]
    two_ranks(tmp_path, *lines["two"])
    for line in lines["one"]:
        main(line)
    one, two = tmp_path / "one", tmp_path / "two"
    assert rollouts(one / "grpo", 1) == rollouts(two / "grpo", 2), "ranks must sample the very rollouts that one process samples"
    assert len(rollouts(one / "grpo", 1)) == 4 * 16
    for kind in ("grpo", "sft"):
        assert largest_difference(two / kind / "weights-0.safetensors", two / kind / "weights-1.safetensors") == 0.0
        difference = largest_difference(one / kind / "weights-0.safetensors", two / kind / "weights-0.safetensors")
        print(f"{kind}: largest weight difference between one and two ranks {difference:.1e}")
        assert difference < 1e-5
    assert_same_rows(tmp_path / "run-one", tmp_path / "run-two", 1e-6)
    assert_same_rows(tmp_path / "run-sft-one", tmp_path / "run-sft-two", 1e-6)
    losses = [row["train/loss"] for row in rows(tmp_path / "run-one") if "train/loss" in row]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    for kind in ("run", "run-sft"):
        tables = sorted(path.name for path in (tmp_path / f"{kind}-one" / "rollouts").iterdir())
        assert tables == [f"step_{step:06d}_val_hinted.parquet" for step in (0, 2, 4)]
        for table in tables:
            first, second = (pd.read_parquet(tmp_path / f"{kind}-{name}" / "rollouts" / table) for name in ("one", "two"))
            pd.testing.assert_frame_equal(first, second)
            assert first["slot"].tolist() == list(range(7))
            assert first["problem"].tolist() == [f"held-out{i}" for i in range(7)]
    arithmetic = json.loads((tmp_path / "run-two" / "manifest.json").read_text())["batch_arithmetic"]
    assert arithmetic == {"prompts": 4, "generations": 4, "ranks": 2, "micro": 4, "accumulation": 2, "global_batch": 16}


def test_killed_and_resumed_run_leaves_the_bytes_of_the_uninterrupted_one(tmp_path: Path) -> None:
    checkpoint = callback("lightning.pytorch.callbacks.ModelCheckpoint", every_n_train_steps=2, save_top_k=-1, filename="{step}")

    def written(name: str, *more: dict[str, Any]) -> str:
        witness = callback("tiny_policies.Witness", folder=str(tmp_path / name))
        # five windows per epoch: the resumed part crosses into the second
        data, callbacks = prompts(rewards="nan"), [PROJECTION, checkpoint, witness, *more]
        model = grpo(warmup_steps=3, schedule="cosine", micro_batch_size=8, beta=0.05)
        return config(tmp_path, name, model, data, max_steps=7, val_check_interval=2, callbacks=callbacks)

    whole = written("whole")
    killed = written("killed", callback("tiny_policies.KillInWindow", step=5))
    log = tmp_path / "log.txt"
    code = run(["-m", "theodolite", "fit", f"--config={killed}", f"--run_dir={tmp_path}/run-killed"], log)
    assert code == -signal.SIGKILL, log.read_text()[-3000:]
    assert [row["step"] for row in rows(tmp_path / "run-killed") if "train/loss" in row] == [0, 1, 2, 3, 4]
    main(["fit", f"--config={whole}", f"--run_dir={tmp_path}/run-whole"])
    resumed = written("killed")
    main(["fit", f"--config={resumed}", f"--run_dir={tmp_path}/run-killed", f"--ckpt_path={tmp_path}/run-killed/checkpoints/step=4.ckpt"])
    assert largest_difference(tmp_path / "whole" / "weights-0.safetensors", tmp_path / "killed" / "weights-0.safetensors") == 0.0
    assert sorted(path.name for path in (tmp_path / "run-whole" / "checkpoints").iterdir()) == [f"step={step}.ckpt" for step in (2, 4, 6)]
    assert [row["step"] for row in rows(tmp_path / "run-whole") if "val/n" in row] == [0, 2, 4, 6]
    first, second = (tmp_path / f"run-{name}" / "metrics.jsonl" for name in ("whole", "killed"))
    assert first.read_bytes() == second.read_bytes()
    for table in sorted((tmp_path / "run-whole" / "rollouts").iterdir()):
        pd.testing.assert_frame_equal(pd.read_parquet(table), pd.read_parquet(tmp_path / "run-killed" / "rollouts" / table.name))
    live = [row["projection/projection/live_pairs"] for row in rows(tmp_path / "run-whole") if "train/loss" in row]
    assert max(live) > 0, "the queue must have taken pairs from the rollouts, or nothing of it was resumed"
    states = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "run-killed" / "checkpoints").iterdir())]
    assert not any(name.startswith("_reference") for state in states for name in state["state_dict"])


if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        main(arguments)
