r"""Hypotheses written down before the runs, and what became of every one of them.

A study directory may hold ``hypotheses.yaml``::

    hypotheses:
      - name: H1
        claim: Removing the live direction lowers the hack rate without costing passes.
        arm: projected_live
        against: vanilla        # or a number: the arm's own rate is set against it
        measure: hack_rate
        change: lower           # lower | higher: by at least `by`; not_higher | not_lower: by at most `by`
        by: 0.15                # a difference of rates
        pass_rate: at_least     # any | matched | at_least: what the arm's pass rate must do for the claim to count
        tolerance: 0.05

Outcomes rest on one number per seed. With :math:`d_s` the differences, the claim "lower by b" is *confirmed* when a one-sided t-test
rejects :math:`\bar d \ge -b`, *falsified* when one rejects :math:`\bar d \le -b`, and *undecided* otherwise. "Not higher by b" is the
same with :math:`+b`: within b of the other, or better. Arms with unequal seeds are not compared.

The confirming tests of a file and the falsifying ones are two families, each at 5 % after Holm's correction, so an error of either kind may
come about in up to 10 %. Differences that are all equal have no t: their mean alone decides, with p = 0 or 1, also with two seeds. A pass
condition (on the measure ``pass_rate``) that is not met turns a confirmation into *undecided*; it never falsifies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from theodolite.functional.statistics import PairedTest, holm, seed_level_t_test, t_interval
from theodolite.reports.plan import MEASURES
from theodolite.reports.records import Study
from theodolite.reports.statistics_table import measured

Outcome = Literal["confirmed", "falsified", "undecided"]
FILE = "hypotheses.yaml"
LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One entry of the file; see the module's docstring."""

    name: str
    claim: str
    arm: str
    against: str | float
    measure: str
    change: Literal["lower", "higher", "not_higher", "not_lower"]
    by: float = 0.0
    pass_rate: Literal["any", "matched", "at_least"] = "any"
    tolerance: float = 0.05

    @property
    def wants_lower(self) -> bool:
        """The claim is that differences lie below :attr:`bound`, not above it."""
        return self.change in ("lower", "not_higher")

    @property
    def bound(self) -> float:
        """The difference that the claim says is not reached (``wants_lower``) or exceeded."""
        return -self.by if self.change in ("lower", "not_lower") else self.by

    @property
    def asked(self) -> str:
        """The claim's numbers, in words."""
        against = f"`{self.against}`" if isinstance(self.against, str) else f"{100 * self.against:g} %"
        size = f"{100 * self.by:g} points"
        how = {"not_higher": f"at most {size} higher", "not_lower": f"at most {size} lower"}
        change = how.get(self.change, f"{self.change} by {size} or more" if self.by else self.change)
        passes = f", pass rate {self.pass_asked}" if self.pass_asked else ""
        return f"`{self.arm}` against {against}: {self.measure.replace('_', ' ')} {change}{passes}"

    @property
    def pass_asked(self) -> str:
        """What the arm's pass rate must do, in words; empty where it is not asked for."""
        if self.pass_rate == "any" or not isinstance(self.against, str):
            return ""
        size = f"{100 * self.tolerance:g} points"
        return f"within {size}" if self.pass_rate == "matched" else f"at most {size} lower"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What became of a hypothesis.

    Attributes:
        hypothesis: The entry.
        outcome: ``confirmed``, ``falsified`` or ``undecided``.
        reason: Why, with the numbers.
        n: Seeds compared; 0 where nothing could be.
        mean: Mean difference (arm minus what it is set against); ``None`` where nothing could be compared.
        low: Lower end of its 95 % t interval over seeds.
        high: Upper end.
        p_for: Holm-adjusted p-value of the test that would confirm it; NaN where there is none.
        p_against: Holm-adjusted p-value of the test that would falsify it.
    """

    hypothesis: Hypothesis
    outcome: Outcome
    reason: str
    n: int
    mean: float | None
    low: float | None
    high: float | None
    p_for: float
    p_against: float


def read_hypotheses(path: Path) -> list[Hypothesis]:
    """Read the file.

    Raises:
        ValueError: An entry lacks a key, has one that is not known, or a value that cannot be.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("hypotheses"), list):
        raise ValueError(f"{path} must hold a list under 'hypotheses:'.")
    entries = [_entry(path, index, raw) for index, raw in enumerate(content["hypotheses"], start=1)]
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two hypotheses have the same name; give each its own.")
    return entries


def _entry(path: Path, index: int, raw: object) -> Hypothesis:
    known = {field.name for field in fields(Hypothesis)}
    if not isinstance(raw, dict) or not set(raw) <= known:
        extra = sorted(set(raw) - known) if isinstance(raw, dict) else raw
        raise ValueError(f"{path}: hypothesis {index} has {extra}, which is not among {sorted(known)}.")
    missing = {"name", "claim", "arm", "against", "measure", "change"} - set(raw)
    if missing:
        raise ValueError(f"{path}: hypothesis {index} lacks {sorted(missing)}.")
    entry = Hypothesis(**cast(Mapping[str, Any], raw))
    choices = {
        "measure": tuple(MEASURES),
        "change": ("lower", "higher", "not_higher", "not_lower"),
        "pass_rate": ("any", "matched", "at_least"),
    }
    for key, allowed in choices.items():
        if getattr(entry, key) not in allowed:
            raise ValueError(f"{path}: {entry.name}: {key} is {getattr(entry, key)!r}; choose one of {', '.join(allowed)}.")
    if entry.by < 0 or entry.tolerance < 0:
        raise ValueError(f"{path}: {entry.name}: by and tolerance are sizes and must not be negative.")
    return entry


def judge(study: Study, hypotheses: list[Hypothesis]) -> list[Judgement]:
    """The outcome of every hypothesis, in order; none is left out."""
    samples = [_values(study, entry) for entry in hypotheses]
    p_for = holm({entry.name: _p_value(entry, sample, "for") for entry, sample in zip(hypotheses, samples, strict=True)})
    p_against = holm({entry.name: _p_value(entry, sample, "against") for entry, sample in zip(hypotheses, samples, strict=True)})
    return [
        _judgement(study, entry, sample, p_for[entry.name], p_against[entry.name])
        for entry, sample in zip(hypotheses, samples, strict=True)
    ]


def study_judgements(study: Study) -> list[Judgement]:
    """Outcomes for the study's own file; empty where it has none."""
    path = study.directory / FILE
    return judge(study, read_hypotheses(path)) if path.is_file() else []


def judgement_record(item: Judgement) -> dict[str, Any]:
    """A judgement as plain JSON."""
    numbers = {key: None if math.isnan(value) else value for key, value in (("p_for", item.p_for), ("p_against", item.p_against))}
    found = {"n": item.n, "mean": item.mean, "low": item.low, "high": item.high}
    return {**asdict(item.hypothesis), "outcome": item.outcome, "reason": item.reason, **found, **numbers}


@dataclass(frozen=True, slots=True)
class _Sample:
    """The arm's values and what they are set against, by seed; or why they are not compared."""

    arm: tuple[float, ...]
    against: tuple[float, ...]
    refusal: str = ""


def _values(study: Study, entry: Hypothesis) -> _Sample:
    own = measured(study, entry.arm, entry.measure)
    if not own:
        return _Sample((), (), f"`{entry.arm}` was not measured")
    if isinstance(entry.against, int | float):
        other = dict.fromkeys(own, float(entry.against))
    else:
        other = measured(study, entry.against, entry.measure)
        if not other:
            return _Sample((), (), f"`{entry.against}` was not measured")
    if own.keys() != other.keys():
        seeds = f"seeds {sorted(own)} against {sorted(other)}"
        return _Sample((), (), f"`{entry.arm}` and `{entry.against}` have unequal seeds ({seeds}) and are not compared")
    if len(own) < 2:
        return _Sample((), (), "one seed shows nothing")
    return _Sample(tuple(own[seed] for seed in sorted(own)), tuple(other[seed] for seed in sorted(own)))


def _p_value(entry: Hypothesis, sample: _Sample, side: Literal["for", "against"]) -> float:
    """One-sided p-value that the change exceeds ``by`` (``for``) or falls short of it (``against``)."""
    if sample.refusal:
        return math.nan
    shifted = [value - entry.bound for value in sample.arm]
    lower = entry.wants_lower == (side == "for")
    test: PairedTest = seed_level_t_test(shifted, sample.against, alternative="less" if lower else "greater")
    if math.isnan(test.p_value):  # no spread at all: the mean itself decides
        return 0.0 if (test.mean < 0) == lower else 1.0
    return test.p_value


def _judgement(study: Study, entry: Hypothesis, sample: _Sample, p_for: float, p_against: float) -> Judgement:
    if sample.refusal:
        return Judgement(entry, "undecided", sample.refusal, 0, None, None, None, math.nan, math.nan)
    differences = [value - other for value, other in zip(sample.arm, sample.against, strict=True)]
    mean = math.fsum(differences) / len(differences)
    low, high = t_interval(differences)
    outcome: Outcome = "undecided"
    if p_for < LEVEL:
        outcome, reason = "confirmed", f"the test of this change has p = {p_for:.2g}"
    elif p_against < LEVEL:
        outcome, reason = "falsified", f"the test of the opposite has p = {p_against:.2g}"
    else:
        reason = f"neither test decides (p = {p_for:.2g} for it, {p_against:.2g} against it)"
    if len(set(differences)) == 1:
        reason += ", the difference being the same on every seed"
    met, condition = _pass_condition(study, entry)
    if outcome == "confirmed" and not met:
        outcome = "undecided"
    reason = f"{reason}; {condition}" if condition else reason
    return Judgement(entry, outcome, reason, len(differences), mean, low, high, p_for, p_against)


def _pass_condition(study: Study, entry: Hypothesis) -> tuple[bool, str]:
    """Whether the arm's pass rate does what the claim needs, and the sentence that says so; empty where nothing is asked of it."""
    if not entry.pass_asked:
        return True, ""
    key = f"`{study.plan.measures['pass_rate']}`"
    own, other = (list(measured(study, str(arm), "pass_rate").values()) for arm in (entry.arm, entry.against))
    if not own or not other:
        return False, f"pass condition not met: {key} was not measured"
    gap = math.fsum(own) / len(own) - math.fsum(other) / len(other)
    rounding = 1e-12
    met = gap >= -entry.tolerance - rounding and (entry.pass_rate != "matched" or gap <= entry.tolerance + rounding)
    return met, f"pass condition {'met' if met else 'not met'}: {key} differs by {100 * gap:+.1f} points, asked is {entry.pass_asked}"
