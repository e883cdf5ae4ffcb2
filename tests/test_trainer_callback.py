"""The projection in other people's loops: plain PyTorch, ``transformers.Trainer``, TRL (marker ``peers``), and the runnable examples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from theodolite.callbacks.trainer_callback import ProjectionTrainerCallback
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.extraction import haar_random_like
from theodolite.project_gradients import project_gradients

sys.path.insert(0, str(Path(__file__).resolve().parent))

from example_files import example

# ---------------------------------------------------------------- a bare loop


def net() -> nn.Linear:
    module = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    return module


def test_project_gradients_leaves_no_component_before_the_step_and_names_come_from_the_optimizer_if_it_has_them() -> None:
    module, direction = net(), haar_random_like({"weight": (3, 4)}, k=2)
    optimizer = torch.optim.SGD(module.named_parameters(), lr=0.1)
    module(torch.randn(5, 4, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    metrics = project_gradients(optimizer, direction, gate="two_sided")
    assert module.weight.grad is not None
    assert (direction.vectors["weight"].flatten(1) @ module.weight.grad.flatten()).abs().max() < 1e-5
    assert abs(float(metrics["cos_before"])) > 1e-3
    assert float(metrics["skipped"]) == 0.0
    with pytest.raises(ValueError, match=r"named_parameters=model\.named_parameters"):
        project_gradients(torch.optim.SGD(module.parameters(), lr=0.1), direction)


@pytest.mark.parametrize("apply_to", ["update", "both"])
def test_the_update_is_projected_when_the_step_is_made_and_only_that_step(apply_to: Any) -> None:
    module, direction = net(), haar_random_like({"weight": (3, 4)}, k=2)
    rows = direction.vectors["weight"].flatten(1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for projected in (True, True, False):
        start = module.weight.detach().clone()
        optimizer.zero_grad()
        module(torch.randn(5, 4, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        metrics = (
            project_gradients(optimizer, direction, module.named_parameters(), gate="two_sided", apply_to=apply_to) if projected else {}
        )
        optimizer.step()
        component = (rows @ (module.weight.detach() - start).flatten()).abs().max()
        assert (component < 1e-6) if projected else (component > 1e-3)
        assert ("update_cos_before" in metrics) == projected


def test_a_step_with_a_gradient_that_is_not_finite_does_nothing_and_is_reported() -> None:
    module, direction = net(), haar_random_like({"weight": (3, 4)}, k=1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    start = module.weight.detach().clone()
    module.weight.grad = torch.full((3, 4), float("inf"))
    assert float(project_gradients(optimizer, direction, module.named_parameters())["skipped"]) == 1.0
    optimizer.step()
    assert torch.equal(module.weight, start)


# ---------------------------------------------------------------- transformers.Trainer


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(x) - labels).square().mean()}


class Steps(TrainerCallback):
    """Gradient before and after the projection's place in the list, and weights around the step."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.weights: list[Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:  # type: ignore[override]
        self.weights.append(model.layer.weight.detach().clone())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:  # type: ignore[override]
        self.gradients.append(model.layer.weight.grad.clone())

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:  # type: ignore[override]
        self.on_step_begin(args, state, control, model)


def train(folder: Path, callback: ProjectionTrainerCallback, optimizer: str = "sgd", **options: Any) -> tuple[Trainer, Steps, Steps]:
    before, after = Steps(), Steps()
    generator = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(4, generator=generator), "labels": 5 * torch.randn(3, generator=generator)} for _ in range(16)]
    settings: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 0.1, "use_cpu": True}
    settings |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant", "optim": optimizer}
    arguments = TrainingArguments(output_dir=str(folder), **(settings | options))
    trainer = Trainer(Regression(), arguments, train_dataset=rows, callbacks=[before, callback, after])  # type: ignore[arg-type]
    trainer.train()
    return trainer, before, after


DIRECTION = haar_random_like({"layer.weight": (3, 4)}, k=2)
ROWS = DIRECTION.vectors["layer.weight"].flatten(1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_projects_unclipped_gradients_then_clips_what_is_left(tmp_path: Path, accumulation: int) -> None:
    clip = 0.05
    callback = ProjectionTrainerCallback(DIRECTION, gate="two_sided")
    trainer, before, after = train(tmp_path, callback, max_grad_norm=clip, gradient_accumulation_steps=accumulation)
    for step in range(3):
        raw, applied = before.gradients[step].flatten(), after.gradients[step].flatten()
        assert raw.norm() > 2 * clip, "the projection must see gradients that are not clipped yet"
        left = raw - ROWS.T @ (ROWS @ raw)
        torch.testing.assert_close(applied, left * clip / left.norm(), atol=1e-5, rtol=1e-3)
        torch.testing.assert_close((before.weights[step] - before.weights[step + 1]).flatten(), 0.1 * applied, atol=1e-5, rtol=1e-3)
    assert trainer.args.max_grad_norm == clip, "clipping is given back"
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    assert all(abs(row["projection/cos_after"]) < 1e-5 < abs(row["projection/cos_before"]) for row in rows)


@pytest.mark.parametrize(("apply_to", "stays"), [("gradient", False), ("update", True), ("both", True)])
def test_trainer_under_adamw_stays_off_the_direction_only_with_update_projection(tmp_path: Path, apply_to: Any, stays: bool) -> None:
    _, before, _ = train(tmp_path, ProjectionTrainerCallback(DIRECTION, gate="two_sided", apply_to=apply_to), "adamw_torch")
    moved = (before.weights[-1] - before.weights[0]).flatten()
    share = float((ROWS @ moved).norm() / moved.norm())
    assert (share < 1e-5) if stays else (share > 1e-2)


def test_trainer_refuses_what_it_cannot_do_before_training(tmp_path: Path) -> None:
    wrong = haar_random_like({"layer.wieght": (3, 4)}, k=1)
    with pytest.raises(ValueError, match=r"'layer\.wieght'.*closest is 'layer\.weight'"):
        train(tmp_path, ProjectionTrainerCallback(wrong))
    callback = ProjectionTrainerCallback(DIRECTION)
    arguments: Any = type("Arguments", (), {"fsdp": ["full_shard"], "deepspeed": None, "max_grad_norm": 1.0})
    with pytest.raises(ValueError, match="cannot read whole gradients under FSDP or DeepSpeed"):
        callback.on_train_begin(arguments, None, None, model=Regression())
    with pytest.raises(ValueError, match="twice"):
        ProjectionTrainerCallback(DIRECTION, push=0.1, apply_to="both")


def test_trainer_callback_takes_a_folder(tmp_path: Path) -> None:
    DIRECTION.save(tmp_path / "direction")
    callback = ProjectionTrainerCallback(str(tmp_path / "direction"), gate="two_sided")
    train(tmp_path, callback)
    assert isinstance(callback.direction, ConceptDirection)
    assert callback.metrics["projection/fired_fraction"] == 1.0


# ---------------------------------------------------------------- examples


def test_example_of_a_bare_loop_runs_and_shows_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    loop = example("project_in_a_loop")
    assert abs(loop.main("update")) < 1e-5
    assert abs(loop.main("gradient")) > 1e-2


def test_example_of_a_trainer_runs() -> None:
    history = example("project_in_trainer").main(steps=3)
    assert all(abs(row["projection/update_cos_after"]) < 1e-5 < abs(row["projection/update_cos_before"]) for row in history[:3])


@pytest.mark.peers
@pytest.mark.parametrize("lora", [True, False])
def test_trl_grpo_trainer_runs_three_steps_whose_projected_component_is_zero_before_the_step(lora: bool) -> None:
    pytest.importorskip("trl")
    seen: list[float] = []

    class Watch(ProjectionTrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            total = 0.0
            for name, parameter in kwargs["model"].named_parameters():
                if name in self.direction.vectors and parameter.grad is not None:
                    total += float((self.direction.vectors[name].flatten(1) @ parameter.grad.float().flatten()).abs().max())
            seen.append(total)

    grpo = example("project_in_grpo_trainer")
    grpo.ProjectionTrainerCallback = Watch
    trainer, _ = grpo.main(steps=3, lora=lora)
    assert trainer.state.global_step == 3
    assert len(seen) == 3
    assert max(seen) < 1e-6
    rows = [row for row in trainer.state.log_history if "projection/cos_after" in row]
    assert len(rows) == 3
    assert any(abs(row["projection/cos_before"]) > 1e-5 for row in rows)
    assert all(abs(row["projection/update_cos_after"]) < 1e-5 for row in rows)
    assert trainer.args.max_grad_norm == pytest.approx(0.1)
