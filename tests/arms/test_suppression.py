"""Generation-time suppression: what is sampled has no component, what is recorded is what was sampled from, and nothing else changes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "grpo"))

from grpo_fits import TINY, PlainDescent, fit
from tiny_policies import TinyPrompts, weights_of

from theodolite.callbacks.suppression import GenerationSuppression, removed_from_layers, unit_difference
from theodolite.protocols import Window

CORRECTED = {"mode": "token_tis", "high": 2.0}


class Watcher(Callback):
    """Keeps windows, and the log-probabilities of their rollouts with and without suppression."""

    def __init__(self, suppression: GenerationSuppression | None = None) -> None:
        self.suppression, self.windows, self.recorded = suppression, [], []
        self.plain: list[Tensor] = []
        self.suppressed: list[Tensor] = []

    def on_rollouts(self, trainer: Any, pl_module: Any, window: Window) -> None:
        self.windows.append(window)
        self.recorded += [torch.tensor(rollout.sampler_log_probs) for rollout in window.rollouts]
        sequences = [rollout.tokens for rollout in window.rollouts]
        with torch.no_grad():
            self.plain += rows(pl_module.completion_log_probs(sequences))
            if self.suppression is not None:
                with removed_from_layers(pl_module, self.suppression.directions, self.suppression.strength, lambda _: None):
                    self.suppressed += rows(pl_module.completion_log_probs(sequences))


def rows(scored: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [values[kept.bool()] for values, kept in zip(*scored, strict=True)]


def furthest(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True) if len(a))


def suppression(**settings: Any) -> GenerationSuppression:
    return GenerationSuppression(**({"n_pairs": 8, "band": (0.5, 1.0)} | settings))


def test_what_points_towards_the_concept_is_gone_and_the_rest_is_as_it_was() -> None:
    layer = torch.nn.Linear(6, 6)
    module: Any = torch.nn.Module()
    module.layers, module.config = torch.nn.ModuleList([layer]), SimpleNamespace(num_hidden_layers=1)
    u, x = torch.nn.functional.normalize(torch.randn(6), dim=0), torch.randn(5, 3, 6)
    seen: list[Tensor] = []
    with torch.no_grad():
        before = layer(x)
        with removed_from_layers(module, {1: u}, 1.0, seen.append):
            during = layer(x)
        assert torch.equal(layer(x), before), "a hook was left behind"
    along = before @ u
    torch.testing.assert_close(during @ u, along.clamp_max(0.0), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(during - (during @ u)[..., None] * u, before - along[..., None] * u, atol=1e-6, rtol=0.0)
    torch.testing.assert_close(seen[0], along.clamp_min(0.0))


def test_recorded_log_probabilities_are_those_of_the_distribution_that_was_sampled_from(tmp_path: Path) -> None:
    callback = suppression()
    watcher = Watcher(callback)
    module, trainer = fit(tmp_path, callback, watcher, mismatch=CORRECTED)
    assert furthest(watcher.recorded, watcher.suppressed) < 1e-4
    assert furthest(watcher.recorded, watcher.plain) > 1e-2
    assert float(trainer.logged_metrics["train/sampler_gap"]) > 1e-3, "the trainer's policy is the one without suppression"
    assert not hasattr(module.engine, "begin"), "the module has its own engine back"


def validated_fit(path: Path, callback: Callback) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and validation metrics of a fit that learns nothing and validates after its only step."""
    module = PlainDescent(**(TINY | {"lr": 0.0, "export": False, "seed": 3, "table_every": 0}))
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    limits: dict[str, Any] = {"max_steps": 1, "max_epochs": -1, "val_check_interval": 1, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[callback], default_root_dir=path, **quiet, **limits)
    trainer.fit(module, datamodule=TinyPrompts())
    return weights_of(module), {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def test_evaluation_sees_the_plain_model_and_learning_nothing_leaves_the_weights_alone(tmp_path: Path) -> None:
    weights, metrics = validated_fit(tmp_path / "one", suppression())
    plain_weights, plain_metrics = validated_fit(tmp_path / "two", Callback())
    assert len(metrics) > 5
    assert metrics == pytest.approx(plain_metrics, abs=0.0, nan_ok=True)
    assert all(torch.equal(value, plain_weights[name]) for name, value in weights.items())


def test_an_engine_that_does_not_run_the_module_s_layers_is_found_out(tmp_path: Path) -> None:
    class Elsewhere(Callback):
        """Samples with a copy, as an engine in another process would."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            import copy

            copied = copy.deepcopy(pl_module.causal_lm)
            pl_module.engine.setup(copied, pl_module.end_ids, pl_module.pad_id)

    with pytest.raises(RuntimeError, match="nothing was suppressed"):
        fit(tmp_path, Elsewhere(), suppression())


@pytest.mark.slow
def test_the_random_control_is_a_unit_direction_of_the_same_shape_that_depends_on_the_seed(tmp_path: Path) -> None:
    found = []
    for settings in ({}, {"random_direction": True, "seed": 1}, {"random_direction": True, "seed": 2}):
        callback = suppression(**settings)
        fit(tmp_path, callback, data=TinyPrompts())
        found.append(callback.directions)
    assert [set(one) for one in found] == [{1, 2}] * 3
    for one in found:
        assert all(float(u.norm()) == pytest.approx(1.0, abs=1e-5) and u.shape == (32,) for u in one.values())
    assert abs(float(found[1][1] @ found[2][1])) < 0.9
    assert abs(float(found[0][1] @ found[1][1])) < 0.9


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"n_pairs": 0}, {"band": (0.8, 0.6)}, {"position": "first"}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        GenerationSuppression(**settings)


def test_sides_with_one_mean_have_no_direction() -> None:
    with pytest.raises(ValueError, match="no direction"):
        unit_difference(torch.ones(3, 2), torch.ones(3, 2))
