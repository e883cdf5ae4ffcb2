"""The losses of a decomposition. Each is defined once, gives a sum and a count, and can be trained on or evaluated.

A configuration is a list of dictionaries: ``{name: stochastic_recon, scope: layerwise, coeff: 1.0}``. Losses that are evaluated need no
``coeff``. ``key`` names a loss where two of the same name stand side by side.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from theodolite.config_layers import closest
from theodolite.functional.component_masks import ComponentMask, stochastic_masks
from theodolite.functional.decomposition_losses import annealed_power, faithfulness, hidden_acts_sums, importance_sums

from .component_model import importances_as_masks, ones
from .decomposition import Decomposition, Prepared
from .draws import Draws, Routing

Scope = Literal["all", "layerwise", "subset"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What all losses share.

    Attributes:
        coeff: Weight in the total training loss; None = evaluated only.
        key: Name under which it is logged; None = its own.
    """

    name: ClassVar[str]
    coeff: float | None = None
    key: str | None = None

    @property
    def label(self) -> str:
        """Name in logs."""
        return self.key or self.name


@runtime_checkable
class BatchObjective(Protocol):
    """A loss that is a sum over the rows of a batch."""

    @property
    def label(self) -> str:
        """Name in logs."""
        ...

    def sums(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> tuple[Tensor, int]:
        """Its sum, with graph, and the count it is divided by."""
        ...


@runtime_checkable
class WholeBatchObjective(BatchObjective, Protocol):
    """A loss that must see the whole batch of all ranks before it is summed over parts of it, such as one under attack."""

    def begin(self, parts: Decomposition, batch: Sequence[tuple[Prepared, Draws]], step: int, training: bool) -> None:
        """Look at a rank's microbatches, without graph; collectives are allowed. ``step`` counts optimizer steps before this one."""
        ...

    def finish(self, step: int) -> None:
        """After the backward pass of a training step; not called in evaluations."""
        ...


@dataclass(frozen=True, kw_only=True)
class Faithfulness(Objective):
    """Mean squared entry of the weight deltas; see :func:`~theodolite.functional.decomposition_losses.faithfulness`."""

    name: ClassVar[str] = "faithfulness"

    def value(self, parts: Decomposition) -> Tensor:
        """The loss: a function of parameters alone, in their own precision."""
        with torch.autocast(parts.device.type, enabled=False):
            return faithfulness(parts.model.deltas().values())


@dataclass(frozen=True, kw_only=True)
class ImportanceMinimality(Objective):
    """Penalty on upper causal importances; see :func:`~theodolite.functional.decomposition_losses.importance_minimality`.

    Its sums are those of the global batch, in training and in evaluation, so that both log the same number.

    Attributes:
        pnorm: Exponent at the start.
        beta: Weight of the logarithm of a component's total.
        eps: Added to an importance before the power.
        p_anneal_start_frac: Fraction of training at which the exponent starts to move.
        p_anneal_final_p: Where it goes; None = nowhere.
        p_anneal_end_frac: Fraction of training at which it is there.
        modules: Names of the modules whose components are charged, a glob. Components that stand for single features bear a higher price
            than those that many features share.
    """

    name: ClassVar[str] = "importance_minimality"
    pnorm: float = 1.0
    beta: float = 0.0
    eps: float = 1e-12
    p_anneal_start_frac: float = 1.0
    p_anneal_final_p: float | None = None
    p_anneal_end_frac: float = 1.0
    modules: str = "*"

    def charged(self, names: Sequence[str]) -> list[str]:
        """Which of the modules' components are charged. Raises ``ValueError`` if none are."""
        found = fnmatch.filter(names, self.modules)
        if not found:
            raise ValueError(f"{self.label}: modules {self.modules!r} matches no decomposed module{closest(self.modules, names)}.")
        return found

    def power(self, fraction: float) -> float:
        """The exponent at a fraction of training."""
        return annealed_power(fraction, self.pnorm, self.p_anneal_final_p, self.p_anneal_start_frac, self.p_anneal_end_frac)

    def component_sums(self, upper: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
        """Sums over a batch's positions, by charged module (C,)."""
        charged = {name: upper[name] for name in self.charged(list(upper))}
        return importance_sums(charged, self.power(fraction), self.eps)


@dataclass(frozen=True, kw_only=True)
class UnmaskedRecon(Objective):
    """Reconstruction by all components, without delta."""

    name: ClassVar[str] = "unmasked_recon"

    def sums(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> tuple[Tensor, int]:
        """Sum over the batch."""
        return parts.recon_sum(prepared, ones(parts.names)), parts.recon_count(prepared)


@dataclass(frozen=True, kw_only=True)
class ScopedRecon(Objective):
    """Reconstruction under some masks.

    Attributes:
        scope: ``all`` modules replaced at once; ``layerwise``: one at a time, averaged; ``subset``: a random subset at each position.
        routing: ``{probability: p}`` for ``subset``; empty = a uniform k-subset.
    """

    scope: Scope = "all"
    routing: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check scope and routing."""
        if self.scope not in ("all", "layerwise", "subset"):
            raise ValueError(f"{self.name}: there is no scope {self.scope!r}; choose all, layerwise or subset.")
        if self.routing and self.scope != "subset":
            raise ValueError(f"{self.name}: routing belongs to scope subset, not {self.scope}.")
        Routing(**self.routing)

    @property
    def label(self) -> str:
        """Name in logs, with its scope."""
        return self.key or (self.name if self.scope == "all" else f"{self.name}_{self.scope}")

    def routed(self, parts: Decomposition, prepared: Prepared, draws: Draws, sample: int) -> dict[str, Tensor] | None:
        """Routing masks of a sample; None = everywhere."""
        if self.scope != "subset":
            return None
        return draws.routing(Routing(**self.routing), parts.names, prepared.leading, sample)

    def scoped(self, masks: Mapping[str, ComponentMask]) -> Iterator[Mapping[str, ComponentMask]]:
        """The forward passes that a set of masks stands for."""
        if self.scope != "layerwise":
            yield masks
        else:
            for name, mask in masks.items():
                yield {name: mask}

    def recon_of(self, parts: Decomposition, prepared: Prepared, sets: Sequence[Mapping[str, ComponentMask]]) -> tuple[Tensor, int]:
        """Sum and count over sets of masks and their forward passes."""
        sums = [parts.recon_sum(prepared, masks) for each in sets for masks in self.scoped(each)]
        return torch.stack(sums).sum(), parts.recon_count(prepared) * len(sums)


@dataclass(frozen=True, kw_only=True)
class CIMaskedRecon(ScopedRecon):
    """Reconstruction with the lower causal importances as masks, without delta."""

    name: ClassVar[str] = "ci_masked_recon"

    def sums(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> tuple[Tensor, int]:
        """Sum over the batch."""
        return self.recon_of(parts, prepared, [importances_as_masks(prepared.lower, self.routed(parts, prepared, draws, 0))])


@dataclass(frozen=True, kw_only=True)
class StochasticRecon(ScopedRecon):
    """Reconstruction under masks ``g + (1 - g) xi``, xi uniform (or 0 or 1 under binomial sampling); delta masks uniform.

    Attributes:
        samples: Masks drawn per batch.
    """

    name: ClassVar[str] = "stochastic_recon"
    samples: int = 1

    def sums(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> tuple[Tensor, int]:
        """Sum over samples and the batch."""
        sets = [sampled_masks(parts, prepared, draws, s, self.routed(parts, prepared, draws, s)) for s in range(self.samples)]
        return self.recon_of(parts, prepared, sets)


@dataclass(frozen=True, kw_only=True)
class StochasticHiddenActsRecon(Objective):
    """Squared error of every decomposed module's output under stochastic masks against a clean pass; upstream errors propagate.

    Attributes:
        samples: Masks drawn per batch.
    """

    name: ClassVar[str] = "stochastic_hidden_acts_recon"
    samples: int = 1

    def by_module(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> dict[str, tuple[Tensor, int]]:
        """Sum and count of each module."""
        samples = [hidden_acts(parts, prepared, sampled_masks(parts, prepared, draws, sample)) for sample in range(self.samples)]
        return {n: (torch.stack([s[n][0] for s in samples]).sum(), sum(s[n][1] for s in samples)) for n in parts.names}

    def sums(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> tuple[Tensor, int]:
        """Sum over modules, samples and the batch."""
        return total_of(self.by_module(parts, prepared, draws))


@dataclass(frozen=True, kw_only=True)
class CIHiddenActsRecon(Objective):
    """As :class:`StochasticHiddenActsRecon` with the lower causal importances as masks, without delta."""

    name: ClassVar[str] = "ci_hidden_acts_recon"

    def by_module(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> dict[str, tuple[Tensor, int]]:
        """Sum and count of each module."""
        return hidden_acts(parts, prepared, importances_as_masks(prepared.lower))

    def sums(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> tuple[Tensor, int]:
        """Sum over modules and the batch."""
        return total_of(self.by_module(parts, prepared, draws))


def sampled_masks(
    parts: Decomposition, prepared: Prepared, draws: Draws, sample: int, routing: Mapping[str, Tensor] | None = None
) -> dict[str, ComponentMask]:
    """One sample of stochastic masks."""
    noise = draws.mask_noise(prepared.leading, parts.noise_channels, sample)
    return stochastic_masks(prepared.lower, noise, parts.use_delta, parts.binomial, routing)


def hidden_acts(parts: Decomposition, prepared: Prepared, masks: Mapping[str, ComponentMask]) -> dict[str, tuple[Tensor, int]]:
    """Squared error of all decomposed modules' outputs under ``masks``, with counts."""
    return hidden_acts_sums(parts.model(prepared.batch, masks, keep=("outputs",)).outputs, prepared.outputs)


def total_of(by_module: Mapping[str, tuple[Tensor, int]]) -> tuple[Tensor, int]:
    """Sum of sums and of counts."""
    return torch.stack([value for value, _ in by_module.values()]).sum(), sum(count for _, count in by_module.values())
