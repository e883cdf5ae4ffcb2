"""Measures of toy models, whose ground truth is known."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from theodolite.config_layers import closest
from theodolite.functional.identity_error import dense_error, identity_error, recovery

from .decomposition import Decomposition
from .targets.build import Target
from .targets.toy_models import ResidMLP

ONE_HOT = 0.75
"""Value of the single active feature in a probe."""


def one_hot_importances(parts: Decomposition, features: int) -> dict[str, Tensor]:
    """Lower importances (features, C) of inputs with one active feature each, by module."""
    return parts.prepare(one_hot_probe(parts, features)).lower


def one_hot_probe(parts: Decomposition, features: int) -> Tensor:
    """(features, features) inputs with one active feature each."""
    return ONE_HOT * torch.eye(features, device=parts.device, dtype=parts.model.component_parameters()[0].dtype)


@dataclass(frozen=True, kw_only=True)
class IdentityCIError:
    """Entries by which the importances of one-hot inputs miss what they should be.

    Attributes:
        identity: Number of features by pattern of modules: one component for each feature.
        dense: k by pattern of modules: k components, used by any features.
        tolerance: Distance from 0 and 1 that is forgiven; the error at 0.2 is reported beside it.
    """

    name: ClassVar[str] = "identity_ci_error"
    identity: Mapping[str, int] = field(default_factory=dict)
    dense: Mapping[str, int] = field(default_factory=dict)
    tolerance: float = 0.1

    @property
    def label(self) -> str:
        """Name in logs."""
        return self.name

    def measure(self, parts: Decomposition, target: Target | None) -> dict[str, float]:
        """``total``, ``total_0p2`` and the error of each module.

        Raises:
            ValueError: If the target is no toy model of features, or a pattern matches no module.
        """
        if target is None or target.features is None:
            raise ValueError("identity_ci_error needs a target of known features (tms, resid_mlp); leave it out of model.metrics.")
        return self.of(one_hot_importances(parts, target.features))

    def of(self, importances: Mapping[str, Tensor]) -> dict[str, float]:
        """The same from matrices (features, C), or (features, 1, C) from models with a position axis."""
        flat = {name: g.reshape(-1, g.shape[-1]) for name, g in importances.items()}
        wider = self.errors(flat, 0.2)
        errors = self.errors(flat, self.tolerance)
        return {"total": float(sum(errors.values())), "total_0p2": float(sum(wider.values()))} | errors

    def errors(self, importances: Mapping[str, Tensor], tolerance: float) -> dict[str, float]:
        """Error by module."""
        found: dict[str, float] = {}
        for pattern, features in self.identity.items():
            for name in _matching(pattern, list(importances)):
                found[name] = float(identity_error(importances[name][:features], tolerance))
        for pattern, k in self.dense.items():
            for name in _matching(pattern, list(importances)):
                found[name] = float(dense_error(importances[name], k, tolerance))
        return found


@dataclass(frozen=True, kw_only=True)
class ComponentRecovery:
    """Mean max cosine similarity (MMCS) of components with the directions that a toy's weights have for its features, and mean norm ratio.

    Attributes:
        modules: ``rows``, ``columns``, ``features`` or ``neurons`` by module: the direction of a feature is its input's row of the weight,
            its output's column, or, in a module that reads a residual stream, what its embedding writes through the weight; that of a
            neuron is what it writes to the features, through a residual stream of which they see only their own directions.
    """

    name: ClassVar[str] = "recovery"
    modules: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name in logs."""
        return self.name

    def measure(self, parts: Decomposition, target: Target | None) -> dict[str, float]:
        """``<module>/mmcs``, ``<module>/min_cosine`` and ``<module>/norm_ratio`` (1 at full recovery)."""
        numbers: dict[str, float] = {}
        for name, kind in self.modules.items():
            for module in _matching(name, parts.names):
                cosine, ratio = self._module(parts, module, kind, target)
                numbers |= {f"{module}/mmcs": float(cosine.mean()), f"{module}/min_cosine": float(cosine.min())}
                numbers[f"{module}/norm_ratio"] = float(ratio.mean())
        return numbers

    def _module(self, parts: Decomposition, name: str, kind: str, target: Target | None) -> tuple[Tensor, Tensor]:
        components = parts.model.sites[name].components
        weight = parts.model.deltas()[name] + components.product()
        if kind in ("rows", "columns"):
            return recovery(weight, components.V, components.U, kind)
        if kind not in ("features", "neurons") or target is None or not isinstance(target.module, ResidMLP):
            raise ValueError(f"recovery: {name} has kind {kind!r}; choose rows, columns, or (for a resid_mlp) features or neurons.")
        embedding: Any = target.module.W_E
        if kind == "neurons":
            return recovery(weight @ embedding.T, components.V, components.U @ embedding.T)
        return recovery(embedding @ weight, embedding @ components.V, components.U)


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    found = fnmatch.filter(names, pattern)
    if not found:
        raise ValueError(f"The pattern {pattern!r} matches no decomposed module{closest(pattern, names)}.")
    return found
