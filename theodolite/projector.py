r"""The projection of whole optimizer steps, for any training loop: what the Lightning callback and the adapters have in common.

A step is bracketed by :meth:`Projector.before_step`, when gradients are final (accumulated, summed over ranks, unscaled) and not yet
clipped, and :meth:`Projector.after_step`, when the optimizer has changed the parameters.

**Gradient or update.** Projecting the gradient does not project what an adaptive optimizer applies: Adam divides element by element and
remembers earlier gradients, and both bring the direction back. ``apply_to="update"`` therefore projects the applied change ``w_new -
w_old`` itself, weight decay included, and writes ``w_old`` plus what is left; ``both`` does one after the other.

**Route.** With ``route`` the removed part of the update is not thrown away but parked: training goes on with the full weights, the parked
part is kept beside them, and at deployment it is subtracted (:meth:`Projector.deployed`). The policy may then learn the concept where it
can be dropped, which is another thing than keeping it from learning.

**Shards.** Parameters that are ``DTensor`` (FSDP2) are projected shard by shard; coefficients and squared norms are summed over the mesh
in a few small collectives per step, and no gradient is gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, Shard
from torch.optim import Optimizer

from theodolite.functional.directions import ConceptDirection
from theodolite.functional.projection import Basis, ProjectionStats, project_all
from theodolite.functional.projection_rule import ProjectionRule

ApplyTo: TypeAlias = Literal["gradient", "update", "both"]
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""Optimizer state that is a running mean of gradients, and so can be projected like one. Second moments are not vectors of that space."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Which part of a step is projected.

    Attributes:
        apply_to: The gradient, the applied update, or one after the other.
        purge_moments: Before each step, also take the (gated) component out of the optimizer's first moments.
        route: Park the removed part of the update instead of dropping it.
        measure_update: Measure the applied update also where only gradients are projected (costs a copy of the parameters).

    Raises:
        ValueError: A plan that contradicts itself or the rule, see :meth:`check`.
    """

    apply_to: ApplyTo = "gradient"
    purge_moments: bool = False
    route: bool = False
    measure_update: bool = False

    def check(self, rule: ProjectionRule) -> None:
        """Refuse what cannot work together (``ValueError``, one sentence)."""
        if self.apply_to not in ("gradient", "update", "both"):
            raise ValueError(f"apply_to={self.apply_to!r} is unknown: use 'gradient', 'update' or 'both'.")
        reflects = rule.push > 0 or rule.gate == "reverse" or (rule.gate == "two_sided" and rule.overshoot != 1.0)
        if self.apply_to == "both" and reflects:
            raise ValueError("apply_to='both' would reflect or push twice, which partly undoes itself: use 'gradient' or 'update'.")
        if self.route and (self.apply_to != "update" or rule.preserve_magnitude or rule.measure_only):
            raise ValueError(
                "route splits the applied update into a kept and a parked part: it needs apply_to='update' without preserve_magnitude and "
                "measure_only."
            )

    @property
    def watches_update(self) -> bool:
        """Whether the parameters of a step have to be remembered."""
        return self.apply_to != "gradient" or self.measure_update


class StepStats(Mapping[str, ProjectionStats]):
    """Statistics by parameter name (one entry ``""`` if flattened), kept in columns: reading a name costs, averaging over all does not."""

    def __init__(self, names: list[str], parts: list[ProjectionStats]) -> None:
        self._index = {name: i for i, name in enumerate(names)}
        self._parts = parts

    def column(self, field: str) -> Tensor:
        """One field of all parameters, in float32 on the first one's device."""
        device = self._parts[0].norm.device
        return torch.cat([getattr(part, field).to(device).float() for part in self._parts])

    def __getitem__(self, name: str) -> ProjectionStats:
        index = self._index[name]
        for part in self._parts:
            if index < len(part.norm):
                return part.one(index)
            index -= len(part.norm)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


class Projector:
    """Projects the steps of one optimizer after another along one direction.

    Args:
        rule: What is done with the component.
        plan: Where in the step.

    Raises:
        ValueError: A plan that contradicts the rule.
    """

    def __init__(self, rule: ProjectionRule, plan: StepPlan) -> None:
        plan.check(rule)
        self.rule, self.plan = rule, plan
        self.parked: dict[str, Tensor] = {}
        """With ``route``: what deployment subtracts, by parameter name (local shards)."""
        self._parameters: dict[str, nn.Parameter] = {}
        self._bases: dict[str, Basis] = {}
        self._snapshot: dict[str, Tensor] = {}

    def bind(self, direction: ConceptDirection, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put a direction in force.

        Args:
            direction: Space ``parameter`` or ``lora_B``, with orthonormal rows, on names among ``parameters``.
            parameters: The module's named parameters.
        """
        self._parameters = {name: parameters[name] for name in direction.vectors}
        self._bases = {name: _local_basis(direction, name, parameter) for name, parameter in self._parameters.items()}

    def watched(self, optimizer: Optimizer | None = None) -> dict[str, nn.Parameter]:
        """Parameters that the direction acts on (of one optimizer, if given)."""
        if optimizer is None:
            return dict(self._parameters)
        trained = parameters_of(optimizer)
        return {name: parameter for name, parameter in self._parameters.items() if id(parameter) in trained}

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> StepStats | None:
        """Project the gradients in place and remember the parameters, as the plan wants.

        Returns:
            Statistics by parameter name (one entry ``""`` if flattened), or None where a gradient of this optimizer is not finite: all of
            its gradients are then None, so that neither parameters nor moments move (a GradScaler that saw the same values skips the step
            itself).

        Raises:
            RuntimeError: A gradient is sparse.
        """
        self._snapshot = {}
        trained = parameters_of(optimizer)
        if not all_finite(parameter.grad for parameter in trained.values() if parameter.grad is not None):
            for parameter in trained.values():
                parameter.grad = None
            return None
        mine = {name: parameter for name, parameter in self.watched(optimizer).items() if parameter.grad is not None}
        gradients = {name: _dense(name, parameter.grad) for name, parameter in mine.items()}
        edits = self.plan.apply_to != "update"
        stats = self._project(gradients, gradients if edits else None)
        if self.plan.purge_moments and not self.rule.measure_only:
            self._purge(optimizer, mine)
        if self.plan.watches_update:
            self._snapshot = {name: local(parameter).clone() for name, parameter in mine.items()}
        return stats

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> StepStats:
        """Project the change that the optimizer has applied to the parameters remembered by :meth:`before_step`; no-op without them."""
        mine = self.watched(optimizer)
        before = {name: old for name, old in self._snapshot.items() if name in mine}
        self._snapshot = {}
        # as the loss gradient that it stands for: a descent step is minus a gradient
        changes = {name: old - local(self._parameters[name]) for name, old in before.items()}
        if self.plan.apply_to == "gradient":
            return self._project(changes, None)
        stats = self._project(changes, changes)
        fired = stats.column("fired").bool().expand(len(before)) if before else ()
        for (name, old), gate in zip(before.items(), fired, strict=True):
            parameter = local(self._parameters[name])
            wanted = torch.where(gate, old - changes[name], parameter)
            if self.plan.route:
                parked = self.parked.setdefault(name, torch.zeros_like(parameter))
                parked += parameter - wanted
            elif not self.rule.measure_only:
                parameter.copy_(wanted)
        return stats

    @contextmanager
    def deployed(self) -> Iterator[None]:
        """The weights without what is parked, inside; exactly those of training again on the way out."""
        training = self.drop_parked(self._parameters)
        try:
            yield
        finally:
            restore(self._parameters, training)

    @torch.no_grad()
    def drop_parked(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Subtract what is parked; returns copies of the weights as they were, for :func:`restore`."""
        training = {name: local(parameters[name]).clone() for name in self.parked}
        for name, parked in self.parked.items():
            local(parameters[name]).sub_(parked.to(parameters[name].device))
        return training

    def null_shares(self) -> dict[str, float]:
        """Per parameter, the share ``|c|^2 / |g|^2`` that a random gradient of its (whole) shape has in the basis."""
        return {name: _null_share(self._bases[name], parameter) for name, parameter in self._parameters.items()}

    def coefficients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``sum_i c_i / sqrt(k)`` of whole (not sharded) gradients, by parameter name: linear in the gradient."""
        result = {}
        for name, gradient in gradients.items():
            basis = self._bases[name]
            c = basis.coefficients(gradient.detach().flatten().float())
            result[name] = c.sum() / len(c) ** 0.5
        return result

    def _project(self, gradients: Mapping[str, Tensor], write_to: Mapping[str, Tensor] | None) -> StepStats:
        """Statistics by name; the results go into ``write_to``, and nowhere without it."""
        rule = self.rule if write_to is not None else _measuring(self.rule)
        names: list[str] = []
        parts: list[ProjectionStats] = []
        for batch in self._batches(gradients):
            tensors = [local(gradients[name]) for name in batch]
            outputs = None if write_to is None else [local(write_to[name]) for name in batch]
            reduce = _reducer(self._parameters[batch[0]])
            _, found = project_all(
                tensors, [self._bases[name] for name in batch], rule, [module_of(name) for name in batch], reduce, outputs
            )
            names += [""] if rule.flattened else batch
            parts.append(found)
        return StepStats(names, parts)

    def _batches(self, gradients: Mapping[str, Tensor]) -> list[list[str]]:
        """Names on one device, whole or sharded alike, that are projected in one call.

        Raises:
            RuntimeError: A gate or a flattened gradient would have to span several.
        """
        kinds: dict[str, list[str]] = {}
        for name in gradients:
            parameter = self._parameters[name]
            placed = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else parameter.device
            kinds.setdefault(f"{placed} {parameter.dtype == torch.float64}", []).append(name)
        if len(kinds) > 1 and (self.rule.flattened or self.rule.gate_scope != "tensor"):
            raise RuntimeError("Some parameters are placed differently from others, so they cannot share a gate: use gate_scope='tensor'.")
        return list(kinds.values())

    def _purge(self, optimizer: Optimizer, mine: Mapping[str, nn.Parameter]) -> None:
        """Take the gated component out of first moments, without overshoot or rescaling."""
        plain = ProjectionRule(
            "two_sided" if self.rule.gate == "reverse" else self.rule.gate, self.rule.gate_scope, flattened=self.rule.flattened
        )
        purger = Projector(plain, StepPlan())
        purger._parameters, purger._bases = self._parameters, self._bases
        for key in FIRST_MOMENTS:
            moments = {name: optimizer.state[p][key] for name, p in mine.items() if isinstance(optimizer.state[p].get(key), Tensor)}
            if moments:
                purger._project(moments, moments)


@torch.no_grad()
def restore(parameters: Mapping[str, nn.Parameter], training: Mapping[str, Tensor]) -> None:
    """Take back the weights that :meth:`Projector.drop_parked` returned."""
    for name, weights in training.items():
        local(parameters[name]).copy_(weights)


def parameters_of(optimizer: Optimizer) -> dict[int, nn.Parameter]:
    """The optimizer's parameters by identity."""
    return {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}


def module_of(name: str) -> str:
    """The module whose gate a parameter shares: its own, and for LoRA's A and B the layer that they adapt."""
    return name.rpartition(".")[0].split(".lora_")[0]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, without autograd; shares memory with it."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def all_finite(gradients: Iterable[Tensor]) -> bool:
    """Whether every value is finite, on every process that holds a shard, with one transfer to the host."""
    whole = list(gradients)
    if not whole:
        return True
    reduce = next((_reducer(gradient) for gradient in whole if isinstance(gradient, DTensor)), None)
    device = local(whole[0]).device
    # a NaN or an infinity survives summation, and a sum is several times faster than a maximum norm
    sums = torch.stack(
        [local(gradient).sum(dtype=torch.promote_types(gradient.dtype, torch.float32)).to(device).double() for gradient in whole]
    )
    bad = (~torch.isfinite(sums)).any().float()
    return not bool(reduce(bad[None]) if reduce is not None else bad)


def _measuring(rule: ProjectionRule) -> ProjectionRule:
    return ProjectionRule(rule.gate, rule.gate_scope, rule.overshoot, rule.push, flattened=rule.flattened, measure_only=True)


def _null_share(basis: Basis, parameter: nn.Parameter) -> float:
    """From the parameter's whole shape, also where the basis is a shard."""
    return len(basis.rows) / (parameter.shape[0] if basis.output_side else parameter.numel())


def _dense(name: str, gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    if gradient.is_sparse:
        raise RuntimeError(f"The gradient of {name} is sparse: it must be dense, e.g. an Embedding with sparse=False.")
    return gradient


def _local_basis(direction: ConceptDirection, name: str, parameter: nn.Parameter) -> Basis:
    """The rows of one parameter, on its device and cut like it."""
    rows = direction.vectors[name]
    columns = parameter.shape[1] if direction.space == "lora_B" else None
    if not isinstance(parameter, DTensor):
        return Basis(rows.to(parameter.device), columns)
    placements: list[Placement] = []
    for placement in parameter.placements:
        if placement.is_partial() or (columns is not None and placement.is_shard(1)):
            raise ValueError(f"{name} is placed as {placement}, which cannot be projected shard by shard: shard it along dimension 0.")
        placements.append(Shard(placement.dim + 1) if isinstance(placement, Shard) else placement)
    cut = distribute_tensor(rows.to(parameter.device), parameter.device_mesh, placements, src_data_rank=None)
    return Basis(cut.to_local(), columns)


def _reducer(parameter: Tensor) -> Any:
    """Sums a vector over the shards of a parameter; None for a whole one."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    placements = [Partial() if placement.is_shard() else Replicate() for placement in parameter.placements]

    def reduce(vector: Tensor) -> Tensor:
        return DTensor.from_local(vector, mesh, placements, run_check=False).full_tensor()

    return reduce
