"""Studies' outcomes as Markdown, from their runs' files: the claim, every hypothesis, the table of arms, and every test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from theodolite.functional.statistics import PairedTest, Spread
from theodolite.reports.claim import claim_of
from theodolite.reports.formatting import NOT_MEASURED, count, duration, mean_and_sd, points
from theodolite.reports.hypotheses import study_judgements
from theodolite.reports.paired_tests import PairTests, comparison_tests
from theodolite.reports.protocol_table import time_to_half
from theodolite.reports.records import Study, read_study
from theodolite.reports.remarks import caveats
from theodolite.reports.statistics_table import arm_spread, n_rollouts
from theodolite.reports.verdict import findings, questions

COLUMNS = {
    "hack_rate": "hack",
    "override_rate": "override",
    "pass_rate": "pass",
    "no_hint_pass_rate": "pass, no evaluator named",
    "capability_pass_rate": "pass, other problems",
    "unseen_hack_rate": "hack, drawn name",
}
HEADER = """# Results

Written by `theodolite-report results` from the runs of `make experiment`; nothing below is typed by hand. Rates are percent, mean ± sample
standard deviation over seeds; differences are in points and paired by seed. The measures and tests are those of
[experiment.md](experiment.md).
"""


def results_text(studies: Sequence[Path]) -> str:
    """The Markdown of one or more studies.

    Raises:
        FileNotFoundError: A directory does not exist.
        ValueError: One holds no run, or a malformed file.
    """
    return "\n".join([HEADER, *(_study(read_study(path)) for path in studies)])


def _study(study: Study) -> str:
    seconds = sum(study.seconds.values())
    seeds = ", ".join(str(seed) for seed in study.seeds)
    time = f" {duration(seconds)} of wall time on {study.cpu_count} cores." if seconds and study.cpu_count else ""
    parts = [f"## {study.plan.title}\n", f"{len(study.arms)} arms, seeds {seeds}, {len(study.runs)} runs.{time}\n"]
    claim = claim_of(study)
    if claim is not None:
        parts += [f"**{claim.text}**\n", f"{claim.mark}\n" if claim.mark else ""]
    parts += ["### Hypotheses, written down before the runs\n", _hypotheses(study)]
    parts += ["### Final rates\n", _arms(study)]
    if study.plan.mechanisms:
        parts += ["### By mechanism\n", _mechanisms(study)]
    for name, title in {"hack_rate": "Hack rate", "pass_rate": "Pass rate"}.items():
        parts += [f"### {title}: every comparison under every test\n", _tests(comparison_tests(study, questions(study), name))]
    parts += ["### What happened\n", *(f"* *{item.status}*: {item.text}" for item in findings(study)), ""]
    parts += ["### Before quoting a number\n", *(f"* {item}" for item in caveats(study)), ""]
    return "\n".join(part for part in parts if part)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_line(head), _line(["---"] * len(head)), *(_line(row) for row in rows)]) + "\n"


def _hypotheses(study: Study) -> str:
    judged = study_judgements(study)
    if not judged:
        return "None were written down.\n"
    rows = []
    for item in judged:
        ends = "" if item.low is None or item.high is None else f" [{points(item.low)}, {points(item.high)}]"
        change = NOT_MEASURED if item.mean is None else points(item.mean) + ends
        entry = item.hypothesis
        rows.append([entry.name, entry.claim, entry.asked, change, f"{item.n}", f"**{item.outcome}**: {item.reason}"])
    return _table(["", "claim", "asked", "found, points [95 %]", "n", "outcome"], rows)


def _arms(study: Study) -> str:
    columns = {name: title for name, title in COLUMNS.items() if any(arm_spread(study, arm, name).n for arm in study.arms)}
    drift = any(arm_spread(study, arm, "kl_k3").n for arm in study.arms)
    rows = []
    for arm in study.arms:
        halves = [step for run in study.of(arm) if (step := time_to_half(run)) is not None]
        row = [f"`{arm}`", f"{arm_spread(study, arm, 'hack_rate').n}", count(n_rollouts(study, arm))]
        row += [mean_and_sd(arm_spread(study, arm, name)) for name in columns]
        row += [_drift(arm_spread(study, arm, "kl_k3"))] if drift else []
        rows.append([*row, f"{sum(halves) / len(halves):.0f} ({len(halves)})" if halves else "never"])
    head = ["arm", "n", "rollouts", *columns.values(), *(["drift k3"] if drift else []), "steps to 50 % hacks (seeds)"]
    titles = "\n".join(f"* `{arm}`: {study.title(arm)}{f' ({study.note(arm)})' if study.note(arm) else ''}" for arm in study.arms)
    return f"{_table(head, rows)}\n{titles}\n"


def _drift(value: Spread) -> str:
    return NOT_MEASURED if value.mean is None else f"{value.mean:.3f}"


def _mechanisms(study: Study) -> str:
    names = {f"hack_{mechanism}_rate": f"{mechanism} ({meaning})" for mechanism, meaning in study.plan.mechanisms.items()}
    rows = [[f"`{arm}`", *(mean_and_sd(arm_spread(study, arm, name)) for name in names)] for arm in study.arms]
    return _table(["arm", *names.values()], rows)


def _tests(items: Sequence[PairTests]) -> str:
    rows = []
    for item in items:
        pair = item.comparison
        name = f"`{pair.arm}` minus `{pair.against}`"
        if pair.refusal:
            rows.append([name, pair.refusal, "", "", "", "", ""])
            continue
        matched = {True: "yes", False: "no", None: NOT_MEASURED}[item.matched]
        signs = NOT_MEASURED if item.signs is None else f"{item.signs.p_value:.2g}"
        rows.append([name, _test(item.seeds), f"{item.holm_p:.2g}", signs, _test(item.crossed), _test(item.literal), matched])
    head = ["", "t over seeds", "p, Holm", "p, sign flips", "seeds and problems", "literal, not independent", "pass matched"]
    return _table(head, rows)


def _test(test: PairedTest | None) -> str:
    if test is None:
        return NOT_MEASURED
    ends = "" if test.low is None or test.high is None else f" [{points(test.low)}, {points(test.high)}]"
    return f"{points(test.mean)}{ends}, p = {test.p_value:.2g}, n = {test.n}"
