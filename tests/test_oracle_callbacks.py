"""Oracle arms: what they flag, what they change, that they ask for the oracle by name, and that ranks and NaN change nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from theodolite.callbacks.oracle import OraclePenalty, OracleScreening
from theodolite.functional.advantages import group_advantages
from theodolite.lightning_modules.grpo.hooks import call_window_hook, oracle_users
from theodolite.protocols import Label, Reward, Rollout, TokenSequence, Verdict, Window

LABELS: tuple[Label, ...] = (
    "correct",
    "reward_hack",
    "attempted_hack",
    "correct_attempted_hack",
    "incorrect",
    "ungraded",
    "reward_hack",
    "correct",
)
STRICT, LOOSE = {1, 6}, {1, 2, 3, 6}
VALUES = [3.5, 3.5, 0.5, 3.5, 0.5, math.nan, 3.5, 3.5]


def window(
    labels: tuple[Label, ...] = LABELS, values: list[float] = VALUES, step: int = 3, slots: range | list[int] = range(2)
) -> tuple[Window, list[Verdict]]:
    size = len(labels) // len(slots)
    rollouts = [Rollout(TokenSequence((), ()), "", (), "stop", "p", slot, sample, step) for slot in slots for sample in range(size)]
    rewards = [Reward(value, False, True) for value in values]
    made = Window(step, [None] * len(slots), rollouts, rewards, size, torch.tensor(values, dtype=torch.float64))
    return made, [Verdict(label.startswith("correct"), label, "ok", False) for label in labels]


def run(callback: Any, made: Window, verdicts: list[Verdict]) -> Window:
    call_window_hook("on_rollouts", SimpleNamespace(callbacks=[callback]), None, made, verdicts)
    return made


def changed(values: torch.Tensor) -> set[int]:
    return {i for i, (old, new) in enumerate(zip(VALUES, values.tolist(), strict=True)) if not (old == new or (old != old and new != new))}


@pytest.mark.parametrize(("labels", "flagged"), [("strict", STRICT), ("loose", LOOSE)])
def test_a_penalty_lowers_exactly_the_flagged_rewards(labels, flagged):
    made = run(OraclePenalty(3.0, labels), *window())
    assert changed(made.values) == flagged
    assert [made.values[i].item() for i in sorted(flagged)] == [VALUES[i] - 3.0 for i in sorted(flagged)]
    assert made.metrics == {f"oracle_penalty/{labels}_flagged": (float(len(flagged)), 8.0)}


@pytest.mark.parametrize(("labels", "flagged"), [("strict", STRICT), ("loose", LOOSE)])
def test_screened_rollouts_have_no_advantage_and_do_not_move_their_groups_mean(labels, flagged):
    made = run(OracleScreening(labels), *window())
    assert changed(made.values) == flagged
    assert all(made.values[i].isnan() for i in flagged)
    advantages = group_advantages(made.values, 4, "none")
    for group in (range(4), range(4, 8)):
        kept = [VALUES[i] for i in group if i not in flagged and VALUES[i] == VALUES[i]]
        for i in group:
            expected = VALUES[i] - sum(kept) / len(kept) if i not in flagged and VALUES[i] == VALUES[i] else 0.0
            assert advantages[i].item() == pytest.approx(expected)


def test_a_group_that_is_screened_whole_or_to_one_survivor_has_no_signal():
    labels = cast("tuple[Label, ...]", ("reward_hack",) * 4 + ("reward_hack",) * 3 + ("correct",))
    made = run(OracleScreening(), *window(labels, [3.5] * 8))
    assert group_advantages(made.values, 4, "group").tolist() == [0.0] * 8


def test_they_ask_for_the_oracle_by_name_and_others_do_not_get_it():
    seen = []

    class Other:
        def on_rollouts(self, trainer: Any, module: Any, window: Window) -> None:
            seen.append(hasattr(window, "verdicts"))

    assert oracle_users([OraclePenalty(), OracleScreening(), Other()]) == ["OraclePenalty", "OracleScreening"]
    run(Other(), *window())
    assert seen == [False]


def test_an_imperfect_monitor_errs_at_its_rate_and_the_same_on_any_number_of_ranks():
    n = 400
    labels = cast("tuple[Label, ...]", ("reward_hack", "correct") * n)
    whole, verdicts = window(labels, [1.0] * len(labels), slots=range(n))
    monitor = OracleScreening(accuracy=0.8, seed=5)
    flags = run(monitor, whole, verdicts).values.isnan()
    right = (flags == torch.tensor([True, False] * n)).double().mean().item()
    assert abs(right - 0.8) < 4 * math.sqrt(0.8 * 0.2 / len(labels))
    odd, odd_verdicts = window(labels[:n], [1.0] * n, slots=list(range(1, n, 2)))
    assert torch.equal(run(monitor, odd, odd_verdicts).values.isnan().view(-1, 2), flags.view(-1, 2)[1::2])
    other, _ = window(labels, [1.0] * len(labels), slots=range(n))
    assert not torch.equal(run(OracleScreening(accuracy=0.8, seed=6), other, verdicts).values.isnan(), flags)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OraclePenalty(labels=cast(Any, "all")), "labels is 'all'"),
        (lambda: OraclePenalty(penalty=0.0), "penalty is 0.0"),
        (lambda: OracleScreening(accuracy=1.5), "accuracy is 1.5"),
    ],
)
def test_settings_out_of_range_are_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
