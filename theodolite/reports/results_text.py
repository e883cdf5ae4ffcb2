"""Studies' outcomes as Markdown, from their runs' files: the claim, every hypothesis, the table of arms, and every test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from theodolite.functional.statistics import PairedTest, Spread
from theodolite.reports.claim import claim_of
from theodolite.reports.formatting import NOT_MEASURED, count, duration, mean_and_sd, n_remark, p_text, points
from theodolite.reports.hypotheses import study_judgements
from theodolite.reports.oracle_use import oracle_arms
from theodolite.reports.paired_tests import PairTests, comparison_tests
from theodolite.reports.protocol_table import half_times
from theodolite.reports.records import Study, read_study
from theodolite.reports.remarks import caveats, missing
from theodolite.reports.statistics_table import arm_spread, matching_rate, n_rollouts
from theodolite.reports.verdict import dropped, findings, questions

COLUMNS = {
    "hack_rate": "hack",
    "override_rate": "override",
    "pass_rate": "pass",
    "no_hint_pass_rate": "pass, no evaluator named",
    "capability_pass_rate": "pass, other problems",
    "unseen_hack_rate": "hack, drawn name",
    "random_names_hack_rate": "hack, random name",
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
    parts += [f"{missing(study)}\n"] if study.absent else []
    claim = claim_of(study)
    if claim is not None:
        parts += [f"**{claim.text}**\n", f"{claim.mark}\n" if claim.mark else ""]
    parts += ["### Hypotheses, written down before the runs\n", _hypotheses(study)]
    parts += ["### Final rates\n", _arms(study)]
    if study.plan.mechanisms:
        parts += ["### By mechanism\n", _mechanisms(study)]
    for name, title in {"hack_rate": "Hack rate", "pass_rate": "Pass rate"}.items():
        parts += [f"### {title} (`{study.plan.measures[name]}`): every comparison under every test\n"]
        parts += [_tests(comparison_tests(study, questions(study), name), study.plan.measures[matching_rate(study)])]
    parts += [
        "".join(f"`{arm}` minus `{against}` is asked for and cannot be made: an arm has no run.\n" for arm, against in dropped(study))
    ]
    rates = " and ".join(f"`{study.plan.measures[name]}`" for name in ("hack_rate", "pass_rate"))
    parts += [f"### What happened ({rates})\n", _bullets([f"*{item.status}*: {item.text}" for item in findings(study)])]
    parts += ["### Before quoting a number\n", _bullets(caveats(study))]
    return "\n".join(part for part in parts if part)


def _bullets(items: Sequence[str]) -> str:
    return "".join(f"* {item}\n" for item in items)


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
        halves, curves = half_times(study, arm)
        row = [f"`{arm}`", f"{arm_spread(study, arm, 'hack_rate').n}", count(n_rollouts(study, arm))]
        row += [_rate(arm_spread(study, arm, name)) for name in columns]
        row += [_drift(arm_spread(study, arm, "kl_k3"))] if drift else []
        half = f"{sum(halves) / len(halves):.0f}" if halves else "never"
        rows.append([*row, f"{half} ({len(halves)} of n={curves})" if curves else NOT_MEASURED])
    head = ["arm", "n", "rollouts", *columns.values(), *(["drift k3"] if drift else []), "steps to 50 % hacks (seeds)"]
    return f"{_table(head, rows)}\n{_titles(study)}\n"


def _titles(study: Study) -> str:
    """What every arm is, its remark, and whether it was trained with the oracle's labels."""
    remarks = {arm: [note] if (note := study.note(arm)) else [] for arm in study.arms}
    for arm, names in oracle_arms(study).items():
        remarks[arm].append(f"trained with the oracle's labels: {', '.join(names)}")
    ends = {arm: f" ({'; '.join(texts)})" if texts else "" for arm, texts in remarks.items()}
    return "\n".join(f"* `{arm}`: {study.title(arm)}{ends[arm]}" for arm in study.arms)


def _rate(value: Spread) -> str:
    return f"{mean_and_sd(value)} ({n_remark(value)})" if value.n else NOT_MEASURED


def _drift(value: Spread) -> str:
    return NOT_MEASURED if value.mean is None else f"{value.mean:.3f} ({n_remark(value)})"


def _mechanisms(study: Study) -> str:
    names = {f"hack_{mechanism}_rate": f"{mechanism} ({meaning})" for mechanism, meaning in study.plan.mechanisms.items()}
    rows = [[f"`{arm}`", *(_rate(arm_spread(study, arm, name)) for name in names)] for arm in study.arms]
    return _table(["arm", *names.values()], rows)


def _tests(items: Sequence[PairTests], matching_key: str) -> str:
    rows = []
    for item in items:
        pair = item.comparison
        name = f"`{pair.arm}` minus `{pair.against}`"
        if pair.refusal:
            rows.append([name, pair.refusal, "", "", "", "", ""])
            continue
        matched = {True: "yes", False: "no", None: NOT_MEASURED}[item.matched]
        signs = NOT_MEASURED if item.signs is None else p_text(item.signs.p_value)
        corrected = NOT_MEASURED if item.seeds is None else p_text(item.holm_p)
        rows.append([name, _test(item.seeds), corrected, signs, _test(item.crossed), _test(item.literal), matched])
    head = ["", "t over seeds", "after Holm", "sign flips", "seeds and problems", "literal, not independent"]
    return _table([*head, f"`{matching_key}` matched"], rows)


def _test(test: PairedTest | None) -> str:
    if test is None:
        return NOT_MEASURED
    ends = "" if test.low is None or test.high is None else f" [{points(test.low)}, {points(test.high)}]"
    return f"{points(test.mean)}{ends}, {p_text(test.p_value)}, n = {test.n}"
