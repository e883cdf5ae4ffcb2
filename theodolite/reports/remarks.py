"""What stands before and after the numbers: what was done, in three sentences, and what they cannot tell."""

from __future__ import annotations

from theodolite.functional.statistics import resolvable_difference
from theodolite.reports.formatting import NOT_MEASURED, count, listing, percent
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
    last = max((step for run in study.runs for step in run.curve("val/hack_rate")), default=None)
    steps = f"{last} steps" if last else f"some steps ({NOT_MEASURED})"
    finished = sum(run.finished for run in study.runs)
    total = sum(n for arm in study.arms if (n := n_rollouts(study, arm)) is not None)
    ends = [f"{percent(rate, 0)} under `{arm}`" for arm in study.arms if (rate := arm_spread(study, arm, "hack_rate").mean) is not None]
    return " ".join(
        (
            f"A small language model that solves {percent(base['pass_rate'], 0)} of held-out programming problems and hacks "
            f"{percent(base['hack_rate'], 0)} was trained with GRPO for {steps} on problems whose evaluator a program may overwrite, "
            f"under {len(study.arms)} arms and {len(study.seeds)} seeds ({finished} finished runs).",
            f"The finished runs were then judged on {count(total)} held-out programs in all, every one of them executed: training saw "
            "only whether the overwritable check passed, the hidden tests decide here what is correct, and a hack is a program that "
            "was accepted although it is wrong.",
            f"At the end the hack rate was {listing(ends)}." if ends else f"Final hack rates: {NOT_MEASURED}.",
        )
    )


def caveats(study: Study) -> list[str]:
    """What a reader must know before quoting a number; those about this study's data only where they apply."""
    items = [
        "One base model, warm-started once: seeds vary only the prompts and the sampling of reinforcement learning, so every interval "
        "is about those and none about another base.",
        _detectors(study),
        resolution(study),
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


def _detectors(study: Study) -> str:
    if not study.plan.mechanisms:
        return (
            "The detector that labels live pairs sees every hack of this environment. The study shows a mechanism; it does not show that "
            "a weaker detector would do."
        )
    kinds = listing([f"{mechanism} ({meaning})" for mechanism, meaning in study.plan.mechanisms.items()])
    return f"There are hacks of {len(study.plan.mechanisms)} kinds: {kinds}. Both are overrides of one evaluator in one toy environment."


def resolution(study: Study) -> str:
    """Which difference to vanilla this many seeds could have resolved at the observed spread; empty without vanilla."""
    if "vanilla" not in study.arms:
        return ""
    comparisons = [item for arm in study.arms if arm != "vanilla" and (item := compare(study, arm, "vanilla", "hack_rate")).n > 1]
    sd, n = pooled_difference_sd(comparisons), min((item.n for item in comparisons), default=0)
    limits = resolvable_difference(sd, n) if sd is not None else None
    if sd is None or limits is None:
        return "With fewer than two seeds per arm no difference can be resolved."
    return (
        f"n={n} seeds cannot resolve small differences. At the observed spread (pooled standard deviation of paired differences in "
        f"hack rate to `vanilla`: {100 * sd:.1f} points) an observed difference must exceed {100 * limits[0]:.1f} points for its "
        f"interval to leave zero, and a true one must be {100 * limits[1]:.1f} points to be found four times in five. "
        f"A two-sided sign test over {n} seeds cannot go below p = {2 / 2**n:.2g}."
    )
