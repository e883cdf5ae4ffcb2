r"""Keep optimizer steps out of a concept's direction: the gradient of each weight matrix is projected before it is clipped and applied.

Works on any ``LightningModule``, with automatic or manual optimisation, any optimizer, on one device or under DDP::

    callbacks:
      - class_path: theodolite.callbacks.gradient_projection.GradientProjectionCallback
        init_args:
          direction:
            class_path: theodolite.callbacks.direction_sources.GradientDifference   # or a folder that ConceptDirection.save wrote
            init_args: {n_pairs: 64}

**When.** In ``on_before_optimizer_step``: gradients are then accumulated, summed over ranks and unscaled, and not yet clipped. Callbacks
run in list order; clipping comes after all of them (with manual optimisation the module must clip in its own ``on_before_optimizer_step``).

**What it does not promise.** Gradients are projected, not the applied update: momentum, second moments and weight decay bring parts of the
direction back. After a plain SGD step the applied change has no component left; after Adam's it has.

**Logged** as ``projection/<name>/...``, means over the projected matrices of a step, the same on every rank: ``cos_before`` and
``cos_after`` (gradient against direction; positive = towards the concept), ``removed_fraction`` (``|g - g'|/|g|``), ``fired_fraction``
(share of matrices whose gate opened), ``skipped_steps`` (so far), and after a refresh ``overlap`` with the previous direction. Sources
add their own (``pairs``, ...).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from theodolite.callbacks.direction_sources import DirectionSource
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.projection import DEFAULT_MAX_MAGNITUDE_FACTOR, ProjectionStats, check_projection_settings, project
from theodolite.protocols import Window


class GradientProjectionCallback(Callback):
    """Project the gradients of chosen weight matrices off a concept direction, once per optimizer step.

    Args:
        direction: Folder of a saved :class:`ConceptDirection`, the object itself, or a :class:`DirectionSource` that extracts one.
        gate: ``one_sided`` removes only what moves towards the concept, per row and matrix; ``two_sided`` every component.
        overshoot: 1 removes the component, 2 reflects it (an active step away from the concept, no longer a removal).
        push: Above 0 the gate is replaced by a constant step of this fraction of the gradient norm away from the concept (a control).
        preserve_magnitude: Rescale each projected gradient to the norm it had.
        max_magnitude_factor: Bound of that rescaling, which a gradient along the direction would drive to infinity.
        parameters: Glob patterns that narrow the direction to some of its parameters.
        name: Distinguishes several instances in logs and checkpoints.

    Raises:
        ValueError: Contradictory settings.
    """

    def __init__(
        self,
        direction: str | ConceptDirection | DirectionSource,
        gate: Literal["one_sided", "two_sided"] = "one_sided",
        overshoot: float = 1.0,
        push: float = 0.0,
        preserve_magnitude: bool = True,
        max_magnitude_factor: float = DEFAULT_MAX_MAGNITUDE_FACTOR,
        parameters: list[str] | None = None,
        name: str = "projection",
    ) -> None:
        super().__init__()
        check_projection_settings(gate, overshoot, push, max_magnitude_factor)
        self.direction, self.parameters, self.name = direction, parameters, name
        self.gate: Literal["one_sided", "two_sided"] = gate
        self.overshoot, self.push = overshoot, push
        self.preserve_magnitude, self.max_magnitude_factor = preserve_magnitude, max_magnitude_factor
        self.source = direction if isinstance(direction, DirectionSource) else None
        self.current: ConceptDirection | None = None
        """The direction in force, orthonormal and on the parameters' devices during a fit."""
        self.firings, self.skipped_steps = 0, 0
        self._bypass = _BypassGuard()

    @property
    def state_key(self) -> str:
        """One key per name, so that several instances can be checkpointed."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies whose gradients this cannot read, and load a saved direction."""
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                f"GradientProjectionCallback cannot read whole gradients under {type(trainer.strategy).__name__}: "
                "use a single device or DDP."
            )
        if self.source is None and self.current is None:
            loaded = self.direction if isinstance(self.direction, ConceptDirection) else ConceptDirection.load(str(self.direction))
            self.current = loaded.select(self.parameters).orthonormal() if self.parameters is not None else loaded.orthonormal()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find unknown parameters, wrong shapes and unusable sources before training."""
        if self.current is not None:
            self.current.check_against({name: parameter.shape for name, parameter in pl_module.named_parameters()})
        if self.source is not None:
            self.source.check(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Extract the direction (unless a checkpoint brought it) and put it beside the parameters."""
        self._bypass.begin_fit()
        fresh = None
        if self.current is None and self.source is not None:
            fresh = self.source.prepare(trainer, pl_module)
        if fresh is not None or self.current is not None:
            self._adopt(fresh or self.current, trainer, pl_module, narrow=fresh is not None)  # type: ignore[arg-type]

    def on_rollouts(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        """Hand a window's rollouts to the source."""
        if self.source is not None:
            self.source.on_rollouts(trainer, pl_module, window)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember where the counters stand."""
        self._bypass.begin_batch(trainer.global_step, self.firings, self._watched(pl_module))

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Refresh the direction if its source wants to, then project ``p.grad`` in place.

        Raises:
            RuntimeError: There is no direction, or a gradient is sharded or sparse.
        """
        self.firings += 1
        metrics = self._refresh(trainer, pl_module)
        trained = _parameters_of(optimizer)
        mine = {name: parameter for name, parameter in self._watched(pl_module).items() if id(parameter) in trained}
        if mine:
            self._bypass.reached = True
        gradients = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
        if not _all_finite(gradients):
            # Without gradients an optimizer leaves parameters and moments alone; a GradScaler that saw the same values skips the step
            # itself.
            for parameter in trained.values():
                parameter.grad = None
            self.skipped_steps += 1
        elif mine:
            metrics |= _summary([self._project(name, p.grad) for name, p in mine.items() if p.grad is not None])
        metrics["skipped_steps"] = float(self.skipped_steps)
        for key, value in metrics.items():
            pl_module.log(f"projection/{self.name}/{key}", value, on_step=True, on_epoch=False)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Raise ``RuntimeError`` if an optimizer stepped past this callback."""
        self._bypass.end_batch(trainer.global_step, self.firings, self._watched(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ``RuntimeError`` if a whole fit never came by."""
        self._bypass.end_fit()

    def state_dict(self) -> dict[str, Any]:
        """The direction, the counters and the source's state, as tensors, numbers, strings and lists."""
        direction = None
        if self.current is not None:
            vectors = {name: rows.detach().cpu() for name, rows in self.current.vectors.items()}
            direction = {"vectors": vectors, "metadata": json.dumps(self.current.metadata)}
        source = self.source.state_dict() if self.source is not None else {}
        return {"direction": direction, "firings": self.firings, "skipped_steps": self.skipped_steps, "source": source}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`.

        Raises:
            ValueError: The config names a saved direction and the checkpoint was trained with another.
        """
        self.firings, self.skipped_steps = state_dict["firings"], state_dict["skipped_steps"]
        saved = state_dict["direction"]
        restored = None if saved is None else ConceptDirection(saved["vectors"], metadata=json.loads(saved["metadata"]))
        if self.source is not None:
            self.source.load_state_dict(state_dict["source"])
        elif restored is not None and self.current is not None and not _same(restored, self.current):
            raise ValueError(
                f"The checkpoint was trained with another direction than {self.name!r} is given now: resume with the same or start afresh."
            )
        self.current = restored

    def _refresh(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Ask the source for a new direction; returns what there is to log about it."""
        if self.source is None:
            return {}
        metrics: dict[str, Any] = {}
        timed: Any = getattr(pl_module, "timed", None)  # a module that times its phases gets one for this
        with timed("direction") if timed is not None else nullcontext():
            fresh = self.source.refresh(trainer, pl_module, trainer.global_step)
        if fresh is not None:
            previous = self.current
            self._adopt(fresh, trainer, pl_module, narrow=True)
            if previous is not None and self.current is not None:
                metrics["overlap"] = previous.overlap(self.current)
        if self.current is None:
            raise RuntimeError(
                f"{type(self.source).__name__} has given no direction by the first optimizer step, so nothing can be projected."
            )
        return metrics | self.source.metrics()

    def _adopt(self, direction: ConceptDirection, trainer: Trainer, pl_module: LightningModule, narrow: bool) -> None:
        """Put a direction in force: checked, orthonormal, on the parameters' devices, rank 0's numbers everywhere."""
        parameters = dict(pl_module.named_parameters())
        if narrow:
            direction = direction.select(self.parameters).orthonormal() if self.parameters is not None else direction.orthonormal()
        direction.check_against({name: parameter.shape for name, parameter in parameters.items()})
        trained = {key for optimizer in trainer.optimizers for key in _parameters_of(optimizer)}
        for name in direction.vectors:
            if id(parameters[name]) not in trained:
                raise ValueError(f"The direction has a vector for {name}, which no optimizer trains: narrow it with `parameters`.")
        vectors = {name: rows.to(parameters[name].device) for name, rows in direction.vectors.items()}
        if trainer.world_size > 1:
            for rows in vectors.values():
                torch.distributed.broadcast(rows, src=0)
        self.current = ConceptDirection(vectors, direction.space, direction.metadata)

    def _watched(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        """The parameters that the direction acts on."""
        names = {} if self.current is None else self.current.vectors
        return {name: parameter for name, parameter in pl_module.named_parameters() if name in names}

    def _project(self, name: str, gradient: Tensor) -> ProjectionStats:
        """Project one gradient in place."""
        assert self.current is not None
        if isinstance(gradient, DTensor) or gradient.is_sparse:
            raise RuntimeError(
                f"The gradient of {name} is {'sharded' if isinstance(gradient, DTensor) else 'sparse'}: it must be whole and dense."
            )
        projected, stats = project(
            gradient,
            self.current.vectors[name],
            gate=self.gate,
            overshoot=self.overshoot,
            push=self.push,
            preserve_magnitude=self.preserve_magnitude,
            max_magnitude_factor=self.max_magnitude_factor,
        )
        gradient.copy_(projected)
        return stats


class _BypassGuard:
    """Notices optimizer steps that ``on_before_optimizer_step`` never saw.

    Two ways past the hook are known: an optimizer that ignores its closure (steps are counted, the hook does not fire), and manual
    optimisation with ``self.optimizers(use_pl_optimizer=False)`` (nothing is counted, but the parameters' version counters move).
    """

    def __init__(self) -> None:
        self.reached = False
        self._batches = 0
        self._steps, self._firings, self._versions = 0, 0, 0

    def begin_fit(self) -> None:
        self.reached, self._batches = False, 0

    def begin_batch(self, steps: int, firings: int, watched: dict[str, nn.Parameter]) -> None:
        self._steps, self._firings, self._versions = steps, firings, _versions(watched)

    def end_batch(self, steps: int, firings: int, watched: dict[str, nn.Parameter]) -> None:
        self._batches += 1
        unseen = (steps - self._steps) - (firings - self._firings)
        if unseen > 0:
            raise RuntimeError(
                f"{unseen} optimizer step(s) bypassed GradientProjectionCallback: the optimizer ignores the closure that it is given; "
                "call it in step(closure)."
            )
        if not self.reached and firings == self._firings and _versions(watched) != self._versions:
            raise RuntimeError(
                "Parameters changed without GradientProjectionCallback: the module steps a raw optimizer; use self.optimizers() without "
                "use_pl_optimizer=False."
            )

    def end_fit(self) -> None:
        if self._batches > 0 and not self.reached:
            raise RuntimeError(
                f"GradientProjectionCallback saw no optimizer step on its parameters in {self._batches} batches: nothing was projected; "
                "step with self.optimizers() and without use_pl_optimizer=False."
            )


def _versions(watched: dict[str, nn.Parameter]) -> int:
    """Sum of the counters that every in-place change of a tensor raises."""
    return sum(parameter._version for parameter in watched.values())


def _parameters_of(optimizer: Optimizer) -> dict[int, nn.Parameter]:
    """The optimizer's parameters by identity."""
    return {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}


def _all_finite(gradients: Iterable[Tensor]) -> bool:
    """Whether every value is finite, with one transfer to the host (the maximum norm cannot overflow)."""
    largest = [torch.linalg.vector_norm(gradient, float("inf")).float() for gradient in gradients]
    return not largest or bool(torch.isfinite(torch.stack([norm.to(largest[0].device) for norm in largest])).all())


def _summary(stats: list[ProjectionStats]) -> dict[str, Tensor]:
    """Means over the projected matrices."""
    if not stats:
        return {}
    device = stats[0].fired.device
    columns = {
        "cos_before": [one.cos_before for one in stats],
        "cos_after": [one.cos_after for one in stats],
        "removed_fraction": [one.removed_fraction for one in stats],
        "fired_fraction": [one.fired for one in stats],
    }
    return {key: torch.stack([value.to(device).float() for value in values]).mean() for key, values in columns.items()}


def _same(first: ConceptDirection, second: ConceptDirection) -> bool:
    """Equal parameters and equal numbers."""
    return first.vectors.keys() == second.vectors.keys() and all(
        torch.equal(rows.cpu(), second.vectors[name].cpu()) for name, rows in first.vectors.items()
    )
