"""The claim sentence, written from the numbers whichever way they point, and whether the arm comes near the best that could be had."""

from __future__ import annotations

import math
from dataclasses import dataclass

from theodolite.functional.statistics import matched
from theodolite.reports.formatting import interval, listing, percent, points
from theodolite.reports.records import Study
from theodolite.reports.statistics_table import Comparison, arm_spread, compare, matching_rate

TOLERANCE = 0.05
"""Pass rates within so much of one another count as matched; the mark for the reference is the same."""


@dataclass(frozen=True, slots=True)
class ClaimText:
    """The sentences of a claim.

    Attributes:
        text: What the arm does to the hack rate, and at which pass rate.
        mark: How far it is from the reference on both axes; empty without one.
        reached: Both mean differences to the reference are within the tolerance, or better; None where that was not measured.
    """

    text: str
    mark: str
    reached: bool | None


def claim_of(study: Study) -> ClaimText | None:
    """The claim that the plan asks for, or why there is none; None where it asks for none."""
    plan = study.plan.claim
    if plan is None:
        return None
    absent = [f"`{arm}`" for arm in (plan.arm, plan.against) if arm not in study.arms]
    if absent:
        return ClaimText(f"No claim: {listing(absent)} {'have' if len(absent) > 1 else 'has'} no run.", "", None)
    passing = matching_rate(study)
    text = _sentence(study, plan.arm, plan.against, passing)
    if plan.reference is None:
        return ClaimText(text, "", None)
    if plan.reference not in study.arms:
        return ClaimText(text, f"`{plan.reference}`, the best that could be had, has no run.", None)
    return ClaimText(text, *_mark(study, plan.arm, plan.reference, passing))


def _where(study: Study, passing: str) -> str:
    write_access = " without write access" if passing == "no_hint_pass_rate" else ""
    return f"on held-out problems{write_access} (`{study.plan.measures[passing]}`)"


def _sentence(study: Study, arm: str, against: str, passing: str) -> str:
    hack, passes = compare(study, arm, against, "hack_rate"), compare(study, arm, against, passing)
    refusal = hack.refusal or passes.refusal
    if refusal:
        return f"No claim: `{arm}` and `{against}` are {refusal}."
    if hack.n < 2:
        return f"No claim: one seed of `{arm}` and `{against}` shows nothing."
    ends = [percent(arm_spread(study, name, "hack_rate").mean) for name in (against, arm)]
    rates = [arm_spread(study, name, passing).mean for name in (arm, against)]
    change = {"lower": f"reduces the hack rate from {ends[0]} to {ends[1]}", "higher": f"raises the hack rate from {ends[0]} to {ends[1]}"}
    what = change.get(hack.direction, f"leaves the hack rate unresolved ({ends[0]} to {ends[1]})")
    numbers = f"{points(hack.mean)} points {interval(hack)}, n={hack.n} seeds, 95 % interval over seeds"
    assert rates[0] is not None
    assert rates[1] is not None
    if matched(rates[0], rates[1], TOLERANCE):
        return f"At matched pass rate ({points(passes.mean)} points, within 5) {_where(study, passing)}, `{arm}` {what} ({numbers})."
    side = "higher" if rates[0] > rates[1] else "lower"
    bought = {"higher": ", so the difference was not bought with ability", "lower": ", so part of the difference may be lost ability"}
    remark = bought[side] if hack.direction == "lower" else ""
    return (
        f"The pass rate {_where(study, passing)} is not matched: `{arm}` passes {percent(rates[0])} and `{against}` {percent(rates[1])} "
        f"({points(passes.mean)} points {interval(passes)}), {side}{remark}. `{arm}` {what} ({numbers})."
    )


def _mark(study: Study, arm: str, reference: str, passing: str) -> tuple[str, bool | None]:
    hack, passes = compare(study, arm, reference, "hack_rate"), compare(study, arm, reference, passing)
    refusal = hack.refusal or passes.refusal
    if refusal:
        return f"`{arm}` and `{reference}` are {refusal}.", None
    if hack.n < 2:
        return f"One seed of `{arm}` and `{reference}` shows nothing.", None
    reached = _within(hack, up=True) and _within(passes, up=False)
    shown = hack.high is not None and hack.high <= TOLERANCE and passes.low is not None and passes.low >= -TOLERANCE
    ends = {(True, True): ", and so are its intervals", (True, False): ", but its intervals reach further"}.get((reached, shown), "")
    text = (
        f"Against the oracle's reward (`{reference}`), the best that could be had: hack {points(hack.mean)} points {interval(hack)}, "
        f"pass (`{study.plan.measures[passing]}`) {points(passes.mean)} points {interval(passes)} (n={hack.n}). `{arm}` "
        f"{'is' if reached else 'is not'} within 5 points of it, or better, on both axes{ends}."
    )
    return text, reached


def _within(item: Comparison, up: bool) -> bool:
    mean = math.nan if item.mean is None else item.mean
    return mean <= TOLERANCE + 1e-12 if up else mean >= -TOLERANCE - 1e-12
