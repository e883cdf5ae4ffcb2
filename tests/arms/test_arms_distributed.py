"""Arms compute on two ranks what they compute on one: the same numbers, row by row."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_grpo_distributed import assert_same_rows, two_ranks
from tiny_policies import callback, config, grpo, prompts

from theodolite.cli import RUN_DIR_VARIABLE, main

ROOM = "theodolite.callbacks."


def arms(pool: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Settings of the module, and the callback, by arm."""
    probe = {"class_path": f"{ROOM}activation_probe.ActivationProbe", "init_args": {"n_pairs": 8}}
    live = {
        "class_path": f"{ROOM}live_direction.LiveGradientDifference",
        "init_args": {"capacity": 6, "detector": probe, "only_rewarded": True},
    }
    mismatch = {"mismatch": {"mode": "token_tis", "high": 2.0}}
    return {
        "suppressed": (mismatch, callback(f"{ROOM}suppression.GenerationSuppression", n_pairs=8, band=[0.5, 1.0])),
        "teacher_mix": ({}, callback(f"{ROOM}teacher_mix.TeacherMix", pool=pool, select="")),
        "live_probe": ({}, callback(f"{ROOM}gradient_projection.GradientProjectionCallback", direction=live, overshoot=2.0)),
        "rebound": ({}, callback(f"{ROOM}rebound.ReboundCallback", n_pairs=8, mode="multiplicative", band=[0.5, 1.0])),
        "screening_80": ({}, callback(f"{ROOM}oracle.OracleScreening", accuracy=0.8)),
    }


@pytest.mark.slow
@pytest.mark.distributed
def test_every_kind_of_arm_logs_the_same_on_two_ranks_as_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    teacher = config(tmp_path, "teacher", grpo(lr=0.01, table_every=1), prompts(), max_steps=3, limit_val_batches=0)
    main(["fit", f"--config={teacher}", f"--run_dir={tmp_path}/teacher"])
    lines: dict[str, list[list[str]]] = {"one": [], "two": []}
    found = arms(str(tmp_path / "teacher" / "completions"))
    for number, commands in lines.items():
        for name, (settings, added) in found.items():
            module = grpo(lr=1.5e-4, micro_batch_size=4, warmup_steps=2, **settings)
            made = config(tmp_path, f"{name}-{number}", module, prompts(), max_steps=3, limit_val_batches=0, callbacks=[added])
            commands.append(["fit", f"--config={made}", f"--run_dir={tmp_path}/{name}-{number}"])
    two_ranks(tmp_path, *lines["two"])
    for line in lines["one"]:
        main(line)
    for name in found:
        assert_same_rows(tmp_path / f"{name}-one", tmp_path / f"{name}-two", 1e-4)
