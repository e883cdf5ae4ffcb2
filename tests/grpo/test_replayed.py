"""Rollouts out of an earlier run's tables: the same windows without a sampler, or one sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_fits import fit
from tiny_policies import weights_of

from theodolite.lightning_modules.decoding import Sampling
from theodolite.lightning_modules.replayed import ReplayRollout, read_groups
from theodolite.lightning_modules.rollouts import RolloutEngine


def replay(folder: Path) -> dict[str, Any]:
    return {"class_path": "theodolite.lightning_modules.replayed.ReplayRollout", "init_args": {"folder": str(folder)}}


def test_a_replayed_run_learns_what_the_recorded_one_did(tmp_path: Path) -> None:
    recorded, _ = fit(tmp_path, steps=2, table_every=1)
    completions = tmp_path / "completions"
    again, trainer = fit(tmp_path / "again", steps=2, rollout=replay(completions), mismatch=None)
    assert isinstance(again.engine, RolloutEngine)
    first, second = weights_of(recorded), weights_of(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert float(trainer.logged_metrics["train/sampler_gap"]) < 1e-5
    other, _ = fit(tmp_path / "other", steps=1, rollout=replay(completions), advantage_scale="none")
    assert any(not torch.equal(value, weights_of(other)[name]) for name, value in first.items()), "under another objective"
    with pytest.raises(ValueError, match=r"holds 4 completions of a prompt where 2 are asked for"):
        fit(tmp_path / "smaller", steps=1, rollout=replay(completions), group_size=2)
    with pytest.raises(ValueError, match=r"step_000002.parquet was not recorded"):
        fit(tmp_path / "longer", steps=3, rollout=replay(completions))
    with pytest.raises(ValueError, match="holds no tables of rollouts"):
        fit(tmp_path / "nothing", rollout=replay(tmp_path / "nowhere"))


def table(path: Path, **columns: Any) -> Path:
    row = {"slot": 0, "sample": 0, "problem": "p", "finish": "stop", "source": "policy", "weight_version": 0}
    row |= {"prompt_ids": [1, 2], "completion_ids": [3], "sampler_log_probs": [-1.0]}
    pd.DataFrame([row, row | {"sample": 1} | columns]).to_parquet(path)
    return path


def test_tables_in_which_groups_cannot_be_told_apart_or_that_another_author_wrote_are_refused(tmp_path: Path) -> None:
    groups = read_groups(table(tmp_path / "step_000000.parquet"))
    assert [sample.ids for sample in groups[1, 2]] == [(3,), (3,)]
    engine = ReplayRollout(str(tmp_path))
    engine.sync(0)
    with pytest.raises(ValueError, match="holds 0 completions of a prompt where 1 are asked for"):
        engine.generate([(9,)], Sampling(4), [[1]])
    with pytest.raises(ValueError, match="'q' and another one under one prompt"):
        read_groups(table(tmp_path / "two.parquet", slot=1, problem="q"))
    with pytest.raises(ValueError, match="completions of 'teacher'"):
        read_groups(table(tmp_path / "teacher.parquet", source="teacher"))
