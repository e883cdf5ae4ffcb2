"""What callbacks and configs may change in a window, each against the gradient it must then have."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from grpo_fits import Gradients, PlainDescent, deviation, fit, flat_gradient

from theodolite.lightning_modules.grpo.hooks import measures_parts
from theodolite.lightning_modules.grpo.window import prefix_runs
from theodolite.protocols import OracleWindow, Reward, TokenSequence, Window
from theodolite.replay import POLICY, replace_rollout


def gradient_of(path: Path, *callbacks: Any, **settings: Any) -> Tensor:
    gradients = Gradients()
    fit(path, *callbacks, gradients, max_grad_norm=0.0, **settings)
    return gradients.seen[0]


# -- losses --------------------------------------------------------------------------------------------------------------------------------


def test_a_loss_of_one_s_own_is_named_by_class_path_and_its_statistics_are_logged(tmp_path: Path) -> None:
    own = {"class_path": "grpo_fits.Reinforce", "init_args": {"factor": 3.0}}
    gradients = Gradients()
    _, trainer = fit(tmp_path, gradients, loss=own, max_grad_norm=0.0)
    assert "train/advantage_seen" in trainer.logged_metrics
    assert deviation(gradients.seen[0], 3.0 * gradient_of(tmp_path)) < 1e-5, "on policy the clipped surrogate is REINFORCE"


@pytest.mark.parametrize(
    "loss",
    [
        {"class_path": "theodolite.lightning_modules.grpo.losses.CISPOLoss"},
        {"class_path": "theodolite.lightning_modules.grpo.losses.ClippedLoss", "init_args": {"ratio": "sequence_token"}},
        {"class_path": "theodolite.lightning_modules.grpo.losses.ClippedLoss", "init_args": {"dual_clip": 3.0, "ratio_cap": 4.0}},
    ],
)
@pytest.mark.parametrize("split_backward", [False, True])
def test_on_policy_every_loss_has_the_plain_policy_gradient(tmp_path: Path, loss: dict[str, Any], split_backward: bool) -> None:
    found = gradient_of(tmp_path, loss=loss, split_backward=split_backward)
    assert deviation(found, gradient_of(tmp_path)) < 1e-5


def test_gspo_on_policy_is_the_policy_gradient_of_sequence_means(tmp_path: Path) -> None:
    gspo = {"class_path": "theodolite.lightning_modules.grpo.losses.ClippedLoss", "init_args": {"ratio": "sequence"}}
    assert deviation(gradient_of(tmp_path, loss=gspo, aggregation="grpo"), gradient_of(tmp_path, aggregation="grpo")) < 1e-5


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"loss": {"class_path": "grpo_fits.Nothing"}}, "cannot be made"),
    ({"loss": {"class_path": "nowhere.Loss"}}, "cannot be made"),
    ({"loss": {"class_path": "grpo_fits.TINY"}}, "cannot be made"),
    ({"loss": {"class_path": "theodolite.lightning_modules.grpo.losses.ClippedLoss", "init_args": {"dual_clip": 0.5}}}, "exceed 1"),
    ({"loss": {"class_path": "theodolite.lightning_modules.grpo.losses.ClippedLoss", "init_args": {"ratio": "x"}}}, "sequence_token"),
    ({"loss": {"class_path": "theodolite.lightning_modules.grpo.losses.ClippedLoss", "init_args": {"ratio_cap": 1.1}}}, "undo the clip"),
    ({"mismatch": {"mode": "tis", "high": 2.0}}, "token_tis"),
    ({"mismatch": {"mode": "token_tis"}}, "give mode"),
    ({"mismatch": {"mode": "token_tis", "high": 2.0}, "top_p": 0.9}, "top_p or top_k truncate"),
    ({"mismatch": {"mode": "token_tis", "high": 2.0}, "top_k": 5}, "top_p or top_k truncate"),
    ({"top_p": 0.9}, "top_p=0.9 and model.top_k=0 cut what is sampled"),
    ({"top_k": 5}, "set top_p to 1 and top_k to 0"),
    ({"top_k": 5, "truncated_sampling": "renormalised"}, "refuse, untruncated"),
    ({"truncated": "drop"}, "keep, mask, exclude"),
    ({"zero_variance": "keep"}, "skip, drop, refill"),
    ({"reward_mix": "gdpo"}, "needs model.reward_weights"),
    ({"reward_mix": "gdpo", "reward_weights": {"a": 1.0}, "zero_variance": "drop"}, "set zero_variance to skip"),
    ({"reward_mix": "gdpo", "reward_weights": {"a": 1.0}, "zero_variance": "refill"}, "or reward_mix to sum"),
    ({"overlong_buffer": 13}, "must not exceed max_new_tokens"),
    ({"token_budget": 0}, "at least 1"),
]


@pytest.mark.parametrize(("settings", "said"), REFUSED, ids=[f"{said}{i}" for i, (_, said) in enumerate(REFUSED)])
def test_objectives_that_cannot_work_are_refused_in_one_sentence(settings: dict[str, Any], said: str) -> None:
    from grpo_fits import TINY

    with pytest.raises(ValueError, match=said):
        PlainDescent(**(TINY | settings))


# -- weights and advantages ----------------------------------------------------------------------------------------------------------------


class Change(Callback):
    """Calls a function on the window when advantages are there."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def on_advantages(self, trainer: Any, pl_module: Any, window: Window) -> None:
        self.change(window)


def half_weights(window: Window) -> None:
    window.weights = torch.full((len(window.rollouts),), 0.5)


def token_weights_of_half(window: Window) -> None:
    window.weights = torch.full((len(window.rollouts), 12), 0.5)


def half_token_advantages(window: Window) -> None:
    window.advantages = 0.5 * window.advantages[:, None].expand(-1, 12)


@pytest.mark.parametrize("change", [half_weights, token_weights_of_half, half_token_advantages])
@pytest.mark.parametrize("split_backward", [False, True])
def test_weights_and_token_advantages_scale_the_gradient_and_nothing_else(tmp_path: Path, change: Any, split_backward: bool) -> None:
    plain = gradient_of(tmp_path)
    assert deviation(gradient_of(tmp_path, Change(change), split_backward=split_backward), 0.5 * plain) < 1e-5


def test_advantages_of_single_tokens_reach_only_these_tokens(tmp_path: Path) -> None:
    def first_token_only(window: Window) -> None:
        window.advantages = torch.zeros(len(window.rollouts), 12, dtype=torch.float64)
        window.advantages[:, 0] = 1.0

    found = gradient_of(tmp_path, Change(first_token_only))
    reference = Gradients()

    def check(window: Window) -> None:
        for rollout in window.rollouts:
            first = rollout.tokens.completion_ids[:1]
            rollout.tokens = TokenSequence(rollout.tokens.prompt_ids, first)
            rollout.sampler_log_probs = rollout.sampler_log_probs[:1]
        window.advantages = torch.ones(len(window.rollouts), dtype=torch.float64)

    fit(tmp_path, Change(check), reference, max_grad_norm=0.0, aggregation="dr_grpo")
    assert deviation(gradient_of(tmp_path, Change(first_token_only), aggregation="dr_grpo"), reference.seen[0]) < 1e-5
    assert float(found.norm()) > 0


def test_too_few_columns_are_refused(tmp_path: Path) -> None:
    def narrow(window: Window) -> None:
        window.advantages = window.advantages[:, None].expand(-1, 2)

    with pytest.raises(ValueError, match="one column per token"):
        fit(tmp_path, Change(narrow))


# -- named parts ---------------------------------------------------------------------------------------------------------------------------


class Parts(Callback):
    """Names two parts, sees each alone, and may silence one."""

    def __init__(self, silence: str | None = None) -> None:
        self.silence, self.seen = silence, {}

    def on_advantages(self, trainer: Any, pl_module: Any, window: Window) -> None:
        window.parts = ["even" if rollout.sample % 2 == 0 else "odd" for rollout in window.rollouts]

    def on_part_gradients(self, trainer: Any, pl_module: Any, window: Window, part: str) -> None:
        self.seen[part] = flat_gradient(pl_module)
        if part == self.silence:
            for parameter in pl_module.trainable_parameters():
                parameter.grad.zero_()


@pytest.mark.parametrize("split_backward", [False, True])
def test_named_parts_are_seen_alone_may_be_changed_and_add_up(tmp_path: Path, split_backward: bool) -> None:
    plain, parts = gradient_of(tmp_path), Parts()
    assert deviation(gradient_of(tmp_path, parts, split_backward=split_backward), plain) < 1e-5
    assert set(parts.seen) == {"even", "odd"}
    assert deviation(parts.seen["even"] + parts.seen["odd"], plain) < 1e-5
    assert min(float(gradient.norm()) for gradient in parts.seen.values()) > 0
    assert deviation(gradient_of(tmp_path, Parts("odd"), split_backward=split_backward), parts.seen["even"]) < 1e-5


class Credits(Callback):
    """What every microbatch, and the prompts after it, add to the gradient, by the part they are said to be of."""

    def __init__(self) -> None:
        self.before: Any = 0.0
        self.seen: dict[str, Any] = {}

    on_advantages = Parts.on_advantages

    def on_microbatch_gradients(self, trainer: Any, pl_module: Any, window: Window, part: str) -> None:
        present = [torch.zeros_like(p) if p.grad is None else p.grad for p in pl_module.trainable_parameters()]
        now = torch.cat([gradient.flatten() for gradient in present])
        self.seen[part], self.before = self.seen.get(part, 0.0) + now - self.before, now


def test_what_microbatches_of_a_part_add_is_its_whole_gradient_prompts_included(tmp_path: Path) -> None:
    parts, credits = Parts(), Credits()
    fit(tmp_path, parts, split_backward=True, max_grad_norm=0.0)
    fit(tmp_path, credits, split_backward=True, max_grad_norm=0.0, micro_batch_size=2)
    assert set(credits.seen) == {"even", "odd"}
    for name, gradient in parts.seen.items():
        assert deviation(credits.seen[name], gradient) < 1e-5


def test_prompts_are_computed_together_across_parts_unless_a_callback_tells_them_apart() -> None:
    prompts, microbatches = [(1, 2), (3,)], [[0], [1], [0]]
    assert prefix_runs(microbatches, prompts, None) == [(prompts, [0, 1, 2])]
    assert prefix_runs(microbatches, prompts, None, ["a"] * 3) == [(prompts, [0, 1, 2])]
    assert prefix_runs(microbatches, prompts, None, ["a", "a", "b"]) == [(prompts, [0, 1]), ([(1, 2)], [2])]
    assert measures_parts([Parts(), Credits()])
    quiet = Credits()
    quiet.measure_parts = False  # pyright: ignore[reportAttributeAccessIssue]
    assert not measures_parts([Parts(), quiet])


# -- rollouts of another source ------------------------------------------------------------------------------------------------------------


class Teacher(Callback):
    """Replaces one rollout per group by a teacher's, whose log-probabilities are those of the policy, shifted."""

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def on_rollouts(self, trainer: Any, pl_module: Any, window: Window) -> None:
        for i in range(0, len(window.rollouts), window.group_size):
            rollout = window.rollouts[i]
            log_probs = tuple(value + self.shift for value in rollout.sampler_log_probs)
            reward = Reward(2.0, True, True)
            replace_rollout(window, i, rollout.tokens, rollout.text, log_probs, reward, "teacher", rollout.finish)


class BySource(Parts):
    """Parts default to sources."""

    def on_advantages(self, trainer: Any, pl_module: Any, window: Window) -> None: ...


class Witness(Callback):
    uses_oracle = True

    def __init__(self) -> None:
        self.labels: list[tuple[str, str]] = []

    def on_advantages(self, trainer: Any, pl_module: Any, window: OracleWindow) -> None:
        self.labels = [(rollout.source, verdict.status) for rollout, verdict in zip(window.rollouts, window.verdicts, strict=True)]


@pytest.mark.parametrize("split_backward", [False, True])
def test_a_teacher_s_rollouts_enter_with_their_true_ratios_and_are_flagged_everywhere(tmp_path: Path, split_backward: bool) -> None:
    shift = -0.1  # inside of the clip: every token of the teacher counts exp(0.1) times
    same, shifted, witness = BySource(), BySource(), Witness()
    for parts, by in ((same, 0.0), (shifted, shift)):
        _, trainer = fit(tmp_path, Teacher(by), parts, witness, max_grad_norm=0.0, split_backward=split_backward)
    assert set(shifted.seen) == {POLICY, "teacher"}
    assert deviation(shifted.seen["policy"], same.seen["policy"]) < 1e-5
    assert deviation(shifted.seen["teacher"], torch.e**-shift * same.seen["teacher"]) < 1e-5
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert logged["train/teacher/reward_mean"] == 2.0
    assert logged["train/foreign_fraction"] == 0.25
    assert logged["train/sampler_gap"] < 1e-5, "the teacher is no sampler of this policy"
    assert logged["train/ratio"] > 1.0
    assert ("teacher", "replayed") in witness.labels
    assert not any(source == "teacher" and status != "replayed" for source, status in witness.labels)


def test_a_replacement_that_would_falsify_its_group_or_its_ratios_is_refused(tmp_path: Path) -> None:
    def bad(change: Any) -> Any:
        class Bad(Callback):
            def on_rollouts(self, trainer: Any, pl_module: Any, window: Window) -> None:
                rollout = window.rollouts[0]
                arguments = {"tokens": rollout.tokens, "text": "", "log_probs": rollout.sampler_log_probs, "source": "teacher"}
                replace_rollout(window, 0, reward=Reward(1.0, True, True), **(arguments | change(rollout)))

        return Bad()

    for change, said in (
        (lambda r: {"tokens": TokenSequence((1, 2), r.tokens.completion_ids)}, "another prompt"),
        (lambda r: {"log_probs": ()}, "each needs its author's"),
        (lambda r: {"source": POLICY}, "other than 'policy'"),
    ):
        with pytest.raises(ValueError, match=said):
            fit(tmp_path, bad(change))
