"""What a study says of itself beside its runs: ``study.json`` in its folder, written by ``theodolite-sweep`` from the study file.

::

    title: text
    arms: {name: {title: text, note: text, control: bool}}     # in the order in which they are reported
    measures: {pass_rate: test/no_hint/pass_rate}              # other keys for some of the measures
    comparisons: [[arm, against], ...]                         # what the verdict asks; default: see verdict.py
    claim: {arm: name, against: vanilla, reference: oracle}    # what the claim sentence is about
    mechanisms: {definition: seen by the detector, assignment: unseen by the detector}

Every key may be missing, and so may the file: runs alone make a report too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "study.json"
TITLE = "Reward hacking under gradient projection"

RATES = ("hack_rate", "override_rate", "pass_rate")
"""The rates that every evaluation reports, as fractions of its rollouts."""

MEASURES: dict[str, str] = {rate: f"test/hinted/{rate}" for rate in RATES} | {
    "unseen_pass_rate": "test/unseen/pass_rate",
    "unseen_hack_rate": "test/unseen/hack_rate",
    "no_hint_pass_rate": "test/no_hint/pass_rate",
    "capability_pass_rate": "test/capability/pass_rate",
    "loose_hack_rate": "test/hinted/loose_hack_rate",
    "hack_given_attempt": "test/hinted/hack_given_attempt",
    "hack_definition_rate": "test/hinted/hack_definition_rate",
    "hack_assignment_rate": "test/hinted/hack_assignment_rate",
    "kl_k1": "test/hinted/kl_k1",
    "kl_k3": "test/hinted/kl_k3",
}
"""Final measures of a run and the keys that they are logged under."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What the claim sentence is about: an arm, what it is set against, and the arm that shows what could be had at best."""

    arm: str
    against: str = "vanilla"
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """See the module's docstring."""

    title: str = TITLE
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    measures: Mapping[str, str] = field(default_factory=lambda: dict(MEASURES))
    comparisons: tuple[tuple[str, str], ...] | None = None
    claim: Claim | None = None
    mechanisms: Mapping[str, str] = field(default_factory=dict)


def read_plan(folder: Path) -> Plan:
    """The plan of a study's folder; the default where it has none.

    Raises:
        ValueError: The file is not one.
    """
    path = folder / FILE
    if not path.is_file():
        return Plan()
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error.msg} at line {error.lineno}): it must hold one object") from error
    known = {"title", "arms", "measures", "comparisons", "claim", "mechanisms"}
    if not isinstance(raw, dict) or not set(raw) <= known:
        extra = sorted(set(raw) - known) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{path} has {extra}; a study's plan is an object with some of the keys {', '.join(sorted(known))}")
    unknown = sorted(set(raw.get("measures") or {}) - set(MEASURES))
    if unknown:
        raise ValueError(f"{path}: there is no measure {unknown[0]!r}; choose among {', '.join(MEASURES)}")
    comparisons = raw.get("comparisons")
    return Plan(
        title=str(raw.get("title", TITLE)),
        arms=raw.get("arms") or {},
        measures=MEASURES | (raw.get("measures") or {}),
        comparisons=None if comparisons is None else tuple((str(arm), str(against)) for arm, against in comparisons),
        claim=Claim(**raw["claim"]) if raw.get("claim") else None,
        mechanisms=raw.get("mechanisms") or {},
    )
