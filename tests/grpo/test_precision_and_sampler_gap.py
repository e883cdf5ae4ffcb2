"""Adapters stay in float32 over a bfloat16 base, and a sampler that is wrong shows in its gap whatever ratios are taken against."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

sys.path.insert(0, str(Path(__file__).resolve().parent))

from grpo_fits import PlainDescent, fit

from theodolite.lightning_modules import GRPOModule

LORA: dict[str, Any] = {"r": 2, "target_modules": "all-linear"}


class Adam(PlainDescent):
    """The optimizer of real runs."""

    def configure_optimizers(self) -> Any:
        return GRPOModule.configure_optimizers(self)


def test_adapter_and_moments_stay_in_float32_over_a_bfloat16_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_fits.PlainDescent", Adam)
    module, trainer = fit(tmp_path, steps=2, dtype="bfloat16", lora=LORA, lr=7e-5)
    trained = module.trainable_parameters()
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert {p.dtype for p in module.causal_lm.parameters() if not p.requires_grad} == {torch.bfloat16}
    moments = [state["exp_avg"] for state in trainer.optimizers[0].state.values()]
    assert len(moments) == len(trained)
    assert {moment.dtype for moment in moments} == {torch.float32}
    moved = [p for name, p in module.causal_lm.named_parameters() if ".lora_B." in name]
    assert 0 < max(float(p.detach().abs().max()) for p in moved) <= 2 * 7e-5 * 1.01, "two steps from zero, none of them rounded away"


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_of_everything_is_refused(tmp_path: Path, precision: str) -> None:
    with pytest.raises(ValueError, match=f"trainer.precision={precision} would round"):
        fit(tmp_path, precision=precision, lora=LORA)


class OffBy(Callback):
    """A sampler whose log-probabilities are all too low by ``gap``."""

    def __init__(self, gap: float) -> None:
        self.gap = gap

    def on_rollouts(self, trainer: Any, pl_module: Any, window: Any) -> None:
        for rollout in window.rollouts:
            rollout.sampler_log_probs = tuple(value - self.gap for value in rollout.sampler_log_probs)


def test_a_sampler_that_is_wrong_shows_where_ratios_are_taken_against_it(tmp_path: Path) -> None:
    reusing: dict[str, Any] = {"updates_per_window": 2, "reuse_sampler_log_probs": True, "lr": 0.3}
    _, trainer = fit(tmp_path, OffBy(0.125), steps=2, **reusing)
    assert float(trainer.logged_metrics["train/sampler_gap"]) == pytest.approx(0.125, abs=1e-4)
    with pytest.raises(ValueError, match="every weight would be 1"):
        fit(tmp_path, mismatch={"mode": "token_tis", "high": 2.0}, **reusing)
