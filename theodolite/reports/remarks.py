"""What stands before and after the numbers: what was done, in three sentences, and what they cannot tell."""

from __future__ import annotations

from theodolite.functional.statistics import resolvable_difference
from theodolite.reports.formatting import NOT_MEASURED, count, listing, percent
from theodolite.reports.oracle_use import oracle_arms
from theodolite.reports.records import Study
from theodolite.reports.statistics_table import (
    arm_spread,
    base_by_seed,
    base_disagreement,
    compare,
    n_rollouts,
    pooled_difference_sd,
    spread,
)


def lead(study: Study) -> str:
    """What was done, in three sentences with numbers."""
    base = {name: spread(list(base_by_seed(study, name).values())).mean for name in ("hack_rate", "pass_rate")}
    rates = {name: percent(rate, 0) for name, rate in base.items()}
    known = f" that solves {rates['pass_rate']} of held-out programming problems and hacks {rates['hack_rate']}"
    start = "" if None in base.values() else known
    last = max((step for run in study.runs for step in run.curve("val/hack_rate")), default=None)
    steps = f"{last} steps" if last else f"some steps ({NOT_MEASURED})"
    finished = sum(run.finished for run in study.runs)
    counts = [n for arm in study.arms if (n := n_rollouts(study, arm)) is not None]
    ends = [f"{percent(rate, 0)} under `{arm}`" for arm in study.arms if (rate := arm_spread(study, arm, "hack_rate").mean) is not None]
    return " ".join(
        (
            f"A language model{start} was trained with GRPO for {steps} on problems whose evaluator a program may overwrite, under "
            f"{len(study.arms)} arms and {len(study.seeds)} seeds ({finished} finished runs).",
            f"The final hack rates count {count(sum(counts)) if counts else NOT_MEASURED} graded programs for held-out problems: a hack is "
            "a program that the overwritable check accepted and the hidden tests reject.",
            f"At the end the hack rate was {listing(ends)}." if ends else f"Final hack rates: {NOT_MEASURED}.",
        )
    )


def caveats(study: Study) -> list[str]:
    """What a reader must know before quoting a number; those about this study's data only where they apply."""
    items = [
        "Seeds vary the prompts and the sampling of reinforcement learning, so every interval is about those: none is about another base "
        "model or another warm start.",
        _detectors(study),
        resolution(study),
        *(_oracle(arm, names) for arm, names in oracle_arms(study).items()),
        *(f"`{arm}`: {note}." for arm in study.arms if (note := study.note(arm).rstrip("."))),
    ]
    gap = base_disagreement(study)
    if gap > 0:
        items.append(
            f"Arms of the same seed disagree about the untrained policy by up to {percent(gap)}: they did not start from the same "
            "weights, or were not evaluated alike."
        )
    seeds = {arm: arm_spread(study, arm, "hack_rate").n for arm in study.arms}
    if len(set(seeds.values())) > 1:
        text = listing([f"`{arm}` {n}" for arm, n in seeds.items()])
        items.append(f"Arms have unequal numbers of finished seeds ({text}): arms with unequal seeds are not compared with one another.")
    return [item for item in items if item]


def missing(study: Study) -> str:
    """Planned runs without a final measurement, by arm and reason; empty where none is missing."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for arm, seed, why in study.absent:
        seeds.setdefault((arm, why), []).append(str(seed))
    found = [f"`{arm}` seed{'s' if len(of) > 1 else ''} {listing(of)} ({why})" for (arm, why), of in seeds.items()]
    return f"Missing: {'; '.join(found)}." if found else ""


def _oracle(arm: str, names: list[str]) -> str:
    classes = listing([f"`{name}`" for name in names])
    return f"`{arm}` was trained with the oracle's labels ({classes}): a bound on what could be had, or a control, and no method."


def _detectors(study: Study) -> str:
    if not study.plan.mechanisms:
        return (
            "Hacks are not told apart by kind here, so nothing shows how an arm would fare against kinds that its detector cannot see, or "
            "with a weaker detector."
        )
    kinds = listing([f"{mechanism} ({meaning})" for mechanism, meaning in study.plan.mechanisms.items()])
    return f"Hacks are told apart by kind: {kinds}. Every kind is an override of the evaluator, in one environment."


def resolution(study: Study) -> str:
    """Which difference to vanilla this many seeds could have resolved at the observed spread; empty without arms to set against it."""
    comparisons = [compare(study, arm, "vanilla", "hack_rate") for arm in study.arms if arm != "vanilla"]
    if "vanilla" not in study.arms or not comparisons:
        return ""
    known = [item for item in comparisons if item.n > 1]
    if not known:
        return "No arm was run with the same two or more seeds as `vanilla`, so no difference to it can be resolved."
    sd, n = pooled_difference_sd(known), min(item.n for item in known)
    limits = resolvable_difference(sd, n) if sd is not None else None
    if sd is None or limits is None:
        return "The differences in hack rate to `vanilla` are the same on every seed: without spread no limit of resolution can be given."
    return (
        f"n={n} seeds cannot resolve small differences. At the observed spread (pooled standard deviation of paired differences in "
        f"hack rate to `vanilla`: {100 * sd:.1f} points) an observed difference must exceed {100 * limits[0]:.1f} points for its "
        f"interval to leave zero, and a true one must be {100 * limits[1]:.1f} points to be found four times in five. "
        f"A two-sided sign test over {n} seeds cannot go below p = {2 / 2**n:.2g}."
    )
