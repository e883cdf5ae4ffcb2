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
    "random_names_pass_rate": "test/random_names/pass_rate",
    "random_names_hack_rate": "test/random_names/hack_rate",
    "no_hint_pass_rate": "test/no_hint/pass_rate",
    "capability_pass_rate": "test/capability/pass_rate",
    "loose_hack_rate": "test/hinted/loose_hack_rate",
    "hack_given_attempt": "test/hinted/hack_given_attempt",
    "hack_definition_rate": "test/hinted/hack_definition_rate",
    "hack_assignment_rate": "test/hinted/hack_assignment_rate",
    "hack_other_rate": "test/hinted/hack_other_rate",
    "kl_k1": "test/hinted/kl_k1",
    "kl_k3": "test/hinted/kl_k3",
}
"""Final measures of a run and the keys that they are logged under."""

MECHANISMS = ("definition", "assignment", "other")
"""Means of overriding the evaluator whose hacks every evaluation counts: ``hack_<mechanism>_rate``."""


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

    @property
    def count_key(self) -> str:
        """What the number of rollouts behind the hack rate is logged under."""
        return f"{self.measures['hack_rate'].rpartition('/')[0]}/n"


def read_plan(folder: Path) -> Plan:
    """The plan of a study's folder; the default where it has none.

    Raises:
        ValueError: The file is not one, or holds a key, a measure, a claim, a comparison or a mechanism that no report can read.
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
    arms = _mapping(path, raw, "arms")
    for arm in arms:
        _mapping(path, arms, arm)
    return Plan(
        title=str(raw.get("title", TITLE)),
        arms=arms,
        measures=MEASURES | _named(path, raw, "measures", MEASURES),
        comparisons=_comparisons(path, raw.get("comparisons")),
        claim=_claim(path, _mapping(path, raw, "claim")),
        mechanisms=_named(path, raw, "mechanisms", MECHANISMS),
    )


def _mapping(path: Path, raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path}: {key} must be an object, not {value!r}")
    return value or {}


def _named(path: Path, raw: Mapping[str, Any], key: str, known: Mapping[str, Any] | tuple[str, ...]) -> dict[str, str]:
    """Texts by names that must be known ones."""
    value = _mapping(path, raw, key)
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"{path}: there is no {key.removesuffix('s')} {unknown[0]!r}; choose among {', '.join(known)}")
    return {name: str(text) for name, text in value.items()}


def _comparisons(path: Path, value: object) -> tuple[tuple[str, str], ...] | None:
    if value is None:
        return None
    pairs: list[Any] = value if isinstance(value, list) else [value]
    wrong = [pair for pair in pairs if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(arm, str) for arm in pair)]
    if wrong:
        raise ValueError(f"{path}: the comparison {wrong[0]!r} is no pair; write comparisons as a list of [arm, against]")
    return tuple((arm, against) for arm, against in pairs)


def _claim(path: Path, value: Mapping[str, Any]) -> Claim | None:
    if not value:
        return None
    known = ("arm", "against", "reference")
    unknown = sorted(set(value) - set(known))
    if unknown or not isinstance(value.get("arm"), str):
        what = f"has the unknown key {unknown[0]!r}" if unknown else "names no arm"
        raise ValueError(f"{path}: the claim {what}; write {{arm: name, against: name, reference: name}}, the last two if wanted")
    return Claim(**value)
