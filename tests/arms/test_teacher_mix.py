"""Replayed rollouts: which ones, with whose ratios, the same on any number of ranks, and how they are told from the policy's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from lightning.pytorch import Callback

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "grpo"))

from grpo_fits import fit

from theodolite.callbacks.teacher_mix import COLUMNS, TeacherMix
from theodolite.protocols import Window
from theodolite.replay import POLICY


class Copy(Callback):
    """Keeps the windows that a fit saw."""

    def __init__(self) -> None:
        self.windows: list[Window] = []

    def on_advantages(self, trainer: Any, pl_module: Any, window: Window) -> None:
        self.windows.append(window)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of a run whose policy then learnt with large steps, so that its log-probabilities differ from the base policy's."""
    folder = tmp_path_factory.mktemp("teacher")
    fit(folder, steps=5, table_every=1, lr=0.3)
    return folder / "completions"


def mixed(path: Path, pool: Path, **settings: Any) -> tuple[list[Window], Any]:
    copy = Copy()
    arguments: dict[str, Any] = {"select": ""} | settings
    _, trainer = fit(path, TeacherMix(str(pool), **arguments), copy, steps=5)
    return copy.windows, trainer


def test_replayed_rows_are_the_pool_s_with_the_log_probabilities_that_their_author_recorded(tmp_path: Path, pool: Path) -> None:
    windows, trainer = mixed(tmp_path, pool)
    table = pd.concat(pd.read_parquet(path) for path in sorted(pool.glob("*.parquet")))
    recorded = {(row["problem"], tuple(row["completion_ids"])): row for row in table.to_dict("records")}
    replayed = [(w, i) for w in windows for i, rollout in enumerate(w.rollouts) if rollout.source == "teacher"]
    assert len(replayed) > 10
    for window, i in replayed:
        rollout = window.rollouts[i]
        row = recorded[rollout.problem, rollout.tokens.completion_ids]
        assert row["passed"]
        assert rollout.sampler_log_probs == tuple(row["sampler_log_probs"])
        assert (window.rewards[i].value, float(window.values[i])) == (row["reward"], row["reward"])
        assert rollout.sample == window.group_size - 1, "the last of the group"
    assert float(trainer.logged_metrics["train/ratio"]) != 1.0
    share = len([1 for w, _ in replayed if w.step == 4]) / len(windows[4].rollouts)
    assert float(trainer.logged_metrics["train/foreign_fraction"]) == pytest.approx(share)
    assert float(trainer.logged_metrics["train/teacher/coverage"]) == pytest.approx(share * windows[4].group_size)


@pytest.mark.slow
def test_the_choice_is_a_function_of_seed_and_slot_alone(tmp_path: Path, pool: Path) -> None:
    windows, _ = mixed(tmp_path / "a", pool, per_group=2)
    callback = TeacherMix(str(pool), select="", per_group=2, seed=3)
    callback.setup(None, None, "fit")  # pyright: ignore[reportArgumentType]
    whole = windows[1]
    size = whole.group_size
    for group in range(len(whole.rows)):  # one rank's part at a time
        own = slice(group * size, (group + 1) * size)
        part = Window(whole.step, [whole.rows[group]], list(whole.rollouts[own]), list(whole.rewards[own]), size, whole.values[own].clone())
        callback.on_rollouts(None, None, part)  # pyright: ignore[reportArgumentType]
        assert [r.tokens for r in part.rollouts] == [r.tokens for r in whole.rollouts[own]]


@pytest.mark.slow
def test_nothing_is_replayed_from_the_given_step_on(tmp_path: Path, pool: Path) -> None:
    windows, _ = mixed(tmp_path, pool, until_step=2)
    sources = [{rollout.source for rollout in window.rollouts} for window in windows]
    assert sources == [{POLICY, "teacher"}] * 2 + [{POLICY}] * 3


def test_the_seed_finds_its_own_teacher_and_the_selection_sees_text_alone(tmp_path: Path, pool: Path) -> None:
    named = tmp_path / "teacher-7"
    named.symlink_to(pool)
    callback = TeacherMix(str(tmp_path / "teacher-{seed}"), select="", seed=7)
    callback.setup(None, None, "fit")  # pyright: ignore[reportArgumentType]
    assert callback._rows
    assert "label" not in COLUMNS
    assert "correct" not in COLUMNS
    with pytest.raises(ValueError, match="None of the rewarded rollouts"):
        TeacherMix(str(pool), select="no policy of these tests writes this").setup(None, None, "fit")  # pyright: ignore[reportArgumentType]


def test_what_cannot_be_replayed_is_refused(tmp_path: Path, pool: Path) -> None:
    with pytest.raises(ValueError, match="no rollout table"):
        TeacherMix(str(tmp_path / "nothing")).setup(None, None, "fit")  # pyright: ignore[reportArgumentType]
    pd.DataFrame({"problem": ["a"]}).to_parquet(tmp_path / "short.parquet")
    with pytest.raises(ValueError, match="no column 'completion'"):
        TeacherMix(str(tmp_path / "short.parquet")).setup(None, None, "fit")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="none of its own"):
        mixed(tmp_path / "a", pool, per_group=4)
    other = pd.read_parquet(sorted(pool.glob("*.parquet"))[0])
    other["prompt_ids"] = [[1, 2, 3]] * len(other)
    other.to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="token for token"):
        mixed(tmp_path / "b", tmp_path / "other.parquet")
    refused: list[dict[str, Any]] = [{"per_group": 0}, {"until_step": 0}, {"source": "policy"}]
    for settings in refused:
        with pytest.raises(ValueError, match=next(iter(settings))):
            TeacherMix("x", **settings)
