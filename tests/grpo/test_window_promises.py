"""What a window's second half promises: bounded microbatches, every prompt computed once, grading beside the passes without gradient."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_fits import TINY, PlainDescent, fit
from tiny_policies import Row, TextGrader, TinyPrompts

from theodolite.lightning_modules.grpo import gradients
from theodolite.lightning_modules.grpo.window import cut
from theodolite.lightning_modules.split_prefix import SplitPrefix
from theodolite.protocols import Grade, Reward, Window


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.one_of(st.none(), st.integers(1, 8)),
    st.one_of(st.none(), st.integers(1, 120)),
)
def test_microbatches_hold_every_rollout_once_and_no_more_than_rows_and_tokens_allow(
    lengths: list[int], most_rows: int | None, most_tokens: int | None
) -> None:
    microbatches = cut(range(len(lengths)), lengths, most_rows, most_tokens)
    assert sorted(i for microbatch in microbatches for i in microbatch) == list(range(len(lengths)))
    for microbatch in microbatches:
        assert most_rows is None or len(microbatch) <= most_rows
        computed = len(microbatch) * max(lengths[i] for i in microbatch)
        assert most_tokens is None or computed <= most_tokens or len(microbatch) == 1, "padding counts: it is computed too"


class Counted(SplitPrefix):
    """Writes down which prompts are computed together."""

    runs: list[list[tuple[int, ...]]]

    def __init__(self, backbone: Any, prompts: Sequence[tuple[int, ...]], *arguments: Any) -> None:
        self.runs.append(list(prompts))
        super().__init__(backbone, prompts, *arguments)


@pytest.mark.parametrize("token_budget", [None, 24])
def test_no_prompt_is_computed_twice_in_a_window_however_many_microbatches_continue_it(
    tmp_path: Path, token_budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Active(Callback):
        prompts: set[tuple[int, ...]]
        microbatches = 0

        def on_advantages(self, trainer: Any, pl_module: Any, window: Window) -> None:
            taught = [i for i in range(len(window.rollouts)) if bool(window.advantages[i])]
            self.prompts = {window.rollouts[i].tokens.prompt_ids for i in taught}

        def on_microbatch_gradients(self, trainer: Any, pl_module: Any, window: Window, part: str) -> None:
            self.microbatches += 1

    active = Active()
    monkeypatch.setattr(Counted, "runs", [], raising=False)
    monkeypatch.setattr(gradients, "SplitPrefix", Counted)
    monkeypatch.setattr(PlainDescent, "_check_path_once", lambda *_: None)
    fit(tmp_path, active, split_backward=True, token_budget=token_budget)
    computed = [prompt for run in Counted.runs for prompt in run]
    assert len(computed) == len(set(computed)) == len(active.prompts)
    assert (active.microbatches > 2 * len(Counted.runs)) == (token_budget is not None), "one per run, and one for its prompts"


class Waiting(TextGrader):
    """Has no grades before something else was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.scored = threading.Event()

    def grade(self, rows: Sequence[Row], completions: Sequence[str]) -> list[Grade]:
        assert self.scored.wait(20), "nothing was computed while completions were graded"
        return super().grade(rows, completions)


def test_old_and_reference_log_probs_are_computed_while_completions_are_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = TinyPrompts()
    data.environment = waiting = Waiting()
    anchors = PlainDescent.anchor_log_probs

    def noted(self: Any, *arguments: Any) -> Any:
        found = anchors(self, *arguments)
        waiting.scored.set()
        return found

    monkeypatch.setattr(PlainDescent, "anchor_log_probs", noted)
    _, trainer = fit(tmp_path, data=data, beta=0.1, overlap_grading=True)
    assert trainer.global_step == 1


def test_a_sampler_in_the_trainer_s_process_is_not_corrected_unless_that_is_asked_for() -> None:
    assert PlainDescent(**TINY).mismatch is None
    asked = {"mode": "token_tis", "high": 2.0}
    assert PlainDescent(**TINY, mismatch=asked).mismatch == ("token_tis", 0.0, 2.0)


class Rewards(Callback):
    """Rewards of every window."""

    def __init__(self) -> None:
        self.values: list[list[float]] = []

    def on_rollouts(self, trainer: Any, pl_module: Any, window: Window) -> None:
        self.values.append(window.values.tolist())


class Dice(TextGrader):
    """Rewards drawn from the libraries' global generators."""

    def one(self, row: Row, text: str) -> Grade:
        drawn = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return replace(super().one(row, text), reward=Reward(drawn, False, False))


def test_a_resumed_run_draws_from_global_generators_what_the_uninterrupted_one_drew(tmp_path: Path) -> None:
    def rewards(name: str, steps: int, ckpt_path: Any = None) -> tuple[list[list[float]], Any]:
        data, seen = TinyPrompts(), Rewards()
        data.environment = Dice()
        _, trainer = fit(tmp_path / name, seen, steps=steps, data=data, ckpt_path=ckpt_path)
        return seen.values, trainer

    whole, _ = rewards("whole", 2)
    first, trainer = rewards("first", 1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    random.random()
    torch.rand(3)
    rest, _ = rewards("rest", 2, tmp_path / "first.ckpt")
    assert first + rest == whole
    assert whole[0] != whole[1]
