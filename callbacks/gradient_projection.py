r"""Keep optimizer steps out of a concept's direction: project the gradient before it is clipped, the applied update, or both.

Works on any ``LightningModule``, with automatic or manual optimisation, any optimizer, on one device, under DDP and under FSDP2::

    callbacks:
      - class_path: theodolite.callbacks.gradient_projection.GradientProjectionCallback
        init_args:
          apply_to: update
          direction:
            class_path: theodolite.callbacks.direction_sources.GradientDifference   # or a folder that ConceptDirection.save wrote
            init_args: {n_pairs: 64}

**When.** Gradients in ``on_before_optimizer_step``: they are then accumulated, summed over ranks and unscaled, and not yet clipped.
Callbacks run in list order; clipping comes after all of them (with manual optimisation the module must clip in its own
``on_before_optimizer_step``). Updates in a hook that the optimizer itself calls when its step is done.

**What each promises.** After a plain SGD step with ``apply_to: gradient`` the applied change has no component left; after Adam's it has,
because momentum, second moments and weight decay bring parts of the direction back. With ``apply_to: update`` it has none, whatever the
optimizer.

Every choice and every logged number is explained in ``docs/callbacks/gradient_projection.md``.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from theodolite.binding import Target, bind_direction, model_identity
from theodolite.callbacks.bypass_guard import BypassGuard
from theodolite.callbacks.direction_sources import DirectionSource
from theodolite.callbacks.strategy_check import check_strategy
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.projection_rule import DEFAULT_MAX_MAGNITUDE_FACTOR, ProjectionRule
from theodolite.projection_summary import PartShares, per_module, summarise
from theodolite.projector import Projector, StepPlan, StepStats, parameters_of, restore
from theodolite.protocols import Window


class GradientProjectionCallback(Callback):
    """Project the steps of chosen parameters off a concept direction.

    Args:
        direction: Folder of a saved :class:`ConceptDirection`, the object itself, or a :class:`DirectionSource` that extracts one.
        gate: ``one_sided`` removes only what moves towards the concept; ``two_sided`` every component; ``reverse`` reflects every
            component.
        overshoot: 1 removes the component, 2 reflects it (an active step away from the concept, no longer a removal).
        push: Above 0 the gate is replaced by a constant step of this fraction of the gradient norm away from the concept (a control).
        preserve_magnitude: Rescale what is projected to the norm it had.
        max_magnitude_factor: Bound of that rescaling, which a gradient along the direction would drive to infinity.
        apply_to: The ``gradient``, the applied ``update``, or ``both``.
        gate_scope: Whether each ``tensor`` (row by row), each ``module`` or the whole model (``global``) decides if the gate opens.
        target: ``all`` parameters of the direction, its ``residual_writers``, its ``lora_B`` matrices, or all as one ``flattened`` vector.
        parameters: Glob patterns that narrow the direction to some of its parameters.
        purge_moments: Also take the gated component out of the optimizer's first moments before each step.
        route: Park what is removed instead of dropping it; evaluation and the end of the fit use the weights without it. Needs ``update``.
        measure_only: Change nothing and log everything.
        measure_update: Log the applied update also under ``apply_to: gradient`` (a copy of the parameters per step).
        measure_parts: Log how much each named part of a window's gradient contributes to the cosine, where the module names parts.
        log_per_module: Log cosines of every parameter, not only their means.
        check_model: Refuse a direction that was extracted from another model or revision.
        name: Distinguishes several instances in logs and checkpoints.

    Raises:
        ValueError: Contradictory settings.
    """

    def __init__(
        self,
        direction: str | ConceptDirection | DirectionSource,
        gate: Literal["one_sided", "two_sided", "reverse"] = "one_sided",
        overshoot: float = 1.0,
        push: float = 0.0,
        preserve_magnitude: bool = False,
        max_magnitude_factor: float = DEFAULT_MAX_MAGNITUDE_FACTOR,
        apply_to: Literal["gradient", "update", "both"] = "gradient",
        gate_scope: Literal["tensor", "module", "global"] = "tensor",
        target: Target = "all",
        parameters: list[str] | None = None,
        purge_moments: bool = False,
        route: bool = False,
        measure_only: bool = False,
        measure_update: bool = False,
        measure_parts: bool = False,
        log_per_module: bool = False,
        check_model: bool = True,
        name: str = "projection",
    ) -> None:
        super().__init__()
        self.rule = ProjectionRule(
            gate, gate_scope, overshoot, push, preserve_magnitude, max_magnitude_factor, target == "flattened", measure_only
        )
        self.plan = StepPlan(apply_to, purge_moments, route, measure_update)
        self.projector = Projector(self.rule, self.plan)
        self.direction, self.parameters, self.name = direction, parameters, name
        self.target: Target = target
        self.measure_parts, self.log_per_module, self.check_model = measure_parts, log_per_module, check_model
        self.source = direction if isinstance(direction, DirectionSource) else None
        self.given: ConceptDirection | None = None
        """The direction as loaded, before it is bound to the module's parameters."""
        self.current: ConceptDirection | None = None
        """The direction in force, orthonormal rows of parameters."""
        self.firings, self.skipped_steps = 0, 0
        self._bypass = BypassGuard()
        self._handles: list[Any] = []
        self._parts = PartShares()
        self._update_metrics: dict[str, Tensor] = {}
        self._training_weights: dict[str, Tensor] = {}
        self._ended = False  # the weights have been left as they would be deployed

    @property
    def state_key(self) -> str:
        """One key per name, so that several instances can be checkpointed."""
        return self._generate_state_key(name=self.name)

    # ------------------------------------------------------------------ start and end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies whose gradients this cannot read, and load a saved direction."""
        if stage != "fit":
            return
        check_strategy(trainer.strategy, self.source, self.plan.route)
        if self.source is None:
            self.given = self.direction if isinstance(self.direction, ConceptDirection) else ConceptDirection.load(str(self.direction))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find unknown parameters, wrong shapes, another model's direction and unusable sources before training."""
        if self.given is not None:
            if self.check_model:
                self.given.check_model(*model_identity(pl_module))
            if self.current is None:
                self.current = self._bound(self.given, pl_module)
        if self.source is not None:
            self.source.check(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Extract the direction (unless a checkpoint brought it) and put it in force."""
        self._bypass.begin_fit()
        self._remove_hooks()
        if self.current is None and self.source is not None:
            fresh = self.source.prepare(trainer, pl_module)
            self.current = None if fresh is None else self._bound(fresh, pl_module)
        if self.current is not None:
            self._put_in_force(self.current, trainer, pl_module)
        self._restore_training_weights(pl_module)  # a fit that had ended is continued: its checkpoint holds the deployed ones
        self._ended = False
        if self.plan.watches_update:
            self._handles = [optimizer.register_step_post_hook(partial(_after_step, self)) for optimizer in trainer.optimizers]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what is parked; raise ``RuntimeError`` if a whole fit never came by."""
        self._remove_hooks()
        self._bypass.end_fit()
        self._training_weights = self.projector.drop_parked(dict(pl_module.named_parameters()))
        self._ended = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._remove_hooks()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._remove_hooks()

    # ------------------------------------------------------------------ steps

    def on_rollouts(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        """Hand a window's rollouts to the source."""
        if self.source is not None:
            self.source.on_rollouts(trainer, pl_module, window)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember where the counters stand."""
        self._bypass.begin_batch(trainer.global_step, self.firings, self.projector.watched())
        self._update_metrics = {}
        self._parts.reset()

    def on_microbatch_gradients(self, trainer: Trainer, pl_module: LightningModule, window: Window, part: str) -> None:
        """Credit the change of the component to the part that was just added (components are linear in the gradient)."""
        if not self.measure_parts or self.current is None:
            return
        gradients = {name: p.grad for name, p in self.projector.watched().items() if p.grad is not None}
        self._parts.credit(part, float(sum(self.projector.coefficients(gradients).values())))

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Refresh the direction if its source wants to, then project ``p.grad`` in place.

        Raises:
            RuntimeError: There is no direction, or a gradient is sparse.
        """
        self.firings += 1
        metrics = self._refresh(trainer, pl_module)
        if self.projector.watched(optimizer):
            self._bypass.reached = True
        stats = self.projector.before_step(optimizer)
        if stats is None:
            self.skipped_steps += 1
        else:
            metrics |= self._metrics(stats)
            metrics |= self._parts.metrics(stats) if self.measure_parts else {}
        metrics["skipped_steps"] = float(self.skipped_steps)
        self._log(pl_module, metrics)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the applied update; raise ``RuntimeError`` if an optimizer stepped past this callback."""
        self._bypass.end_batch(trainer.global_step, self.firings, self.projector.watched())
        self._log(pl_module, self._update_metrics)

    # ------------------------------------------------------------------ evaluation under route

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the weights that would be deployed, in a fit and from its checkpoints."""
        if not self._training_weights:
            self._training_weights = self.projector.drop_parked(dict(pl_module.named_parameters()))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put exactly the weights of training back."""
        if not self._ended:
            self._restore_training_weights(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self.on_validation_end(trainer, pl_module)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The direction, the counters, what is parked and the source's state, as tensors, numbers, strings and lists."""
        return {
            "direction": None if self.current is None else _plain(self.current),
            "given": None if self.given is None else self.given.fingerprint(),
            "firings": self.firings,
            "skipped_steps": self.skipped_steps,
            "parked": {name: part.detach().cpu() for name, part in self.projector.parked.items()},
            "training_weights": {name: part.cpu() for name, part in self._training_weights.items()},
            "source": self.source.state_dict() if self.source is not None else {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`.

        Raises:
            ValueError: The config names a saved direction and the checkpoint was trained with another.
        """
        self.firings, self.skipped_steps = state_dict["firings"], state_dict["skipped_steps"]
        if self.source is not None:
            self.source.load_state_dict(state_dict["source"])
        elif self.given is not None and state_dict["given"] not in (None, self.given.fingerprint()):
            raise ValueError(
                f"The checkpoint was trained with another direction than {self.name!r} is given now: resume with the same or start afresh."
            )
        saved = state_dict["direction"]
        if saved is not None:
            self.current = ConceptDirection(saved["vectors"], saved["space"], json.loads(saved["metadata"]))
        self.projector.parked, self._training_weights = dict(state_dict["parked"]), dict(state_dict["training_weights"])
        self._ended = bool(self._training_weights)

    # ------------------------------------------------------------------ parts

    def _refresh(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Ask the source for a new direction; returns what there is to log about it."""
        if self.source is None:
            return {}
        metrics: dict[str, Any] = {}
        timed: Any = getattr(pl_module, "timed", None)  # a module that times its phases gets one for this
        with timed("direction") if timed is not None else nullcontext():
            fresh = self.source.refresh(trainer, pl_module, trainer.global_step)
        if fresh is not None:
            previous, self.current = self.current, self._bound(fresh, pl_module)
            self._put_in_force(self.current, trainer, pl_module)
            if previous is not None:
                metrics["overlap"] = previous.overlap(self.current)
        if self.current is None:
            raise RuntimeError(
                f"{type(self.source).__name__} has given no direction by the first optimizer step, so nothing can be projected."
            )
        return metrics | self.source.metrics()

    def _bound(self, direction: ConceptDirection, pl_module: LightningModule) -> ConceptDirection:
        return bind_direction(direction, dict(pl_module.named_parameters()), self.rule, self.target, self.parameters)

    def _put_in_force(self, direction: ConceptDirection, trainer: Trainer, pl_module: LightningModule) -> None:
        """On the parameters' devices, rank 0's numbers everywhere."""
        parameters = dict(pl_module.named_parameters())
        direction.check_against({name: parameter.shape for name, parameter in parameters.items()})
        trained = {key for optimizer in trainer.optimizers for key in parameters_of(optimizer)}
        for name in direction.vectors:
            if id(parameters[name]) not in trained:
                raise ValueError(f"The direction has a vector for {name}, which no optimizer trains: narrow it with `parameters`.")
        vectors = {name: rows.to(parameters[name].device) for name, rows in direction.vectors.items()}
        if trainer.world_size > 1:
            vectors = {name: vectors[name] for name in sorted(vectors)}  # they are sent one after another: in one order on every rank
            for rows in vectors.values():
                torch.distributed.broadcast(rows, src=0)
        self.current = ConceptDirection(vectors, direction.space, direction.metadata)
        self.projector.bind(self.current, parameters)
        self.projector.parked = {name: part.to(parameters[name].device) for name, part in self.projector.parked.items()}

    def _metrics(self, stats: StepStats) -> dict[str, Tensor]:
        half = self.rule.gate == "one_sided" and self.rule.push == 0
        metrics = summarise(stats, self.projector.null_shares(), half)
        return metrics | per_module(stats) if self.log_per_module else metrics

    def _log(self, pl_module: LightningModule, metrics: dict[str, Any]) -> None:
        for key, value in metrics.items():
            pl_module.log(f"projection/{self.name}/{key}", value, on_step=True, on_epoch=False)

    def _restore_training_weights(self, pl_module: LightningModule) -> None:
        restore(dict(pl_module.named_parameters()), self._training_weights)
        self._training_weights = {}

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _after_step(callback: GradientProjectionCallback, optimizer: Optimizer, *_: Any) -> None:
    """Called by an optimizer when it has stepped. What is measured is logged at the end of the batch, where Lightning allows it."""
    stats = callback.projector.after_step(optimizer)
    if stats:
        callback._update_metrics |= {f"update_{key}": value for key, value in callback._metrics(stats).items()}


def _plain(direction: ConceptDirection) -> dict[str, Any]:
    vectors = {name: rows.detach().cpu() for name, rows in direction.vectors.items()}
    return {"vectors": vectors, "space": direction.space, "metadata": json.dumps(direction.metadata)}
