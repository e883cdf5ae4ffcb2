"""The verdict in sentences, computed from the data alone, in whichever direction the data point.

Every claim rests on a paired 95 % t interval: a difference whose interval contains zero is called unresolved, whatever the prototype, the
paper or the reader expected. Arm names stand in backticks; a page turns them into code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from theodolite.functional.statistics import spread, t_interval
from theodolite.reports.arms import arm_styles
from theodolite.reports.formatting import NOT_MEASURED, interval, listing, percent, points, sign_count
from theodolite.reports.records import Study
from theodolite.reports.statistics_table import Comparison, arm_spread, base_by_seed, compare, measure

Status = Literal["better", "worse", "unresolved", "as expected", "unexpected", "not measured"]

QUESTIONS: tuple[tuple[str, str], ...] = (
    ("random", "vanilla"),
    ("projected_static", "random"),
    ("projected_static", "vanilla"),
    ("projected_live", "shuffled"),
    ("projected_live", "vanilla"),
    ("shuffled", "vanilla"),
    ("push", "projected_live"),
    ("projected_live", "rebound"),
    ("rebound", "vanilla"),
)
"""Which arm is set against which, where both are present; arms that are not named here are set against vanilla and random."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence or two of the verdict.

    Attributes:
        question: What was asked, in a few words.
        status: How it came out.
        text: The answer with its numbers.
    """

    question: str
    status: Status
    text: str


def questions(study: Study) -> list[tuple[str, str]]:
    """The pairs (arm, against) that this study can ask about: those of its plan, where it names some."""
    present = set(study.arms)
    if study.plan.comparisons is not None:
        return [(arm, against) for arm, against in study.plan.comparisons if arm in present and against in present]
    asked = [(arm, against) for arm, against in QUESTIONS if arm in present and against in present]
    named = {arm for pair in QUESTIONS for arm in pair}
    for arm in study.arms:
        if arm not in named:
            asked += [(arm, against) for against in ("vanilla", "random") if against in present]
    return asked


def dropped(study: Study) -> list[tuple[str, str]]:
    """Comparisons that the plan asks for and that cannot be made, because an arm has no run."""
    return [pair for pair in study.plan.comparisons or () if not set(pair) <= set(study.arms)]


def findings(study: Study) -> list[Finding]:
    """All sentences of the verdict, in the order in which they should be read."""
    result = [_phenomenon(study)] if "vanilla" in study.arms else []
    special: dict[tuple[str, str], Callable[[Study], Finding]] = {
        ("random", "vanilla"): lambda s: _null_control(s, "random", "A random direction of the same shape", "the direction"),
        ("shuffled", "vanilla"): lambda s: _null_control(
            s, "shuffled", "The same procedure with shuffled hack and clean labels", "what the labels say"
        ),
        ("push", "projected_live"): _push,
    }
    for arm, against in questions(study):
        build = special.get((arm, against))
        result.append(build(study) if build else against_other(study, arm, against))
    return result + _overriding(study)


def against_other(study: Study, arm: str, against: str) -> Finding:
    """Whether ``arm`` hacks less than ``against``, and what happens to honest solutions."""
    hack, passing = compare(study, arm, against, "hack_rate"), compare(study, arm, against, "pass_rate")
    role = _role(study, arm, against)
    question = f"`{arm}` against {role}"
    missing = _no_pairs(hack, question)
    if missing:
        return missing
    numbers = _numbers(hack)
    if hack.direction == "single":
        status, claim = (
            "unresolved",
            f"`{arm}` and `{against}` share one seed ({points(hack.mean)} points of hack rate): one seed shows nothing.",
        )
    elif hack.direction == "lower":
        status, claim = "better", f"`{arm}` hacks less than {role}: {numbers}."
    elif hack.direction == "higher":
        status, claim = "worse", f"`{arm}` hacks more than {role}: {numbers}."
    elif hack.mean is not None and hack.mean < 0:
        status = "unresolved"
        claim = f"`{arm}` hacks less than {role} on average, but {hack.n} seeds do not settle it: {numbers}."
    else:
        status, claim = "unresolved", f"`{arm}` does not beat {role} on hacking: {numbers}."
    return Finding(question, status, f"{claim} {_honest(passing, hack)}".strip())


def _role(study: Study, arm: str, against: str) -> str:
    if against == "vanilla":
        return "no intervention (`vanilla`)"
    if against == "rebound":
        return "the baseline `rebound`"
    if against == "oracle":
        return "the oracle's reward (`oracle`)"
    if not arm_styles([against], {against: study.title(against)}, study.controls)[against].control:
        return f"the arm `{against}`"
    return f"{'its' if (arm, against) in questions(study) else 'the'} control `{against}`"


def _numbers(item: Comparison) -> str:
    return f"{points(item.mean)} points {interval(item)}, {sign_count(item)}"


def _no_pairs(item: Comparison, question: str) -> Finding | None:
    if item.n:
        return None
    return Finding(question, "not measured", f"`{item.arm}` and `{item.against}` are {item.refusal}.")


def _honest(item: Comparison, hack: Comparison) -> str:
    """What the arm does to the rate of correct programs; a reading of it only where the arm hacks less."""
    if item.mean is None:
        return f"Pass rate: {NOT_MEASURED}."
    if item.direction == "single":
        return f"Pass rate {points(item.mean)} points."
    less = hack.direction == "lower"
    ends = {
        "higher": "it also solves more problems" if less else "it solves more problems",
        "lower": "but it solves fewer problems: part of what it suppresses may be ability" if less else "it solves fewer problems",
        "unresolved": "a difference in solved problems is not resolved",
    }
    return f"Pass rate {_numbers(item)}: {ends[item.direction]}."


def _phenomenon(study: Study) -> Finding:
    """Whether training without an intervention learns to hack at all."""
    question = "Does the policy learn to hack when nothing is done about it?"
    base = base_by_seed(study, "hack_rate")
    changes = [
        final - base[run.seed]
        for run in study.of("vanilla")
        if (final := measure(study, run, "hack_rate")) is not None and run.seed in base
    ]
    if not changes:
        return Finding(question, "not measured", f"`vanilla` has no finished seed with a base rate: {NOT_MEASURED}.")
    low, high = t_interval(changes)
    before, after = spread(list(base.values())).mean, arm_spread(study, "vanilla", "hack_rate")
    passing = spread(list(base_by_seed(study, "pass_rate").values())).mean, arm_spread(study, "vanilla", "pass_rate").mean
    rose = sum(change > 0 for change in changes)
    facts = (
        f"Before training the hack rate is {percent(before)} and the pass rate {percent(passing[0])}, on the problems of validation; after "
        f"training under `vanilla` they are {percent(after.mean)} and {percent(passing[1])}, on those of the final evaluation. The hack "
        f"rate is higher after training on {rose}/{len(changes)} seeds."
    )
    if low is None or high is None:
        return Finding(question, "unresolved", f"{facts} One seed shows nothing.")
    if low > 0:
        return Finding(question, "as expected", f"Yes. {facts}")
    if high < 0:
        return Finding(
            question, "unexpected", f"No, it hacks less than before. {facts} There is nothing here for an intervention to prevent."
        )
    return Finding(question, "unexpected", f"Not clearly. {facts} Where nothing reliably rises, no intervention can be judged.")


def _null_control(study: Study, arm: str, subject: str, reason: str) -> Finding:
    """A control that should change nothing: says so when it does."""
    question = f"Is `{arm}` the null that it should be?"
    item = compare(study, arm, "vanilla", "hack_rate")
    missing = _no_pairs(item, question)
    if missing:
        return missing
    if item.direction == "single":
        return Finding(
            question, "unresolved", f"`{arm}` and `vanilla` share one seed ({points(item.mean)} points): one seed shows nothing."
        )
    if item.direction == "unresolved":
        text = f"{subject} behaves like `vanilla` as far as {item.n} seeds can tell: hack rate {_numbers(item)}."
        return Finding(question, "as expected", text)
    text = (
        f"It is not. {subject} alone differs from `vanilla` in hack rate by {_numbers(item)}, "
        f"so an effect of this size elsewhere need not come from {reason}."
    )
    return Finding(question, "unexpected", text)


def _push(study: Study) -> Finding:
    """Whether a constant push explains what the live projection gains."""
    question = "Is the gain of `projected_live` due to removing something?"
    item = compare(study, "push", "projected_live", "hack_rate")
    missing = _no_pairs(item, question)
    if missing:
        return missing
    numbers = f"`push` minus `projected_live`: {_numbers(item)}"
    gained = "vanilla" in study.arms and compare(study, "projected_live", "vanilla", "hack_rate").direction == "lower"
    if item.direction == "single":
        return Finding(question, "unresolved", f"{numbers}; one seed shows nothing.")
    if not gained:
        return Finding(question, "unresolved", f"`projected_live` has no resolved gain over `vanilla` to explain ({numbers}).")
    if item.direction == "higher":
        text = f"A constant push along the same direction hacks more ({numbers}): a push of this strength does not explain the gain."
        return Finding(question, "better", text)
    if item.direction == "lower":
        word = "does better"
    elif item.mean is not None and item.mean <= 0:
        word = "does as well or better on average"
    else:
        word = "cannot be told apart from it"
    text = f"A constant push along the same direction {word} ({numbers}), so the gain is not evidence for removal as such."
    return Finding(question, "worse" if item.direction == "lower" else "unresolved", text)


def _overriding(study: Study, margin: float = 0.05) -> list[Finding]:
    """Arms that hack less than vanilla and yet overwrite the evaluator far more often than they are caught hacking."""
    rows = []
    for arm in study.arms:
        hack, override = arm_spread(study, arm, "hack_rate").mean, arm_spread(study, arm, "override_rate").mean
        curbed = "vanilla" not in study.arms or compare(study, arm, "vanilla", "hack_rate").direction == "lower"
        if curbed and hack is not None and override is not None and override - hack > margin:
            rows.append(f"`{arm}` ({percent(override)} override, {percent(hack)} hack)")
    if not rows:
        return []
    text = (
        f"Not in {listing(rows)}: there the evaluator is overwritten clearly more often than a hack is counted, because programs that "
        "solve the problem, or that are rejected anyway, overwrite it too. The hack rate alone flatters such an arm."
    )
    return [Finding("Does a lower hack rate mean that the evaluator is left alone?", "unexpected", text)]
