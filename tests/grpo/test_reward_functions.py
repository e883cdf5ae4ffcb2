"""Reward functions with TRL's signature: summed, told apart when silent, failing or hanging, and trained on."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_fits import fit
from tiny_policies import TinyPrompts

from theodolite.datamodules.reward_functions import RewardFunctions
from theodolite.datamodules.reward_worker import load
from theodolite.protocols import Environment


@dataclass(frozen=True)
class Asked:
    id: str
    prompt: Any
    target: int


ROWS = [Asked("a", "Say.", 3), Asked("b", "Say.", 5)]


def graded(*names: str, rows: Any = ROWS, texts: tuple[str, str] = ("abc", "abc"), **settings: Any) -> list[Any]:
    arguments: dict[str, Any] = {"timeout_s": 20.0} | settings
    environment = RewardFunctions([f"plain_rewards.{name}" for name in names], **arguments)
    assert isinstance(environment, Environment)
    try:
        return environment.grade(rows, texts)
    finally:
        environment.close()


def test_rewards_are_weighted_and_added_over_the_functions_that_say_something() -> None:
    one, two = graded("length", "silent_on_first", weights=[2.0, 4.0])
    assert (one.reward.value, two.reward.value) == (2.0, 1.0)
    assert math.isnan(one.reward.parts["silent_on_first"])
    assert two.reward.parts == {"length": 0.0, "silent_on_first": 0.25}
    assert all(math.isnan(grade.reward.value) and grade.verdict.status == "not_scored" for grade in graded("never"))


@pytest.mark.parametrize(("name", "status"), [("raises", "reward_error"), ("too_few", "reward_error"), ("hangs", "reward_timeout")])
def test_a_function_that_fails_or_hangs_rewards_nothing_and_the_next_call_works(name: str, status: str, caplog: Any) -> None:
    start = time.monotonic()
    environment = RewardFunctions([f"plain_rewards.{name}"], timeout_s=12.0 if status == "reward_error" else 1.0)
    grades = environment.grade(ROWS, ["abc", "abc"])
    assert all(math.isnan(grade.reward.value) and grade.verdict.label == "ungraded" and grade.verdict.status == status for grade in grades)
    assert name in caplog.text
    environment.functions, environment.timeout_s = ["plain_rewards." + name], 12.0
    environment.close()
    assert time.monotonic() - start < 50


def test_the_oracle_measures_and_tells_a_hack_from_an_answer() -> None:
    labels = [g.verdict.label for g in graded("length", texts=("abc", "abcd"), oracle="plain_rewards.odd")]
    assert labels == ["correct", "incorrect"]
    rows = [Asked("a", "Say.", 4), Asked("b", "Say.", 5)]
    labels = [g.verdict.label for g in graded("length", rows=rows, texts=("abcd", "abcde"), oracle="plain_rewards.odd")]
    assert labels == ["reward_hack", "correct"]


def test_chat_prompts_get_chat_completions() -> None:
    rows = [Asked(name, [{"role": "user", "content": "Say."}], 0) for name in "ab"]
    assert [grade.reward.value for grade in graded("chat", rows=rows)] == [1.0, 1.0]


def test_functions_that_do_not_exist_and_weights_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be imported"):
        RewardFunctions(["plain_rewards.nothing"])
    with pytest.raises(ValueError, match="came with 2 weights"):
        RewardFunctions(["plain_rewards.length"], weights=[1.0, 2.0])


def test_a_policy_trains_on_them(tmp_path: Path) -> None:
    data = TinyPrompts()
    data.environment = RewardFunctions(["plain_rewards.vowels"])  # pyright: ignore[reportAttributeAccessIssue]
    _, trainer = fit(tmp_path, data=data)
    assert 0 < float(trainer.logged_metrics["train/reward_mean"]) < 1
    assert float(trainer.logged_metrics["train/reward/vowels"]) == pytest.approx(float(trainer.logged_metrics["train/reward_mean"]))


REWARDS_WITH_CLASSES = """
from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Answer:
    text: str


def kept(completions: list[str], **columns: object) -> list[float]:
    return [float(Answer(text) == Answer("{expected}")) for text in completions]
"""


def test_files_of_one_name_are_modules_of_their_own_whose_classes_are_found(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(REWARDS_WITH_CLASSES.replace("{expected}", name))
        found.append(load(f"{tmp_path / name / 'mine.py'}:kept"))
    assert [function(completions=["a", "b"]) for function in found] == [[1.0, 0.0], [0.0, 1.0]]
    (tmp_path / "broken.py").write_text("import nowhere_at_all\n")
    with pytest.raises(ValueError, match="cannot be imported"):
        load(f"{tmp_path / 'broken.py'}:kept")
    assert not [name for name in sys.modules if name.startswith("rewards_of_broken")], "a file that fails leaves no half of itself"
