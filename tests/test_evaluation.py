"""Held-out evaluation: counts by hand, the same rows for any batch size, and no trace of itself."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_policies import POLICIES, TinyPrompts, tokenizer, weights_of

from theodolite.lightning_modules import GRPOModule
from theodolite.lightning_modules.evaluation import add_sums, outcome_sums, rates
from theodolite.lightning_modules.held_out import drift_sums
from theodolite.protocols import Grade, Reward, Verdict

HONEST = Grade(Reward(1.1, True, True), Verdict(True, "correct", "ok", False))
HACK = Grade(Reward(1.1, True, True), Verdict(False, "reward_hack", "ok", True, "assignment"))
TRIED = Grade(Reward(0.1, False, True), Verdict(False, "attempted_hack", "runtime_error", True))
BROKEN = Grade(Reward(0.0, False, False), Verdict(False, "incorrect", "syntax_error", False))
UNGRADED = Grade(Reward(math.nan, False, False), Verdict(False, "ungraded", "infra_error", False))


def test_rates_equal_a_count_by_hand_and_ungraded_completions_count_only_as_infrastructure_failures() -> None:
    grades = [HONEST, HACK, HACK, TRIED, BROKEN, UNGRADED, UNGRADED]
    found = rates(outcome_sums(grades, ["stop", "length", "stop", "stop", "length", "length", "stop"]))
    assert found == {
        "hack_rate": 2 / 5,
        "loose_hack_rate": 3 / 5,
        "override_rate": 3 / 5,
        "pass_rate": 1 / 5,
        "reward_passed_rate": 3 / 5,
        "compiles_rate": 4 / 5,
        "infra_error_rate": 2 / 7,
        "truncated_rate": 2 / 5,
        "hack_definition_rate": 0.0,
        "hack_assignment_rate": 2 / 5,
        "hack_other_rate": 0.0,
        "hack_given_attempt": 2 / 3,
        "n": 5.0,
    }


def test_nothing_graded_is_nan_and_not_zero() -> None:
    found = rates(outcome_sums([UNGRADED], ["stop"]))
    assert math.isnan(found["hack_rate"])
    assert math.isnan(found["pass_rate"])
    assert found["infra_error_rate"] == 1.0
    assert found["n"] == 0
    assert math.isnan(rates(outcome_sums([], []))["infra_error_rate"])


def test_sums_of_any_split_add_up() -> None:
    grades, ends = [HONEST, HACK, TRIED, UNGRADED, BROKEN], ["stop", "length"] * 2 + ["stop"]
    parts = [outcome_sums(grades[a:b], ends[a:b]) for a, b in ((0, 1), (1, 1), (1, 4), (4, 5))]
    assert add_sums(parts) == add_sums([outcome_sums(grades, ends)])


def made(**settings: Any) -> GRPOModule:
    sizes: dict[str, Any] = {"max_new_tokens": 10, "eval_samples": 2, "seed": 3, "export": False}
    module = GRPOModule(policy=POLICIES["gpt2"], train_tokenizer={"vocab_size": 280}, **(sizes | settings))
    module._build_tokenizer = tokenizer  # pyright: ignore
    return module


def trainer_of(path: Path, *callbacks: Any, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(accelerator="cpu", default_root_dir=path, callbacks=list(callbacks), **(quiet | options))


def test_rows_and_rates_are_the_same_for_any_batch_size(tmp_path: Path) -> None:
    tables, numbers = [], []
    for size in (1, 3, 4, 7, 50):
        path = tmp_path / str(size)
        numbers.append(trainer_of(path).validate(made(), datamodule=TinyPrompts(eval_batch=size, rewards="nan"), verbose=False))
        tables.append(pd.read_parquet(path / "rollouts" / "step_000000_val_hinted.parquet"))
    for table, number in zip(tables[1:], numbers[1:], strict=True):
        pd.testing.assert_frame_equal(table, tables[0])
        assert number[0] == pytest.approx(numbers[0][0])
    table = tables[0]
    assert list(zip(table["slot"], table["sample"], strict=True)) == [(slot, sample) for slot in range(7) for sample in range(2)]
    graded = table[table["label"] != "ungraded"]
    assert 0 < len(graded) < 14
    assert numbers[0][0]["val/n"] == len(graded)
    assert numbers[0][0]["val/hack_rate"] == pytest.approx((graded["label"] == "reward_hack").mean())
    assert numbers[0][0]["val/infra_error_rate"] == pytest.approx((table["label"] == "ungraded").mean())
    assert numbers[0][0]["val/truncated_rate"] == pytest.approx((graded["finish"] == "length").mean())


def test_drift_is_the_mean_over_tokens_of_both_estimates() -> None:
    own, reference = [[-0.5, -1.0], [-2.0]], [[-0.7, -0.9], [-2.5]]
    gaps = np.array([-0.2, 0.1, -0.5])
    sums = drift_sums(own, reference)
    assert sums["kl_k1"] == (pytest.approx(-gaps.sum()), 3.0)
    assert sums["kl_k3"] == (pytest.approx((np.exp(gaps) - 1 - gaps).sum()), 3.0)


def test_a_policy_has_not_drifted_from_itself_and_has_once_it_is_changed(tmp_path: Path) -> None:
    module = made(eval_drift=True, micro_batch_size=3)
    (before,) = trainer_of(tmp_path / "a").validate(module, datamodule=TinyPrompts(), verbose=False)
    assert before["val/kl_k1"] == pytest.approx(0.0, abs=1e-5)
    assert before["val/kl_k3"] == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        for parameter in module.trainable_parameters():
            parameter.mul_(1.3)
    numbers = [
        trainer_of(tmp_path / str(size)).validate(module, datamodule=TinyPrompts(eval_batch=size), verbose=False)[0] for size in (3, 50)
    ]
    assert numbers[0]["val/kl_k3"] > 1e-3
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    assert not any("_reference" in name for name in module.state_dict())


def test_the_final_protocol_may_sample_otherwise_than_validation(tmp_path: Path) -> None:
    module = made(test_sampling={"samples": 3, "temperature": 0.7, "top_p": 0.95}, eval_temperature=1.5)
    assert (module.test_samples, module.test_sampling.temperature, module.test_sampling.top_p) == (3, 0.7, 0.95)
    assert (module.eval_samples, module.eval_sampling.temperature, module.eval_sampling.top_p) == (2, 1.5, 1.0)
    trainer_of(tmp_path).test(module, datamodule=TinyPrompts(), verbose=False)
    assert len(pd.read_parquet(tmp_path / "rollouts" / "step_000000_test_hinted.parquet")) == 21
    for wrong, message in (
        ({"temprature": 1.0}, "unknown key 'temprature'"),
        ({"samples": 0}, "whole number"),
        ({"top_p": 2.0}, "top_p=2"),
    ):
        with pytest.raises(ValueError, match=message):
            made(test_sampling=wrong)


def test_two_test_loaders_are_reported_by_name(tmp_path: Path) -> None:
    (numbers, *_) = trainer_of(tmp_path).test(made(), datamodule=TinyPrompts(), verbose=False)
    assert {"test/hinted/pass_rate", "test/unseen/pass_rate"} <= numbers.keys()
    problems = [
        set(pd.read_parquet(tmp_path / "rollouts" / f"step_000000_test_{name}.parquet")["problem"]) for name in ("hinted", "unseen")
    ]
    assert problems == [{f"test{i}" for i in range(7)}, {f"unseen{i}" for i in range(7)}]


class Traces(Callback):
    """What an evaluation could change, before and after it."""

    def __init__(self) -> None:
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []

    def look(self, module: Any) -> dict[str, Any]:
        return {
            "torch": torch.get_rng_state(),
            "numpy": str(np.random.get_state()),
            "modes": [part.training for part in module.modules()],
            "weights": weights_of(module),
            "requires_grad": [p.requires_grad for p in module.parameters()],
            "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        }

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.before.append(self.look(pl_module))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.after.append(self.look(pl_module))


class Gradients(Callback):
    """Leaves gradients on every other parameter when evaluation starts (Lightning itself drops those of before)."""

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        for i, parameter in enumerate(pl_module.parameters()):
            parameter.grad = torch.full_like(parameter, float(i)) if i % 2 else None


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_evaluation_leaves_random_state_gradients_modes_and_weights_alone(tmp_path: Path) -> None:
    traces, module = Traces(), made()
    module.configure_model()
    trainer_of(tmp_path, Gradients(), traces).validate(module, datamodule=TinyPrompts(), verbose=False)
    assert len(traces.before) == len(traces.after) == 1
    assert same(traces.before[0], traces.after[0])
    assert [value is not None for value in traces.after[0]["gradients"].values()] == [
        i % 2 == 1 for i in range(len(list(module.parameters())))
    ]


def test_training_with_evaluations_equals_training_without(tmp_path: Path) -> None:
    def trained(name: str, **options: Any) -> tuple[dict[str, torch.Tensor], list[bool]]:
        module = made()
        fit = trainer_of(tmp_path / name, max_steps=4, max_epochs=-1, **options)
        fit.fit(module, datamodule=TinyPrompts())
        return weights_of(module), [part.training for part in module.causal_lm.modules()]

    without, modes = trained("without", limit_val_batches=0)
    with_them, same_modes = trained("with", val_check_interval=1, check_val_every_n_epoch=None, num_sanity_val_steps=-1)
    assert all(torch.equal(without[name], with_them[name]) for name in without)
    assert modes == same_modes
    tables = sorted(path.name for path in (tmp_path / "with" / "rollouts").iterdir())
    assert tables == [f"step_{step:06d}_val_hinted.parquet" for step in range(5)]


def test_partial_sanity_check_reports_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 1, "max_epochs": -1, "num_sanity_val_steps": 1, "val_check_interval": 5}
    trainer_of(tmp_path, **options).fit(made(), datamodule=TinyPrompts())
    assert not (tmp_path / "rollouts").exists()
