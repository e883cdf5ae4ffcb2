"""Persistent PGD: a training loss under sources that are kept from step to step, and evaluations under them.

Every training step takes ``warmup_steps`` ascents on its batch, then the loss under the sources as they are then, and one ascent along the
gradient that the loss's own backward pass leaves in the sources. Gradients are those of the mean over the global batch, summed over
microbatches and ranks in float64.

Deviations from SPD (goodfire-ai/spd): a row's source is named by its slot in the global batch, so the sources do not depend on the number
of ranks; the sources' gradient comes from the loss's backward pass instead of one of its own; everything is saved and resumed;
``output_recon`` is normalised as the training loss is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from theodolite.distributed import gather_objects, sum_over_ranks
from theodolite.functional.persistent_sources import (
    SOURCE_SCOPES,
    Ascent,
    SourceScope,
    SourceState,
    effective,
    first_state,
    move,
    stored_rows,
    stored_shape,
)
from theodolite.functional.pgd import Sources
from theodolite.functional.schedules import schedule_factor

from .attacked import attacked_masks
from .decomposition import Decomposition, Prepared
from .draws import Draws
from .objectives import Objective, ScopedRecon, hidden_acts

Batch = Sequence[tuple[Prepared, Draws]]


@dataclass(slots=True)
class _Memory:
    """What changes: the sources of this rank, which stored rows they are, and the leaves of the step in progress."""

    state: SourceState | None = None
    rows: dict[int, int] = field(default_factory=dict)  # number of a stored row to its place here
    saved: dict[str, Any] | None = None
    leaves: list[tuple[list[int], Sources]] = field(default_factory=list)
    total_steps: int | None = None
    lr: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PersistentPGDRecon(ScopedRecon):
    """Reconstruction under persistent adversarial sources. A training loss; evaluate it with :class:`PersistentPGDEval`.

    Attributes:
        source_scope: Which rows and positions share a source; see :mod:`theodolite.functional.persistent_sources`.
        n_sources: Of ``repeat_across_batch``.
        ascent: ``adam`` or ``sign``.
        lr: Step size.
        beta1: Adam's decay of the first moment.
        beta2: Adam's decay of the second moment.
        eps: Adam's epsilon.
        schedule: Of ``lr`` over training: ``constant``, ``linear`` or ``cosine``.
        warmup_fraction: Fraction of training over which ``lr`` rises from 0.
        final_lr_fraction: Where a decaying schedule ends.
        warmup_steps: Ascents on every batch before its loss.
        logits: Ascend on logits of the sources instead of clipping them.
    """

    name: ClassVar[str] = "persistent_pgd_recon"
    source_scope: SourceScope = "single_source"
    n_sources: int = 1
    ascent: Literal["adam", "sign"] = "adam"
    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_fraction: float = 0.0
    final_lr_fraction: float = 0.0
    warmup_steps: int = 0
    logits: bool = False
    _memory: _Memory = field(default_factory=_Memory, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.source_scope not in SOURCE_SCOPES:
            raise ValueError(f"{self.name}: there is no source_scope {self.source_scope!r}; choose {', '.join(SOURCE_SCOPES)}.")
        if self.n_sources < 1 or (self.n_sources > 1 and self.source_scope != "repeat_across_batch"):
            raise ValueError(f"{self.name}: n_sources is {self.n_sources}; more than 1 belong to source_scope repeat_across_batch.")
        if self.ascent not in ("adam", "sign") or self.lr <= 0 or self.warmup_steps < 0:
            raise ValueError(f"{self.name}: ascent is adam or sign, lr above 0 and warmup_steps not negative.")
        schedule_factor(0, 1, self.schedule)

    @property
    def rule(self) -> Ascent:
        """The ascent's settings."""
        return Ascent(self.ascent, self.beta1, self.beta2, self.eps, self.logits)

    def plan(self, total_steps: int) -> None:
        """Hear how long training is; the schedule needs it."""
        self._memory.total_steps = total_steps

    # ------------------------------------------------------------------ one training step

    def begin(self, parts: Decomposition, batch: Batch, step: int, training: bool) -> None:
        """Make the sources at the first step, and take the ascents that come before the loss.

        Raises:
            ValueError: If the length of training is not known, or the batch does not fit the sources.
        """
        memory = self._memory
        if not training:
            raise ValueError(
                f"{self.label} is trained; to evaluate it, list persistent_pgd_eval with loss {self.label!r} in model.metrics."
            )
        if memory.total_steps is None:
            raise ValueError(f"{self.label} has a schedule and must hear of the number of training steps (plan) before the first one.")
        if memory.state is None:
            self._make(parts, batch)
        factor = schedule_factor(step, memory.total_steps, self.schedule, self.warmup_fraction, self.final_lr_fraction)
        memory.lr, memory.leaves = self.lr * factor, []
        for ascent in range(self.warmup_steps):
            move(self._state(), self._gradients(parts, batch, ascent), self.rule, memory.lr)

    def sums(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> tuple[Tensor, int]:
        """Sum over the batch; its backward pass leaves the sources' gradients for :meth:`finish`."""
        rows, leaves = self._leaves(prepared, draws)
        self._memory.leaves.append((rows, leaves))
        masks = attacked_masks(prepared, effective(leaves, self.rule), self.routed(parts, prepared, draws, 0))
        return self.recon_of(parts, prepared, [masks])

    def finish(self, step: int) -> None:
        """Ascend along what the backward pass has left, which is ``coeff`` times the gradient of the global mean."""
        memory = self._memory
        assert self.coeff is not None
        total = self._zeros()
        for rows, leaves in memory.leaves:
            _add_rows(total, rows, {name: _gradient(name, leaf) for name, leaf in leaves.items()})
        memory.leaves = []
        gradients = {name: gradient / self.coeff for name, gradient in self._reduced(total).items()}
        move(self._state(), gradients, self.rule, memory.lr)

    def _gradients(self, parts: Decomposition, batch: Batch, ascent: int) -> Sources:
        """Gradient of the global mean loss by every stored source."""
        total, count = self._zeros(), 0
        for prepared, draws in batch:
            rows, leaves = self._leaves(prepared, draws)
            routing = self.routed(parts, prepared, draws, 1 + ascent)  # routing 0 is the loss's own
            with torch.enable_grad():
                masks = attacked_masks(prepared, effective(leaves, self.rule), routing)
                sums = [parts.recon_sum(prepared, each, frozen=True) for each in self.scoped(masks)]
                gradients = torch.autograd.grad(torch.stack(sums).sum(), list(leaves.values()))
            _add_rows(total, rows, dict(zip(leaves, gradients, strict=True)))
            count += parts.recon_count(prepared) * len(sums)
        everyone = sum_over_ranks(torch.tensor(float(count), dtype=torch.float64, device=parts.device))
        return {name: gradient / everyone for name, gradient in self._reduced(total).items()}

    def _reduced(self, total: Sources) -> Sources:
        # rows that belong to one rank have their whole gradient there
        return total if self.source_scope == "per_batch_per_position" else {name: sum_over_ranks(part) for name, part in total.items()}

    def _leaves(self, prepared: Prepared, draws: Draws) -> tuple[list[int], Sources]:
        """Places of the rows' sources, and one leaf per row: what crosses rows is summed in float64 and not in the backward pass."""
        rows = self._places(self._state(), self._memory.rows, prepared, draws)
        return rows, {name: value[rows].requires_grad_() for name, value in self._state().values.items()}

    def _places(self, state: SourceState, rows: Mapping[int, int], prepared: Prepared, draws: Draws) -> list[int]:
        numbers = stored_rows(self.source_scope, self.n_sources, draws.slots)
        some = next(iter(state.values.values()))
        shape = stored_shape(self.source_scope, prepared.leading[1:])
        if tuple(some.shape[1:-1]) != shape or not rows.keys() >= set(numbers):
            have, need = (len(rows), *some.shape[1:-1]), (len(set(numbers)), *shape)
            raise ValueError(f"{self.label} keeps sources of shape {have} (rows, positions) here, and this batch needs {need}.")
        return [rows[number] for number in numbers]

    # ------------------------------------------------------------------ sources

    def _state(self) -> SourceState:
        assert self._memory.state is not None
        return self._memory.state

    def _zeros(self) -> Sources:
        return {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self._state().values.items()}

    def _make(self, parts: Decomposition, batch: Batch) -> None:
        """Sources of this rank's rows: drawn, or those of a checkpoint."""
        # a rank without rows of its own still takes part in the ascent of shared ones
        seen = gather_objects([(tuple(p.leading[1:]), draws.seed[0], p.lower[parts.names[0]].dtype) for p, draws in batch])
        positions, seed, dtype = next(found for rank in seen for found in rank)
        slots = [slot for _, draws in batch for slot in draws.slots]
        self._memory.state, self._memory.rows = self._built(parts, slots, positions, seed, dtype)
        self._memory.saved = None

    def _built(
        self, parts: Decomposition, slots: Sequence[int], positions: Sequence[int], seed: int | str, dtype: torch.dtype
    ) -> tuple[SourceState, dict[int, int]]:
        """Sources that attack rows of these slots, and the place of each stored row."""
        per_row = self.source_scope == "per_batch_per_position"
        numbers = sorted(set(slots)) if per_row else list(range(self.n_sources))
        wide, shape = torch.promote_types(torch.float32, dtype), stored_shape(self.source_scope, positions)
        state = first_state(parts.source_channels(), numbers, shape, self.rule, (seed, "persistent", self.label), wide, parts.device)
        if self._memory.saved is not None:
            _restore(state, self._memory.saved, numbers, self.label)
        return state, {number: place for place, number in enumerate(numbers)}

    def sources_of(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> Sources:
        """The sources in [0, 1] that attack a batch's rows now, without graph. No collective."""
        if self._memory.state is None:
            dtype = prepared.lower[parts.names[0]].dtype
            state, rows = self._built(parts, draws.slots, prepared.leading[1:], draws.seed[0], dtype)
        else:
            state, rows = self._memory.state, self._memory.rows
        places = self._places(state, rows, prepared, draws)
        return effective({name: value[places] for name, value in state.values.items()}, self.rule)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Sources, moments and step of all ranks, by number of stored row. A collective where rows belong to ranks."""
        memory = self._memory
        if memory.state is None:
            return {} if memory.saved is None else memory.saved
        mine = {kind: {name: t.detach().cpu().clone() for name, t in part.items()} for kind, part in memory.state.tensors().items()}
        found = {"updates": memory.state.updates, "rows": list(memory.rows), "tensors": mine}
        return _merged(gather_objects(found)) if self.source_scope == "per_batch_per_position" else found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`; rows find their ranks at the next step."""
        self._memory.state, self._memory.saved = None, state or None


@dataclass(frozen=True, kw_only=True)
class PersistentPGDEval:
    """Reconstruction of output and of every decomposed module's output under the sources of a persistent training loss.

    All modules are replaced everywhere, whatever the loss's scope. Evaluation rows use the sources of their slots; before the first
    training step the numbers are those of sources just drawn.

    Attributes:
        loss: Label of the training loss; None = the only one.
    """

    name: ClassVar[str] = "persistent_pgd_eval"
    loss: str | None = None
    _bound: list[PersistentPGDRecon] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def label(self) -> str:
        """Name in logs."""
        return self.name if self.loss is None else f"{self.name}/{self.loss}"

    def bind(self, objectives: Sequence[Objective]) -> None:
        """Find the training loss.

        Raises:
            ValueError: If there is none, or more than one to choose from.
        """
        all_of_them = [objective for objective in objectives if isinstance(objective, PersistentPGDRecon)]
        found = [objective for objective in all_of_them if self.loss in (None, objective.label)]
        if len(found) != 1:
            labels = [objective.label for objective in all_of_them]
            raise ValueError(f"model.metrics: {self.label} needs one persistent_pgd_recon among model.losses; there are {labels}.")
        self._bound[:] = found

    def update(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> dict[str, tuple[Tensor, float]]:
        """Sums and counts of one batch."""
        (objective,) = self._bound
        masks = attacked_masks(prepared, objective.sources_of(parts, prepared, draws), None)
        output = parts.recon_sum(prepared, masks, frozen=True).to(torch.float64)
        modules = hidden_acts(parts, prepared, masks)
        found: dict[str, tuple[Tensor, float]] = {"output_recon": (output, parts.recon_count(prepared))}
        return found | {f"hidden_acts/{name}": (total.to(torch.float64), count) for name, (total, count) in modules.items()}

    def compute(self, totals: Mapping[str, tuple[Tensor, float]]) -> dict[str, float]:
        """``output_recon``, ``hidden_acts/<module>``, and ``hidden_acts`` over all their entries."""
        numbers = {key: float(total.detach()) / count for key, (total, count) in totals.items()}
        modules = [value for key, value in totals.items() if key.startswith("hidden_acts/")]
        return numbers | {"hidden_acts": sum(float(total.detach()) for total, _ in modules) / sum(count for _, count in modules)}


def _add_rows(total: Sources, rows: Sequence[int], gradients: Mapping[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        index = torch.tensor(rows, dtype=torch.long, device=gradient.device)
        total[name].index_add_(0, index, gradient.to(torch.float64))


def _gradient(name: str, leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise ValueError(f"The sources of {name!r} have no gradient: the loss was not differentiated, or does not depend on them.")
    return leaf.grad


def _restore(state: SourceState, saved: Mapping[str, Any], numbers: Sequence[int], label: str) -> None:
    """Replace fresh tensors by the saved rows."""
    places = {number: place for place, number in enumerate(saved["rows"])}
    missing = [number for number in numbers if number not in places]
    chosen = [places[number] for number in numbers if number in places]
    for kind, tensors in state.tensors().items():
        for name, tensor in tensors.items():
            found = saved["tensors"].get(kind, {}).get(name)
            if missing or found is None or found.shape[1:] != tensor.shape[1:]:
                have = None if found is None else tuple(found.shape)
                raise ValueError(
                    f"{label}: the checkpoint has {kind} of {name} of shape {have} and lacks rows {missing[:3]}; keep its settings."
                )

            tensor.copy_(found[chosen])
    state.updates = saved["updates"]


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All ranks' rows, in the order of their numbers."""
    rows = [row for part in parts for row in part["rows"]]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    kinds = parts[0]["tensors"]
    tensors = {kind: {name: torch.cat([part["tensors"][kind][name] for part in parts])[order] for name in kinds[kind]} for kind in kinds}
    return {"updates": parts[0]["updates"], "rows": [rows[i] for i in order], "tensors": tensors}
