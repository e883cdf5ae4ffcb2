"""Truncated completions, groups without signal, several rewards, and penalties: who is counted, and what reaches the gradient."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_fits import PlainDescent, fit
from tiny_policies import Row, TextGrader, TinyPrompts

from theodolite.datamodules.samplers import DistributedBatchSampler
from theodolite.functional.advantages import gdpo_advantages
from theodolite.lightning_modules.grpo.settings import check_reserve
from theodolite.protocols import Grade, Reward, Verdict, Window
from theodolite.seeds import derive_seed


class Seen(Callback):
    """The window after advantages, and its totals."""

    def __init__(self) -> None:
        self.window: Any = None
        self.totals: Any = None
        self.active: list[int] = []

    def on_advantages(self, trainer: Any, pl_module: Any, window: Window) -> None:
        self.window, self.totals = window, pl_module.totals(window)
        ones = torch.ones(len(window.rollouts), dtype=torch.float64)
        self.active = [i for m in pl_module.microbatches(window, ones) for i in m]


def seen(path: Path, **settings: Any) -> tuple[Seen, PlainDescent, dict[str, float]]:
    watch = Seen()
    module, trainer = fit(path, watch, **settings)
    return watch, module, {name: float(value) for name, value in trainer.logged_metrics.items()}  # pyright: ignore[reportReturnType]


def lengths(window: Window) -> list[int]:
    return [len(rollout.tokens.completion_ids) for rollout in window.rollouts]


# -- truncated completions -----------------------------------------------------------------------------------------------------------------


def test_truncated_completions_leave_loss_and_denominators_and_on_request_the_group_s_mean(tmp_path: Path) -> None:
    kept, _, _ = seen(tmp_path)
    cut_off = [i for i, rollout in enumerate(kept.window.rollouts) if rollout.finish == "length"]
    ended = [i for i in range(16) if i not in cut_off]
    assert cut_off, "the random policy must run into the limit"
    assert ended
    assert kept.totals.tokens == sum(lengths(kept.window))
    assert set(cut_off) & set(kept.active)
    masked, _, _ = seen(tmp_path, truncated="mask")
    assert masked.totals.rollouts == len(ended)
    assert masked.totals.tokens == sum(lengths(masked.window)[i] for i in ended)
    assert not set(cut_off) & set(masked.active)
    torch.testing.assert_close(masked.window.advantages, kept.window.advantages)
    excluded, _, _ = seen(tmp_path, truncated="exclude")
    assert excluded.window.values[cut_off].isnan().all()
    assert excluded.totals == masked.totals


# -- groups without signal -----------------------------------------------------------------------------------------------------------------


class Uneven(TextGrader):
    """Some problems earn the same whatever is written."""

    def __init__(self, dead: Sequence[str]) -> None:
        super().__init__()
        self.dead = set(dead)

    def one(self, row: Row, text: str) -> Grade:
        value = 0.5 if row.id in self.dead else derive_seed(row.id, text.encode().hex()) % 5 / 4
        return Grade(Reward(value, value > 0.5, True), Verdict(False, "incorrect", "ok", False))


def uneven() -> TinyPrompts:
    data = TinyPrompts(rows=4)
    data.environment = Uneven(("train0", "train1"))
    return data


def test_groups_without_signal_are_skipped_but_counted_or_dropped_and_not_counted(tmp_path: Path) -> None:
    skipped, _, logged = seen(tmp_path, data=uneven())
    dead = [i for i, rollout in enumerate(skipped.window.rollouts) if rollout.problem in ("train0", "train1")]
    assert len(dead) == 8
    assert logged["train/groups_with_signal"] == 0.5
    assert not set(dead) & set(skipped.active)
    assert skipped.totals.rollouts == 16
    dropped, _, _ = seen(tmp_path, data=uneven(), zero_variance="drop")
    assert dropped.totals.rollouts == 8
    assert dropped.totals.tokens == sum(n for i, n in enumerate(lengths(dropped.window)) if i not in dead)
    pulled, _, _ = seen(tmp_path, data=uneven(), beta=0.1)
    assert set(dead) & set(pulled.active), "with a KL term a group without signal still pulls towards the reference"
    free, _, _ = seen(tmp_path, data=uneven(), beta=0.1, zero_variance="drop")
    assert not set(dead) & set(free.active)


class Half(TextGrader):
    """Problems with an odd number never teach anything; ``hopeless`` ones neither."""

    def __init__(self, hopeless: bool = False) -> None:
        super().__init__()
        self.hopeless = hopeless
        self.asked: list[list[str]] = []

    def grade(self, rows: Sequence[Row], completions: Sequence[str]) -> list[Grade]:
        self.asked.append([row.id for row in rows[::4]])
        return super().grade(rows, completions)

    def one(self, row: Row, text: str) -> Grade:
        dead = self.hopeless or int(row.id.removeprefix("train")) % 2
        value = 0.5 if dead else derive_seed(row.id, text.encode().hex()) % 1000 / 1000
        return Grade(Reward(value, value > 0.5, True), Verdict(False, "incorrect", "ok", False))


def half(rows: int = 20, hopeless: bool = False) -> tuple[TinyPrompts, Half]:
    data, grader = TinyPrompts(rows=rows), Half(hopeless)
    data.environment = grader
    return data, grader


def refilled_by_hand(first: list[str], further: list[int], attempts: int) -> tuple[list[str], list[list[str]]]:
    """The prompt in each slot at the end, and those that every round tries."""
    slots, reserve, rounds = list(first), [f"train{i}" for i in further if f"train{i}" not in first], []
    for _ in range(attempts):
        dead = [k for k, row in enumerate(slots) if int(row[5:]) % 2]
        tried, reserve = reserve[: len(dead)], reserve[len(dead) :]
        if not tried:
            break
        rounds.append(tried)
        for k, row in zip(dead, tried, strict=False):
            slots[k] = slots[k] if int(row[5:]) % 2 else row
    return slots, rounds


@pytest.mark.parametrize(("rows", "attempts"), [(20, 4), (20, 1), (6, 5)])
def test_dead_groups_slots_go_to_further_prompts_until_they_teach_or_rounds_or_data_end(tmp_path: Path, rows: int, attempts: int) -> None:
    data, grader = half(rows)
    found, _, logged = seen(tmp_path, data=data, zero_variance="refill", refill_attempts=attempts)
    first, rounds = grader.asked[0], grader.asked[1:]
    slots, tried = refilled_by_hand(first, DistributedBatchSampler(rows, 4).further(0), attempts)
    assert rounds == tried
    assert len({row for call in grader.asked for row in call}) == sum(map(len, grader.asked)), "no prompt is tried twice"
    assert [row.id for row in found.window.rows] == slots
    assert [(r.problem, r.slot, r.sample) for r in found.window.rollouts] == [(slots[i // 4], i // 4, i % 4) for i in range(16)]
    assert [float(v) for v in found.window.values] == [reward.value for reward in found.window.rewards]
    alive = [not int(row[5:]) % 2 for row in slots]
    assert logged["train/groups_with_signal"] == sum(alive) / 4
    accepted = sum(a != b for a, b in zip(first, slots, strict=True))
    assert logged["train/refill_accepted"] == accepted / sum(map(len, tried))
    assert logged["train/reward_mean_before_refill"] != pytest.approx(logged["train/reward_mean"])


def test_refilling_ends_where_nothing_helps_and_is_refused_where_no_further_prompts_are_known(tmp_path: Path) -> None:
    data, grader = half(hopeless=True)
    found, _, logged = seen(tmp_path, data=data, zero_variance="refill", refill_attempts=2)
    assert [len(call) for call in grader.asked] == [4, 4, 4]
    assert [row.id for row in found.window.rows] == grader.asked[0], "a slot that stays without signal keeps its own completions"
    assert (logged["train/refill_accepted"], logged["train/groups_with_signal"]) == (0.0, 0.0)
    with pytest.raises(TypeError, match="a NoneType cannot"):
        check_reserve(None)


class Styled(Half):
    """The environment's own sum always varies; of the two components, ``style`` varies on even problems only."""

    def one(self, row: Row, text: str) -> Grade:
        number = derive_seed(row.id, text.encode().hex()) % 1000 / 1000
        style = 0.5 if int(row.id.removeprefix("train")) % 2 else number
        return Grade(Reward(number, True, True, {"style": style, "other": number}), Verdict(False, "incorrect", "ok", False))


def test_groups_are_refilled_where_the_weighted_components_teach_nothing_whatever_the_environment_s_sum_does(tmp_path: Path) -> None:
    data, grader = TinyPrompts(), Styled()
    data.environment = grader
    found, _, logged = seen(tmp_path, data=data, zero_variance="refill", refill_attempts=4, reward_weights={"style": 2.0})
    slots, tried = refilled_by_hand(grader.asked[0], DistributedBatchSampler(20, 4).further(0), 4)
    assert grader.asked[1:] == tried
    assert [row.id for row in found.window.rows] == slots
    assert [float(v) for v in found.window.values] == pytest.approx([2 * reward.parts["style"] for reward in found.window.rewards])
    assert logged["train/groups_with_signal"] == sum(not int(row[5:]) % 2 for row in slots) / 4


# -- several rewards, penalties ------------------------------------------------------------------------------------------------------------


class TwoRewards(TextGrader):
    def one(self, row: Row, text: str) -> Grade:
        number = derive_seed(row.id, text.encode().hex())
        parts = {"style": number % 3 / 2, "size": float("nan") if number % 7 == 0 else 100.0 * (number % 5)}
        return Grade(Reward(0.125, True, True, parts), Verdict(False, "incorrect", "ok", False))


def two_rewards() -> TinyPrompts:
    data = TinyPrompts()
    data.environment = TwoRewards()
    return data


def test_components_are_weighted_and_added_or_normalised_first_and_logged_by_name(tmp_path: Path) -> None:
    weights = {"style": 2.0, "size": 0.5}
    summed, _, logged = seen(tmp_path, data=two_rewards(), reward_weights=weights)
    parts = [reward.parts for reward in summed.window.rewards]
    expected = [2.0 * p["style"] + (0.5 * p["size"] if p["size"] == p["size"] else 0.0) for p in parts]
    assert summed.window.values.tolist() == pytest.approx(expected)
    scored = [p["size"] for p in parts if p["size"] == p["size"]]
    assert 0 < len(scored) < 16
    assert logged["train/reward/size"] == pytest.approx(sum(scored) / len(scored))
    separate, _, _ = seen(tmp_path, data=two_rewards(), reward_weights=weights, reward_mix="gdpo")
    columns = torch.tensor([[p["style"], p["size"], 0.0] for p in parts], dtype=torch.float64)
    torch.testing.assert_close(separate.window.advantages, gdpo_advantages(columns, torch.tensor([2.0, 0.5, 1.0]), 4))


def test_what_a_callback_does_to_values_counts_under_gdpo_too(tmp_path: Path) -> None:
    class Penalise(Callback):
        def on_rollouts(self, trainer: Any, pl_module: Any, window: Window) -> None:
            window.values[::4] -= 1000.0

    watch = Seen()
    weights = {"style": 1.0, "size": 1.0}
    fit(tmp_path, Penalise(), watch, data=two_rewards(), reward_weights=weights, reward_mix="gdpo")
    assert (watch.window.advantages.view(-1, 4)[:, 0] < watch.window.advantages.view(-1, 4)[:, 1:].amax(dim=1)).all()
    without, _, _ = seen(tmp_path, data=two_rewards(), reward_weights=weights, reward_mix="gdpo")
    assert (watch.window.advantages[::4] < without.window.advantages[::4]).all()


def test_overlong_completions_lose_reward_before_advantages(tmp_path: Path) -> None:
    plain, _, _ = seen(tmp_path)
    shaped, _, logged = seen(tmp_path, overlong_buffer=8)
    for before, after, n in zip(plain.window.values, shaped.window.values, lengths(plain.window), strict=True):
        assert float(after - before) == pytest.approx(-max(0.0, n - 4) / 8)
    graded = [reward.value for reward in shaped.window.rewards]
    assert logged["train/reward_mean"] == pytest.approx(sum(graded) / 16), "the reward that is logged is the environment's"


def test_k1_in_the_reward_lowers_it_by_the_sequence_s_divergence_and_leaves_no_kl_term(tmp_path: Path) -> None:
    watch = Seen()
    lora = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    module, trainer = fit(tmp_path, watch, beta=0.25, kl_estimator="k1_reward", lora=lora)
    fresh, _ = fit(tmp_path, lora=lora, lr=0.0)
    rollouts = watch.window.rollouts
    with torch.no_grad():
        reference = fresh.reference_log_probs([rollout.tokens for rollout in rollouts]).sum(dim=1)
    for i, rollout in enumerate(rollouts):
        divergence = sum(rollout.sampler_log_probs) - float(reference[i])
        assert float(watch.window.values[i]) == pytest.approx(watch.window.rewards[i].value - 0.25 * divergence, abs=1e-4)
    assert module.beta_in_loss == 0.0
    assert "train/kl" in trainer.logged_metrics


@pytest.mark.parametrize("mode", ["token_tis", "sequence_mis", "geometric_mis"])
def test_correcting_for_a_sampler_that_is_the_policy_changes_nothing_and_says_so(tmp_path: Path, mode: str) -> None:
    _, _, logged = seen(tmp_path, mismatch={"mode": mode, "low": 0.5, "high": 2.0})
    assert logged["train/mismatch_weight"] == pytest.approx(1.0, abs=1e-5)
    assert logged["train/sampler_sequence_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert logged["train/sampler_kl"] == pytest.approx(0.0, abs=1e-8)


def test_ratios_against_the_sampler_s_log_probs_are_those_of_a_pass_of_one_s_own(tmp_path: Path) -> None:
    fits = [fit(tmp_path, steps=3, updates_per_window=3, reuse_sampler_log_probs=reuse, lr=0.1)[0] for reuse in (True, False)]
    for one, other in zip(*(module.parameters() for module in fits), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_grading_beside_the_passes_without_gradient_changes_nothing(tmp_path: Path) -> None:
    fits = [fit(tmp_path, steps=4, updates_per_window=2, beta=0.1, overlap_grading=overlap, lr=0.1)[0] for overlap in (True, False)]
    for one, other in zip(*(module.parameters() for module in fits), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
