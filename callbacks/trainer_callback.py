"""The projection in ``transformers.Trainer`` and everything built on it, TRL's ``GRPOTrainer`` included.

::

    trainer = GRPOTrainer(..., callbacks=[ProjectionTrainerCallback(direction="runs/direction", apply_to="update")])

**Clipping.** The Trainer clips before it calls any callback. A projection of a clipped gradient is the clipped projection (both only
scale), but with a factor computed from a norm that still holds the component, so the step would be too short. This callback therefore takes
``max_grad_norm`` over: it sets the Trainer's to 0 for the time of training, projects, and clips what is left. The ``grad_norm`` that the
Trainer logs is then the norm before projection and clipping.

**Logged** as ``projection/...`` beside the Trainer's numbers in ``trainer.state.log_history``. A reporter such as W&B sees them if this
callback comes before it: ``callbacks = trainer.callback_handler.callbacks; callbacks.insert(0, callbacks.pop())``.

Single process and DDP. FSDP and DeepSpeed hold gradients in flat shards and are refused.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from theodolite.binding import Target, bind_direction, model_identity
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.projection_rule import DEFAULT_MAX_MAGNITUDE_FACTOR, Gate, GateScope, ProjectionRule
from theodolite.projection_summary import summarise
from theodolite.projector import ApplyTo, Projector, StepPlan


class ProjectionTrainerCallback(TrainerCallback):
    """Project the steps of a ``transformers.Trainer`` off a concept direction.

    Args:
        direction: Folder of a saved :class:`ConceptDirection`, or the object. Names are those of the model that the Trainer was given
            (``trainer.model.named_parameters()``, with PEFT's prefixes).
        gate: As in :class:`~theodolite.callbacks.gradient_projection.GradientProjectionCallback`, like everything that follows.
        gate_scope: Who decides.
        overshoot: 1 removes, 2 reflects.
        push: A constant step away instead of the gate.
        preserve_magnitude: Rescale to the norm before.
        max_magnitude_factor: Bound of that.
        apply_to: ``gradient``, ``update`` or ``both``.
        target: Which of the direction's parameters.
        parameters: Glob patterns that narrow them.
        purge_moments: Also take the gated component out of the optimizer's first moments.
        measure_only: Change nothing.
        check_model: Refuse a direction of another model or revision.

    Raises:
        ValueError: Contradictory settings.
    """

    def __init__(
        self,
        direction: str | ConceptDirection,
        gate: Gate = "one_sided",
        gate_scope: GateScope = "tensor",
        overshoot: float = 1.0,
        push: float = 0.0,
        preserve_magnitude: bool = False,
        max_magnitude_factor: float = DEFAULT_MAX_MAGNITUDE_FACTOR,
        apply_to: ApplyTo = "gradient",
        target: Target = "all",
        parameters: list[str] | None = None,
        purge_moments: bool = False,
        measure_only: bool = False,
        check_model: bool = True,
    ) -> None:
        self.rule = ProjectionRule(
            gate, gate_scope, overshoot, push, preserve_magnitude, max_magnitude_factor, target == "flattened", measure_only
        )
        self.projector = Projector(self.rule, StepPlan(apply_to, purge_moments))
        self.direction = direction if isinstance(direction, ConceptDirection) else ConceptDirection.load(direction)
        self.target: Target = target
        self.parameters, self.check_model = parameters, check_model
        self.metrics: dict[str, float] = {}
        """Of the last step."""
        self.skipped_steps = 0
        self._max_grad_norm: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the direction against the model and take over clipping."""
        flags = [os.environ.get(name, "").lower() for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")]
        if args.fsdp or args.deepspeed or "true" in flags:
            raise ValueError(
                "ProjectionTrainerCallback cannot read whole gradients under FSDP or DeepSpeed: train with DDP or on one device."
            )
        model: nn.Module = kwargs["model"]
        if self.check_model:
            self.direction.check_model(*model_identity(model))
        parameters = dict(model.named_parameters())
        self.projector.bind(bind_direction(self.direction, parameters, self.rule, self.target, self.parameters), parameters)
        frozen = [name for name, parameter in self.projector.watched().items() if not parameter.requires_grad]
        if frozen:
            raise ValueError(f"The direction has a vector for {frozen[0]}, which is not trained: narrow it with `parameters`.")
        if self._max_grad_norm is None:
            self._max_grad_norm, args.max_grad_norm = float(args.max_grad_norm or 0.0), 0.0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give clipping back."""
        if self._max_grad_norm is not None:
            args.max_grad_norm, self._max_grad_norm = self._max_grad_norm, None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Project, then clip. Gradients are accumulated, averaged over ranks and unscaled by now."""
        stats = self.projector.before_step(_raw(kwargs["optimizer"]))
        if stats is None:
            self.skipped_steps += 1
            self.metrics = {}
        else:
            self.metrics = self._floats("", stats)
        self.metrics["projection/skipped_steps"] = float(self.skipped_steps)
        if self._max_grad_norm:
            torch.nn.utils.clip_grad_norm_(kwargs["model"].parameters(), self._max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Project what the optimizer has applied."""
        self.metrics |= self._floats("update_", self.projector.after_step(_raw(kwargs["optimizer"])))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the last step's numbers to what the Trainer logs."""
        if logs is not None and "loss" in logs:
            logs.update(self.metrics)
            if state.log_history:
                state.log_history[-1].update(self.metrics)

    def _floats(self, prefix: str, stats: Any) -> dict[str, float]:
        half = self.rule.gate == "one_sided" and self.rule.push == 0
        return {f"projection/{prefix}{key}": float(value) for key, value in summarise(stats, self.projector.null_shares(), half).items()}


def _raw(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
