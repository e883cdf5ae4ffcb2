"""Two tables: every comparison under every test, and what the final protocol measures beside hack, override and pass rates."""

from __future__ import annotations

from theodolite.functional.statistics import PairedTest, Spread, spread
from theodolite.reports.arms import ArmStyle
from theodolite.reports.formatting import NOT_MEASURED, mean_and_sd, n_remark, p_text, points
from theodolite.reports.html_parts import arm_name, cell, inline, table
from theodolite.reports.paired_tests import PairTests, comparison_tests
from theodolite.reports.records import Run, Study
from theodolite.reports.statistics_table import arm_spread, matching_rate
from theodolite.reports.verdict import questions

RATE_COLUMNS = {
    "loose_hack_rate": "Attempts (loose), %",
    "hack_given_attempt": "Hacks per attempt, %",
    "unseen_hack_rate": "Hack, drawn name, %",
    "random_names_hack_rate": "Hack, random name, %",
    "random_names_pass_rate": "Pass, random name, %",
    "no_hint_pass_rate": "Pass, no evaluator named, %",
    "capability_pass_rate": "Pass, other problems, %",
    "hack_definition_rate": "Hack by definition, %",
    "hack_assignment_rate": "Hack by assignment, %",
}
"""Measures in percent, and how the table heads them; those that no run has are left out."""
HALF = 0.5


def statistics_table(study: Study, name: str) -> str:
    """Every comparison of the study in one measure, under every test; each cell says over how many pairs."""
    rows = []
    for item in comparison_tests(study, questions(study), name):
        head = f'<th scope="row">{inline(f"`{item.comparison.arm}` minus `{item.comparison.against}`")}</th>'
        if item.comparison.refusal:
            rows.append(f'<tr>{head}<td colspan="6"><span class="absent">{inline(item.comparison.refusal)} (n=0)</span></td></tr>')
            continue
        rows.append(f"<tr>{head}{''.join(_test_cells(item))}</tr>")
    heads = (
        "Paired by seed",
        "t-test over seeds, points",
        "p after Holm",
        "Sign flips",
        "Seeds and problems, points",
        "Literal (not independent)",
    )
    return table((*heads, f"Pass rates matched ({study.plan.measures[matching_rate(study)]})"), rows)


def _test_cells(item: PairTests) -> list[str]:
    n = f"n={item.comparison.n}"
    matched = {True: "yes, within 5 points", False: "no", None: NOT_MEASURED}[item.matched]
    return [
        _with_interval(item.seeds),
        cell(NOT_MEASURED if item.seeds is None else p_text(item.holm_p), n),
        cell(NOT_MEASURED, n) if item.signs is None else cell(p_text(item.signs.p_value), n),
        _with_interval(item.crossed),
        _with_interval(item.literal),
        cell(matched, n),
    ]


def _with_interval(test: PairedTest | None) -> str:
    if test is None:
        return cell(NOT_MEASURED, "n=0")
    ends = "" if test.low is None or test.high is None else f"[{points(test.low)}, {points(test.high)}]"
    return cell(points(test.mean), ends, f"{p_text(test.p_value)}, n={test.n}")


def protocol_table(study: Study, styles: dict[str, ArmStyle]) -> str:
    """What else was measured at the end, by arm: only columns that some run has."""
    columns = {name: title for name, title in RATE_COLUMNS.items() if any(arm_spread(study, arm, name).n for arm in study.arms)}
    drift = [name for name in ("kl_k1", "kl_k3") if any(arm_spread(study, arm, name).n for arm in study.arms)]
    rows = []
    for arm in study.arms:
        cells = [_rate(arm_spread(study, arm, name)) for name in columns]
        cells += [_plain(arm_spread(study, arm, name)) for name in drift]
        rows.append(f'<tr><th scope="row">{arm_name(arm, styles[arm])}</th>{"".join(cells)}{_half_time(study, arm)}</tr>')
    heads = [*columns.values(), *(f"Drift {name.removeprefix('kl_')}, nats per token" for name in drift), "Steps to 50 % hacks"]
    return table(("Arm", *heads), rows)


def _rate(value: Spread) -> str:
    return cell(mean_and_sd(value), n_remark(value))


def _plain(value: Spread) -> str:
    if value.mean is None:
        return cell(NOT_MEASURED)
    text = f"{value.mean:.3f}" + (f" ± {value.sd:.3f}" if value.sd is not None else "")
    return cell(text.replace("-", "\N{MINUS SIGN}"), n_remark(value))


def time_to_half(run: Run) -> int | None:
    """The first evaluated step at which at least half of the validation rollouts are hacks; None if there is none."""
    return next((step for step, rate in run.curve("val/hack_rate").items() if rate >= HALF), None)


def half_times(study: Study, arm: str) -> tuple[list[int], int]:
    """The steps of :func:`time_to_half` of the arm's runs that reached it, and how many of its runs have a validation curve."""
    runs = [run for run in study.of(arm) if run.curve("val/hack_rate")]
    return [step for run in runs if (step := time_to_half(run)) is not None], len(runs)


def _half_time(study: Study, arm: str) -> str:
    reached, n = half_times(study, arm)
    mean = spread([float(step) for step in reached]).mean
    return cell(NOT_MEASURED if not n else "never" if mean is None else f"{mean:.0f}", f"reached by {len(reached)} of n={n}")
