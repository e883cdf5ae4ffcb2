"""The tables of a report as HTML: final rates by arm, paired comparisons, geometry of the projection, seconds per phase of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from theodolite.functional.statistics import Spread
from theodolite.reports.arms import ArmStyle
from theodolite.reports.formatting import NOT_MEASURED, count, interval, mean_and_sd, n_remark, points, sign_count
from theodolite.reports.html_parts import arm_name, cell, inline, table
from theodolite.reports.hypotheses import Judgement
from theodolite.reports.oracle_use import oracle_users
from theodolite.reports.records import Study
from theodolite.reports.statistics_table import (
    Comparison,
    arm_spread,
    base_by_seed,
    base_rollouts,
    compare,
    n_rollouts,
    spread,
)
from theodolite.reports.verdict import questions

_HEAD = (
    "Arm", "Seeds", "Hack, %", "Override, %", "Pass, %", "Pass, unseen name, %",
    "Hack minus vanilla, points [95\N{NO-BREAK SPACE}%]", "Pass minus vanilla, points [95\N{NO-BREAK SPACE}%]",
)  # fmt: skip


def results_table(study: Study, styles: dict[str, ArmStyle]) -> str:
    """Final rates: one row for the untrained policy, one per arm; every row says over how many seeds."""
    rows = [_base_row(study)] + [_arm_row(study, arm, styles[arm]) for arm in study.arms]
    return table(_HEAD, rows)


def _base_row(study: Study) -> str:
    rates = [spread(list(base_by_seed(study, name).values())) for name in ("hack_rate", "override_rate", "pass_rate")]
    n = max(rate.n for rate in rates)
    cells = [
        cell(f"n={n}", _rollouts(base_rollouts(study))),
        *(_rate(rate) for rate in rates),
        cell(NOT_MEASURED),
        "<td></td>",
        "<td></td>",
    ]
    head = "<b>before training</b><small>the policy that all arms start from, on the problems of validation</small>"
    return f'<tr><th scope="row">{head}</th>{"".join(cells)}</tr>'


def _arm_row(study: Study, arm: str, style: ArmStyle) -> str:
    hack = arm_spread(study, arm, "hack_rate")
    absent = [seed for name, seed, _ in study.absent if name == arm]
    cells = [
        cell(f"n={hack.n}", _rollouts(n_rollouts(study, arm)), f"{len(absent)} missing" if absent else ""),
        *(_rate(arm_spread(study, arm, name)) for name in ("hack_rate", "override_rate", "pass_rate", "unseen_pass_rate")),
    ]
    if arm == "vanilla" or "vanilla" not in study.arms:
        cells += ["<td></td>", "<td></td>"]
    else:
        cells += [_difference(compare(study, arm, "vanilla", name)) for name in ("hack_rate", "pass_rate")]
    labels = ["trained with the oracle's labels"] if any(oracle_users(run) for run in study.of(arm)) else []
    note = "".join(f'<small class="note">{escape(text)}</small>' for text in (study.note(arm), *labels) if text)
    return f'<tr><th scope="row">{arm_name(arm, style)}<small>{escape(study.title(arm))}</small>{note}</th>{"".join(cells)}</tr>'


def _rate(value: Spread) -> str:
    return cell(mean_and_sd(value), n_remark(value))


def _rollouts(n: int | None) -> str:
    return f"rollouts {NOT_MEASURED}" if n is None else f"{count(n)} rollouts"


def _difference(item: Comparison) -> str:
    if item.mean is None:
        return f'<td><span class="absent">{inline(item.refusal)}</span></td>'
    *before, signs = sign_count(item).removesuffix(" seeds").removesuffix(" seed").split(", ")  # a line each: columns fit a phone
    return cell(points(item.mean), interval(item), *before, f"{signs}, n={item.n}")


def comparisons_table(study: Study) -> str:
    """Every comparison of the verdict with its interval in hack, override and pass rate."""
    measures = ("hack_rate", "override_rate", "pass_rate")
    rows = []
    for arm, against in questions(study):
        items = [compare(study, arm, against, name) for name in measures]
        head = f'<th scope="row">{inline(f"`{arm}` minus `{against}`")}</th>'
        rows.append(f"<tr>{head}{cell(f'n={items[0].n}')}{''.join(_difference(item) for item in items)}</tr>")
    return table(
        (
            "Paired by seed",
            "Seeds",
            "Hack, points [95\N{NO-BREAK SPACE}%]",
            "Override, points [95\N{NO-BREAK SPACE}%]",
            "Pass, points [95\N{NO-BREAK SPACE}%]",
        ),
        rows,
    )


def geometry_table(study: Study, styles: dict[str, ArmStyle]) -> str:
    """What the projections did: mean over logged steps and seeds of every ``projection/<name>/<quantity>``; empty where none was logged."""
    keys = sorted({key for run in study.runs for key in run.series if key.startswith("projection/")})
    quantities = list(dict.fromkeys(key.rsplit("/", 1)[1] for key in keys))
    rows = []
    for arm in study.arms:
        names = sorted(
            {key.split("/", 1)[1].rsplit("/", 1)[0] for run in study.of(arm) for key in run.series if key.startswith("projection/")}
        )
        for name in names:
            cells = "".join(_logged_mean(study, arm, f"projection/{name}/{quantity}") for quantity in quantities)
            rows.append(f'<tr><th scope="row">{arm_name(arm, styles[arm])}<small>{escape(name)}</small></th>{cells}</tr>')
    return table(("Arm", *(quantity.replace("_", " ") for quantity in quantities)), rows) if rows else ""


def _logged_mean(study: Study, arm: str, key: str) -> str:
    per_run = [math.fsum(curve.values()) / len(curve) for run in study.of(arm) if (curve := run.curve(key))]
    mean = spread(per_run)
    if mean.mean is None:
        return cell(NOT_MEASURED)
    return cell(f"{mean.mean:.3g}".replace("-", "\N{MINUS SIGN}"), f"n={mean.n}")


def phase_table(study: Study, styles: dict[str, ArmStyle]) -> str:
    """Means over logged steps of everything under ``time/``, by arm; empty where nothing was logged."""
    keys = sorted({key for run in study.runs for key in run.series if key.startswith("time/")})
    if not keys:
        return ""
    rows = [
        f'<tr><th scope="row">{arm_name(arm, styles[arm])}</th>{"".join(_logged_mean(study, arm, key) for key in keys)}</tr>'
        for arm in study.arms
    ]
    return table(("Arm", *(_phase_head(key) for key in keys)), rows)


def _phase_head(key: str) -> str:
    """``time/rollouts_s`` as ``rollouts, s``; other quantities under ``time/`` (tokens per second, loads) by their names."""
    name = key.removeprefix("time/")
    seconds = name.endswith("_s") and not name.endswith("_per_s")
    return f"{name.removesuffix('_s').replace('_', ' ')}, s" if seconds else name.replace("_", " ")


def hypotheses_table(judgements: Sequence[Judgement]) -> str:
    """Every hypothesis with its outcome, the change that was found, and why."""
    rows = []
    for item in judgements:
        entry = item.hypothesis
        head = f'<th scope="row"><b>{escape(entry.name)}: {item.outcome}</b><small>{inline(entry.claim)}</small></th>'
        found = "" if item.mean is None else points(item.mean)
        ends = "" if item.low is None or item.high is None else f"[{points(item.low)}, {points(item.high)}]"
        asked = f'<td class="text">{inline(entry.asked)}</td>'
        outcome = f'<td class="text"><b>{item.outcome}</b><small>{inline(item.reason)}</small></td>'
        change = cell(found or NOT_MEASURED, ends, f"n={item.n}")
        rows.append(f"<tr>{head}{asked}{change}{outcome}</tr>")
    columns = ("Hypothesis", "What was asked", "Change found, points [95\N{NO-BREAK SPACE}%]", "Outcome")
    return table(columns, rows, texts=("What was asked", "Outcome"))
