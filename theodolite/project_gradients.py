"""The projection in a bare PyTorch loop: one call between ``backward`` and ``step``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

from theodolite.binding import Target, bind_direction
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.projection_rule import DEFAULT_MAX_MAGNITUDE_FACTOR, Gate, GateScope, ProjectionRule
from theodolite.projection_summary import summarise
from theodolite.projector import ApplyTo, Projector, StepPlan

Named: TypeAlias = Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]]

# bound once per optimizer and settings: making rows orthonormal costs more than projecting on them
_BOUND: WeakKeyDictionary[Optimizer, tuple[Any, Projector]] = WeakKeyDictionary()


def project_gradients(
    optimizer: Optimizer,
    direction: ConceptDirection,
    named_parameters: Named | None = None,
    *,
    gate: Gate = "one_sided",
    gate_scope: GateScope = "tensor",
    overshoot: float = 1.0,
    push: float = 0.0,
    preserve_magnitude: bool = False,
    max_magnitude_factor: float = DEFAULT_MAX_MAGNITUDE_FACTOR,
    apply_to: ApplyTo = "gradient",
    target: Target = "all",
    purge_moments: bool = False,
    measure_only: bool = False,
) -> dict[str, Tensor]:
    """Project the gradients of the coming step, and with ``apply_to`` the step itself when it is made.

    Call it when gradients are final and not yet clipped::

        loss.backward()
        project_gradients(optimizer, direction, model.named_parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    Under DDP gradients are equal on all ranks by then, and so is the result. With a ``GradScaler`` call ``scaler.unscale_(optimizer)``
    first.

    Args:
        optimizer: Whose parameters are projected.
        direction: Where the step must not go; names are those of ``named_parameters``.
        named_parameters: As from ``model.named_parameters()``; None takes the names that the optimizer was built with.
        gate: See :class:`~theodolite.functional.projection_rule.ProjectionRule`, as for the next five.
        gate_scope: Who decides.
        overshoot: 1 removes, 2 reflects.
        push: A constant step away instead of the gate.
        preserve_magnitude: Rescale to the norm before.
        max_magnitude_factor: Bound of that.
        apply_to: ``gradient``, the applied ``update`` (projected by a hook when ``optimizer.step()`` is done), or ``both``.
        target: See :func:`~theodolite.binding.bind_direction`.
        purge_moments: Also take the gated component out of the optimizer's first moments.
        measure_only: Change nothing.

    Returns:
        The numbers of :func:`~theodolite.projection_summary.summarise` on the gradient, and ``skipped`` (1 where a gradient was not
        finite: all gradients of the optimizer are then None and its step does nothing). Numbers of the update, under ``update_...``, are
            added to the same
        dictionary when the step is made.

    Raises:
        ValueError: Contradictory settings, missing names, or a direction that does not fit the parameters.
    """
    rule = ProjectionRule(gate, gate_scope, overshoot, push, preserve_magnitude, max_magnitude_factor, target == "flattened", measure_only)
    plan = StepPlan(apply_to, purge_moments)
    projector = _bound(optimizer, direction, named_parameters, rule, plan, target)
    half = gate == "one_sided" and push == 0
    stats = projector.before_step(optimizer)
    if stats is None:
        return {"skipped": _one(optimizer)}
    metrics = summarise(stats, projector.null_shares(), half) | {"skipped": 0 * _one(optimizer)}
    if plan.watches_update:

        def after(stepped: Optimizer, *_: Any) -> None:
            handle.remove()
            found = summarise(projector.after_step(stepped), projector.null_shares(), half)
            metrics.update({f"update_{key}": value for key, value in found.items()})

        handle = optimizer.register_step_post_hook(after)
    return metrics


def _bound(
    optimizer: Optimizer, direction: ConceptDirection, named: Named | None, rule: ProjectionRule, plan: StepPlan, target: Target
) -> Projector:
    """The projector of an earlier call with the same direction and settings, or a new one."""
    key, projector = _BOUND.get(optimizer, (None, None))
    if projector is not None and key is not None and key[0] is direction and key[1:] == (rule, plan, target):
        return projector
    parameters = dict(named) if named is not None else _names_of(optimizer)
    projector = Projector(rule, plan)
    projector.bind(bind_direction(direction, parameters, rule, target), parameters)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in projector.watched().items():
        if id(parameter) not in trained:
            raise ValueError(f"The direction has a vector for {name}, which this optimizer does not train: leave it out with select().")
    _BOUND[optimizer] = ((direction, rule, plan, target), projector)
    return projector


def _names_of(optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Names that the optimizer was built with (``AdamW(model.named_parameters())``)."""
    if not all("param_names" in group for group in optimizer.param_groups):
        raise ValueError("The optimizer does not know its parameters' names: give named_parameters=model.named_parameters().")
    return {name: p for group in optimizer.param_groups for name, p in zip(group["param_names"], group["params"], strict=True)}


def _one(optimizer: Optimizer) -> Tensor:
    return optimizer.param_groups[0]["params"][0].new_ones(())
