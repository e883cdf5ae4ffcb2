"""Evaluations of a decomposition. Every number is a ratio of sums over all evaluation rows of all ranks.

A configuration is a list of dictionaries with a ``name``: any loss of :mod:`~theodolite.lightning_modules.decomposition.objectives`, or one
of the measures here and in :mod:`~theodolite.lightning_modules.decomposition.attention`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from theodolite.functional.component_masks import ComponentMask
from theodolite.functional.decomposition_losses import column_sums, next_token_cross_entropy, recon_count, recon_sum

from .component_model import importances_as_masks, no_components, ones
from .decomposition import Decomposition, Prepared
from .draws import Draws
from .objectives import sampled_masks

Sums: TypeAlias = dict[str, tuple[Tensor, float]]
"""(sum, count) by key. Sums are float64 tensors, scalars or one entry per component."""


@runtime_checkable
class Measure(Protocol):
    """Something that is measured on every evaluation batch."""

    @property
    def label(self) -> str:
        """Name in logs."""
        ...

    def update(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> Sums:
        """Sums and counts of one batch."""
        ...

    def compute(self, totals: Sums) -> dict[str, float]:
        """Numbers to log from the sums over all batches and ranks, by name."""
        ...


def ratios(totals: Sums) -> dict[str, float]:
    """Each sum over its count."""
    return {key: float(total) / count if count else float("nan") for key, (total, count) in totals.items()}


@dataclass(frozen=True, kw_only=True)
class CIL0:
    """Mean number of components per position whose lower importance is above a threshold, by module and by group of modules.

    Attributes:
        threshold: Above which a component counts as alive.
        groups: Glob patterns of modules by name of group; a group's L0 is the sum of its modules'.
    """

    name: ClassVar[str] = "ci_l0"
    threshold: float = 0.0
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name in logs, with the threshold."""
        return f"ci_l0_{self.threshold:g}"

    def update(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> Sums:
        """Alive components of a batch."""
        return {name: ((g > self.threshold).sum().to(torch.float64), prepared.positions) for name, g in prepared.lower.items()}

    def compute(self, totals: Sums) -> dict[str, float]:
        """By module, by group, and in all (``total``)."""
        found = ratios(totals)
        groups = {g: {name for p in patterns for name in fnmatch.filter(totals, p)} for g, patterns in self.groups.items()}
        return found | {group: sum(found[name] for name in members) for group, members in groups.items()} | {"total": sum(found.values())}


@dataclass(frozen=True, kw_only=True)
class ComponentDensity:
    """In how many components of a module anything happens: the fraction of positions at which each is alive, summarised.

    Attributes:
        threshold: Above which a component counts as alive.
    """

    name: ClassVar[str] = "component_density"
    threshold: float = 0.0

    @property
    def label(self) -> str:
        """Name in logs."""
        return self.name

    def update(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> Sums:
        """Positions at which each component is alive."""
        return {name: (column_sums(g > self.threshold), prepared.positions) for name, g in prepared.lower.items()}

    def compute(self, totals: Sums) -> dict[str, float]:
        """``<module>/alive``: components that are ever alive; ``<module>/max``: the largest density."""
        numbers: dict[str, float] = {}
        for name, (total, count) in totals.items():
            numbers[f"{name}/alive"] = float((total > 0).sum())
            numbers[f"{name}/max"] = float(total.max()) / count if count else float("nan")
        return numbers


@dataclass(frozen=True, kw_only=True)
class CEAndKL:
    """Cross-entropy of the next token and KL to the target under six maskings of all modules.

    ``ci``, ``unmasked``, ``stoch`` (with the delta where the decomposition uses it), ``random`` (uniform masks), ``rounded`` (1 for
    importances above the threshold), ``zero``. ``ce_unrecovered`` is 0 where the target's cross-entropy is reached, and 1 where it is
    that of ``zero``.

    Attributes:
        rounding_threshold: Above which a rounded mask is 1.
    """

    name: ClassVar[str] = "ce_kl"
    rounding_threshold: float = 0.5

    @property
    def label(self) -> str:
        """Name in logs."""
        return self.name

    def masks(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> dict[str, dict[str, ComponentMask]]:
        """The six maskings."""
        rounded = {name: (g > self.rounding_threshold).to(g.dtype) for name, g in prepared.lower.items()}
        return {
            "ci_masked": importances_as_masks(prepared.lower),
            "unmasked": ones(parts.names),
            "stoch_masked": sampled_masks(parts, prepared, draws, 0),
            "random_masked": self.random_masks(parts, prepared, draws),
            "rounded_masked": importances_as_masks(rounded),
            "zero_masked": no_components(parts.names, next(iter(prepared.lower.values()))),
        }

    def random_masks(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> dict[str, ComponentMask]:
        """Uniform masks without delta."""
        sizes = list(parts.model.counts.values())
        drawn = draws.uniform((*prepared.leading[1:], sum(sizes)), "random masks")
        columns = drawn.to(next(iter(prepared.lower.values())).dtype).split(sizes, dim=-1)
        return {name: ComponentMask(column) for name, column in zip(parts.names, columns, strict=True)}

    def update(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> Sums:
        """Summed KL and cross-entropy of a batch of tokens.

        Raises:
            ValueError: If the batch is not tokens.
        """
        if prepared.batch.is_floating_point():
            raise ValueError("ce_kl needs tokens, but the batch is features; leave it out of model.metrics.")
        sums: Sums = {"ce_target": _float64(next_token_cross_entropy(prepared.target, prepared.batch))}
        for name, masks in self.masks(parts, prepared, draws).items():
            logits = parts.model(prepared.batch, masks).output
            sums[f"kl_{name}"] = _float64((recon_sum(logits, prepared.target, "kl"), recon_count(prepared.target, "kl")))
            sums[f"ce_{name}"] = _float64(next_token_cross_entropy(logits, prepared.batch))
        return sums

    def compute(self, totals: Sums) -> dict[str, float]:
        """KL, difference of cross-entropies, and cross-entropy unrecovered, by masking."""
        means = ratios(totals)
        found = {name: value for name, value in means.items() if name.startswith("kl_")}
        target, zero = means["ce_target"], means["ce_zero_masked"]
        for name, value in means.items():
            if name.startswith("ce_") and name not in ("ce_target", "ce_zero_masked"):
                masking = name.removeprefix("ce_")
                found[f"ce_difference_{masking}"] = value - target
                found[f"ce_unrecovered_{masking}"] = (value - target) / (zero - target) if zero != target else float("nan")
        return found


@dataclass(frozen=True, kw_only=True)
class SubsetCEAndKL:
    """Cross-entropy and KL where only named subsets of modules are replaced, under stochastic masks, and the worst subset of each.

    Attributes:
        subsets: By name: ``{include: [patterns], exclude: [patterns]}``; both optional.
        samples: Masks drawn per batch.
    """

    name: ClassVar[str] = "subset_ce_kl"
    subsets: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    samples: int = 1

    @property
    def label(self) -> str:
        """Name in logs."""
        return self.name

    def members(self, names: Sequence[str], subset: str) -> list[str]:
        """Modules of a subset.

        Raises:
            ValueError: If there are none.
        """
        rule = self.subsets[subset]
        included = [n for n in names if any(fnmatch.fnmatch(n, p) for p in rule.get("include", ["*"]))]
        found = [n for n in included if not any(fnmatch.fnmatch(n, p) for p in rule.get("exclude", []))]
        if not found:
            raise ValueError(f"The subset {subset!r} of subset_ce_kl holds no decomposed module; its rule is {dict(rule)}.")
        return found

    def update(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> Sums:
        """Summed KL and cross-entropy by subset."""
        zero = parts.model(prepared.batch, no_components(parts.names, next(iter(prepared.lower.values())))).output
        sums: Sums = {
            "ce_target": _float64(next_token_cross_entropy(prepared.target, prepared.batch)),
            "ce_zero": _float64(next_token_cross_entropy(zero, prepared.batch)),
        }
        for sample in range(self.samples):
            masks = sampled_masks(parts, prepared, draws, sample)
            for subset in self.subsets:
                logits = parts.model(prepared.batch, {name: masks[name] for name in self.members(parts.names, subset)}).output
                _add(sums, f"kl/{subset}", (recon_sum(logits, prepared.target, "kl"), recon_count(prepared.target, "kl")))
                _add(sums, f"ce/{subset}", next_token_cross_entropy(logits, prepared.batch))
        return sums

    def compute(self, totals: Sums) -> dict[str, float]:
        """By subset, and the largest of each kind under ``worst``."""
        means = ratios(totals)
        gap = means["ce_zero"] - means["ce_target"]
        found: dict[str, float] = {}
        for subset in self.subsets:
            found[f"kl/{subset}"] = means[f"kl/{subset}"]
            found[f"ce_difference/{subset}"] = means[f"ce/{subset}"] - means["ce_target"]
            found[f"ce_unrecovered/{subset}"] = found[f"ce_difference/{subset}"] / gap if gap else float("nan")
        for kind in ("kl", "ce_difference", "ce_unrecovered"):
            found[f"{kind}/worst"] = max(found[f"{kind}/{subset}"] for subset in self.subsets)
        return found


def _float64(pair: tuple[Tensor, int]) -> tuple[Tensor, float]:
    return pair[0].detach().to(torch.float64), pair[1]


def _add(sums: Sums, key: str, pair: tuple[Tensor, int]) -> None:
    total, count = _float64(pair)
    before = sums.get(key)
    sums[key] = (total, count) if before is None else (before[0] + total, before[1] + count)
