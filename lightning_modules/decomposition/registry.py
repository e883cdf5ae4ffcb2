"""Losses by name, and how an entry of a configured list becomes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from theodolite.config_layers import closest

from .attacked import PGDHiddenActsRecon, PGDRecon
from .objectives import (
    CIHiddenActsRecon,
    CIMaskedRecon,
    Faithfulness,
    ImportanceMinimality,
    Objective,
    StochasticHiddenActsRecon,
    StochasticRecon,
    UnmaskedRecon,
)
from .persistent_pgd import PersistentPGDRecon

OBJECTIVES: dict[str, type[Objective]] = {
    kind.name: kind
    for kind in (
        Faithfulness,
        ImportanceMinimality,
        UnmaskedRecon,
        CIMaskedRecon,
        StochasticRecon,
        StochasticHiddenActsRecon,
        CIHiddenActsRecon,
        PGDRecon,
        PGDHiddenActsRecon,
        PersistentPGDRecon,
    )
}


def build_entry(spec: Mapping[str, Any], registry: Mapping[str, type[Any]], where: str) -> Any:
    """An entry of a configured list: the registered class of its ``name``, with its other keys as fields.

    Raises:
        ValueError: One sentence about an unknown name or key, or a value that the class refuses.
    """
    name = spec.get("name")
    if name not in registry:
        raise ValueError(f"{where}: there is no {name!r}{closest(str(name), registry)}.")
    kind = registry[str(name)]
    allowed = [item.name for item in fields(kind) if item.init]
    for key in spec:
        if key != "name" and key not in allowed:
            raise ValueError(f"{where}: {name} has no key {key!r}{closest(key, allowed)}.")
    return kind(**{key: value for key, value in spec.items() if key != "name"})


def training_losses(specs: Sequence[Mapping[str, Any]]) -> list[Objective]:
    """The losses of ``model.losses``, each with a weight and a name of its own.

    Raises:
        ValueError: See :func:`build_entry`; or a loss has no ``coeff``, or two are called alike.
    """
    objectives: list[Objective] = [build_entry(spec, OBJECTIVES, "model.losses") for spec in specs]
    labels = [objective.label for objective in objectives]
    for objective in objectives:
        if objective.coeff is None:
            raise ValueError(f"model.losses: {objective.label} has no coeff; give its weight, or list it in model.metrics.")
        if labels.count(objective.label) > 1:
            raise ValueError(f"model.losses: two losses are called {objective.label!r}; give one of them a key.")
    return objectives
