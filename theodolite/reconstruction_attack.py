"""Adversarial evaluation of a :class:`~theodolite.protocols.MaskedReconstruction`: which rows are attacked together, and in which pieces.

Attack k takes rows ``k A`` to ``(k + 1) A - 1`` of the evaluation data, with A the *global* attack batch size. So the same rows are
attacked together on 1 process and on 8, in microbatches of any size, and every number carries the attack batch that it holds for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.distributed import gather_objects, sum_over_ranks
from theodolite.evaluation_rows import RowStore
from theodolite.functional.pgd import (
    MASK_SCOPES,
    SOURCE_INITS,
    AttackCurve,
    MaskScope,
    Rows,
    SourceInit,
    attack_each,
    attack_groups,
    initial_sources,
    is_shared,
    source_shape,
)
from theodolite.protocols import MaskedReconstruction, SlopedReconstruction


@dataclass(frozen=True, slots=True)
class AttackSettings:
    """An attack, whatever it runs on.

    Attributes:
        n_steps: Numbers of steps at which the loss is reported; one attack of the largest.
        step_size: Of the sign ascent, in units of the box [0, 1].
        init: Where sources start.
        mask_scope: What shares a source; see :func:`~theodolite.functional.pgd.source_shape`.
        attack_batch_size: Rows attacked together, over all ranks.
        micro_batch_size: Rows per forward pass on one rank; decides memory, not the result. None = as the data comes.
        attacks: Attack batches per evaluation; None = as many as the data fills.
        legacy_ranks: Also report what this many processes would have found, each with an equal, contiguous part of the attack batch: once
            averaging their gradients, once not talking to each other.
        keep_prepared: Keep target outputs and causal importances of all microbatches between steps instead of computing them again: faster,
            and memory grows with the attack batch.
        seed: Of random starts.

    Raises:
        ValueError: If the settings contradict each other.
    """

    n_steps: tuple[int, ...] = (20,)
    step_size: float = 0.1
    init: SourceInit = "random"
    mask_scope: MaskScope = "shared_across_batch"
    attack_batch_size: int = 64
    micro_batch_size: int | None = None
    attacks: int | None = None
    legacy_ranks: int | None = None
    keep_prepared: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if not self.n_steps or min(self.n_steps) < 0 or len(set(self.n_steps)) < len(self.n_steps):
            raise ValueError(f"n_steps is {list(self.n_steps)}; give one or more different numbers of steps, none below 0.")
        for name in ("attack_batch_size", "micro_batch_size", "attacks", "legacy_ranks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not 0 < self.step_size <= 1:
            raise ValueError(f"step_size must be above 0 and at most 1 (the whole box), got {self.step_size}.")
        if self.init not in SOURCE_INITS or self.mask_scope not in MASK_SCOPES:
            raise ValueError(
                f"init is one of {SOURCE_INITS} and mask_scope one of {MASK_SCOPES}; got {self.init!r} and {self.mask_scope!r}."
            )
        if self.legacy_ranks is not None and not is_shared(self.mask_scope):
            raise ValueError(f"legacy_ranks needs a shared mask_scope: under {self.mask_scope} every row is attacked by itself anyway.")
        if self.legacy_ranks is not None and self.attack_batch_size % self.legacy_ranks:
            size, ranks = self.attack_batch_size, self.legacy_ranks
            nearest = size // ranks * ranks or ranks
            raise ValueError(f"An attack batch of {size} does not split over {ranks} legacy ranks; {nearest} would.")

    def modes(self) -> dict[str, Mode]:
        """What is measured, by a label that names the attack batch."""
        if not is_shared(self.mask_scope):
            return {"unique": Mode(1, False, False)}
        modes = {f"joint_{self.attack_batch_size}": Mode(self.attack_batch_size, False, True)}
        if self.legacy_ranks is not None:
            shard = self.attack_batch_size // self.legacy_ranks
            modes[f"averaged_{self.legacy_ranks}x{shard}"] = Mode(shard, True, True)
            modes[f"separate_{shard}"] = Mode(shard, False, True)
        return modes


@dataclass(frozen=True, slots=True)
class Mode:
    """How the rows of an attack batch are grouped.

    Attributes:
        group: Rows per group.
        average: Groups move together, by the mean of their gradients.
        shared: A group shares a source; otherwise every row has its own.
    """

    group: int
    average: bool
    shared: bool


@dataclass(slots=True)
class AttackOutcome:
    """One mode's curves, one per attack batch, with sums over all ranks."""

    mode: Mode
    curves: list[AttackCurve] = field(default_factory=list)

    def row(self, label: str, n_steps: int, settings: AttackSettings) -> dict[str, Any]:
        """One number with everything it depends on, as plain data; the error is the standard error over attack batches."""
        values = [curve.loss(n_steps) for curve in self.curves]
        count = sum(curve.counts[n_steps] for curve in self.curves)
        agreements = [curve.agreement[n_steps] for curve in self.curves if n_steps in curve.agreement]
        return {
            "attack": label,
            "n_steps": n_steps,
            "loss": sum(curve.sums[n_steps] for curve in self.curves) / count,
            "count": count,
            # what a shared source faces: where groups average their gradients, all of them
            "attack_batch": settings.attack_batch_size if self.mode.average else self.mode.group,
            "mask_scope": settings.mask_scope,
            "init": settings.init,
            "step_size": settings.step_size,
            "attacks": len(values),
            "standard_error": statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None,
            "gradient_agreement": statistics.fmean(agreements) if agreements else None,
            "per_attack": values,
        }


def attack_reconstruction(
    module: MaskedReconstruction,
    store: RowStore,
    settings: AttackSettings,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[dict[str, AttackOutcome], int]:
    """Attack the stored rows of all ranks in every mode. All ranks must call this; each gets the same numbers.

    Args:
        module: What is attacked; nothing of it is changed.
        store: This rank's rows.
        settings: The attack.
        context: Opened around every computation of the module: autocast, for instance.

    Returns:
        Outcomes by label, and the number of rows at the end that filled no attack batch.

    Raises:
        ValueError: If the data does not fill one attack batch.
    """
    total = round(float(sum_over_ranks(torch.tensor([float(store.rows)], dtype=torch.float64, device=_device(module)))))
    attacks = total // settings.attack_batch_size
    attacks = attacks if settings.attacks is None else min(attacks, settings.attacks)
    if attacks == 0:
        raise ValueError(
            f"The evaluation data has {total} rows and fills no attack batch of {settings.attack_batch_size}: "
            f"give more data, or attack_batch_size {max(1, total)} at most."
        )
    outcomes = {label: AttackOutcome(mode) for label, mode in settings.modes().items()}
    with untouched(module), context():
        for attack in range(attacks):
            begin = attack * settings.attack_batch_size
            parts = [_Part(module, *piece) for piece in store.pieces(begin, begin + settings.attack_batch_size, settings.micro_batch_size)]
            for part in parts:
                part.keep = settings.keep_prepared or len(parts) == 1
            for outcome in outcomes.values():
                run = _shared if outcome.mode.shared else _unique
                outcome.curves.append(run(module, parts, begin, settings, outcome.mode))
    return outcomes, total - attacks * settings.attack_batch_size


class _Part:
    """One microbatch, and what the steps of an attack share of it."""

    def __init__(self, module: MaskedReconstruction, batch: Any, slots: list[int]) -> None:
        self.module, self.batch, self.slots, self.keep = module, batch, slots, False
        self._slope_sum = module.slope_sum if isinstance(module, SlopedReconstruction) else module.loss_sum
        self._prepared: Any = None

    def loss(self, sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        return self.module.loss_sum(self._shared(), sources)

    def slope(self, sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        return self._slope_sum(self._shared(), sources)

    def _shared(self) -> Any:
        prepared = self._prepared
        if prepared is None:
            with torch.no_grad():
                prepared = self.module.prepare(self.batch)
        if self.keep:
            self._prepared = prepared
        return prepared


def _unique(module: MaskedReconstruction, parts: Sequence[_Part], _: int, settings: AttackSettings, mode: Mode) -> AttackCurve:
    """Every row by itself, so one microbatch after the other; what is prepared for one is let go before the next."""
    curve, device = AttackCurve({n: 0.0 for n in settings.n_steps}, {n: 0 for n in settings.n_steps}), _device(module)
    for part in parts:
        part.keep = True
        shape = source_shape(settings.mask_scope, module.leading_shape(part.batch))
        sources = _start(module, shape, settings, part.slots)
        curve.add(attack_each(part.loss, sources, settings.n_steps, settings.step_size, part.slope))
        part._prepared = None
    flat = torch.tensor([[curve.sums[n], float(curve.counts[n])] for n in settings.n_steps], dtype=torch.float64, device=device)
    for n, (total, count) in zip(settings.n_steps, sum_over_ranks(flat).tolist(), strict=True):
        curve.sums[n], curve.counts[n] = total, round(count)
    return curve


def _shared(module: MaskedReconstruction, parts: Sequence[_Part], begin: int, settings: AttackSettings, mode: Mode) -> AttackCurve:
    """Groups of rows, each with a source; all start alike."""
    groups, device = settings.attack_batch_size // mode.group, _device(module)
    positions = _agreed_positions(module, parts, settings.mask_scope)
    start = _start(module, source_shape(settings.mask_scope, (1, *positions)), settings, [begin])
    sources = {name: source.repeat(groups, *[1] * (source.ndim - 1)) for name, source in start.items()}
    groups_of = [torch.tensor([(slot - begin) // mode.group for slot in part.slots], device=device) for part in parts]
    rows = [Rows(part.loss, groups, part.slope) for part, groups in zip(parts, groups_of, strict=True)]
    return attack_groups(rows, sources, settings.n_steps, settings.step_size, mode.average, sum_over_ranks)


def _agreed_positions(module: MaskedReconstruction, parts: Sequence[_Part], scope: MaskScope) -> tuple[int, ...]:
    """The shape of all ranks' rows beyond the rows: a rank may have none of this attack batch."""
    shapes = sorted(set().union(*gather_objects({tuple(module.leading_shape(part.batch)[1:]) for part in parts})))
    # where positions share a source, only their axes must agree
    if len(shapes) > 1 and (scope == "shared_across_batch_per_position" or len({len(shape) for shape in shapes}) > 1):
        raise ValueError(f"mask_scope {scope} needs rows of one shape, but an attack batch has rows of the shapes {shapes}.")
    return shapes[0]


def _start(module: MaskedReconstruction, shape: Sequence[int], settings: AttackSettings, slots: list[int]) -> dict[str, Tensor]:
    channels = module.source_channels()
    return initial_sources(channels, shape, settings.init, (settings.seed,), slots, _dtype(module), _device(module))


def _dtype(module: Any) -> torch.dtype:
    """At least float32: a step must not be lost in a source's rounding."""
    some = next((p for p in _parameters(module) if p.is_floating_point()), None)
    return torch.float32 if some is None else torch.promote_types(torch.float32, some.dtype)


def _device(module: Any) -> torch.device:
    some = next(_parameters(module), None)
    return torch.device("cpu") if some is None else some.device


def _parameters(module: Any) -> Iterator[nn.Parameter]:
    return module.parameters() if isinstance(module, nn.Module) else iter(())


@contextmanager
def untouched(module: Any) -> Iterator[None]:
    """Differentiation by sources alone, with nothing left behind.

    Inside: gradients can be computed although an evaluation forbids it, all modules are in evaluation mode and no parameter asks for a
    gradient. Afterwards modes, flags and the global random number generators are what they were.
    """
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    modes = [(part, part.training) for part in modules]
    flags = [(parameter, parameter.requires_grad) for parameter in _parameters(module)]
    devices = [_device(module)] if _device(module).type == "cuda" else []
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
        for part in modules:
            part.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for part, training in modes:
                part.training = training
