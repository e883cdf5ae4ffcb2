"""The report page: one HTML file that reads offline, on a phone and without scripts."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from theodolite.reports.arms import ArmStyle, arm_styles
from theodolite.reports.figures import panels, render_svg
from theodolite.reports.formatting import NOT_MEASURED, duration, listing, percent
from theodolite.reports.html_parts import arm_colours, code_lines, data_uri, inline, section, swatch
from theodolite.reports.page_style import CSS
from theodolite.reports.records import Run, Study
from theodolite.reports.samples import KINDS, Sample, arm_samples
from theodolite.reports.statistics_table import (
    arm_spread,
    base_by_seed,
    base_disagreement,
    compare,
    n_rollouts,
    pooled_difference_sd,
    resolvable_difference,
    spread,
)
from theodolite.reports.tables import comparisons_table, geometry_table, phase_table, results_table
from theodolite.reports.verdict import findings


def render_page(study: Study) -> str:
    """The whole page as text; a function of the study's files alone."""
    styles = arm_styles(study.arms, {arm: study.title(arm) for arm in study.arms})
    body = "".join(
        (
            _header(study),
            section("verdict", "What happened", _verdict(study)),
            section("figure", "Rates during training", _figure(study, styles)),
            section("table", "Final held-out rates", _results(study, styles)),
            section("samples", "What the programs look like", _samples(study, styles)),
            section("time", "Time", _time(study, styles)),
            section("caveats", "Read this before quoting a number", _caveats(study)),
            section("provenance", "Commands and provenance", _provenance(study)),
        )
    )
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Reward hacking under gradient projection</title>\n<style>{CSS}{arm_colours(styles)}</style>"
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n'


def lead(study: Study) -> str:
    """What was done, in three sentences with numbers."""
    base = {name: spread(list(base_by_seed(study, name).values())).mean for name in ("hack_rate", "pass_rate")}
    steps = max((step for run in study.runs for step in run.curve("val/hack_rate")), default=None)
    finished = sum(run.finished for run in study.runs)
    total = sum(n for arm in study.arms if (n := n_rollouts(study, arm)) is not None)
    ends = [f"{percent(rate, 0)} under `{arm}`" for arm in study.arms if (rate := arm_spread(study, arm, "hack_rate").mean) is not None]
    first = (
        f"A small language model that solves {percent(base['pass_rate'], 0)} of held-out programming problems and hacks {percent(base['hack_rate'], 0)} "
        f"was trained with GRPO for {steps if steps else 'a number of'} steps{'' if steps else f' ({NOT_MEASURED})'} on problems whose evaluator a "
        f"program may overwrite, under {len(study.arms)} arms and {len(study.seeds)} seeds ({finished} finished runs)."
    )
    second = (
        f"The finished runs were then judged on {total:,} held-out programs in all, every one of them executed: training saw only whether the "
        "overwritable check passed, the hidden tests decide here what is correct, and a hack is a program that was accepted although it is wrong."
    )
    third = f"At the end the hack rate was {listing(ends)}." if ends else f"Final hack rates: {NOT_MEASURED}."
    return " ".join((first, second, third))


def _header(study: Study) -> str:
    total = sum(study.seconds.values())
    cores = f" on {study.cpu_count} CPU cores" if study.cpu_count else ""
    time = f", {duration(total)} of work{cores}" if total else ""
    sub = f"Study {study.directory.name}: {len(study.arms)} arms, seeds {listing([str(seed) for seed in study.seeds])}{time}"
    return f'<h1>Reward hacking under gradient projection</h1>\n<p class="sub">{escape(sub)}</p>\n<p class="lead">{inline(lead(study))}</p>\n'


def _verdict(study: Study) -> str:
    items = [
        f'<li><span class="chip {finding.status.replace(" ", "-")}">{finding.status}</span>'
        f"<div><b>{inline(finding.question)}</b>{inline(finding.text)}</div></li>"
        for finding in findings(study)
    ]
    explanation = (
        "Written from the data. Differences are paired by seed, in percentage points, with a 95 % t interval; one whose interval contains zero "
        "is called unresolved. The intervals are not corrected for the number of comparisons."
    )
    return f'<p class="small">{explanation}</p>\n<ul class="findings">\n{chr(10).join(items)}\n</ul>'


def _figure(study: Study, styles: dict[str, ArmStyle]) -> str:
    legend = "".join(f"<li>{swatch(arm, style)}{escape(arm)}</li>" for arm, style in styles.items())
    pictures = []
    for panel in panels():
        light, dark = (data_uri(render_svg(study, panel, theme), "image/svg+xml") for theme in ("light", "dark"))
        pictures.append(
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}"><img alt="{escape(panel.description)}" src="{light}"></picture>'
        )
    caption = "Thick: mean over seeds. Thin: one seed. Dashed: controls. Held-out problems that training never sees, one sample each."
    return (
        f'<ul class="legend">{legend}</ul>\n<figure><div class="panels">\n{chr(10).join(pictures)}\n</div>\n<figcaption>{caption}</figcaption></figure>'
    )


def _results(study: Study, styles: dict[str, ArmStyle]) -> str:
    caption = (
        "Mean ± sample standard deviation over seeds. <b>Hack</b>: accepted although wrong. <b>Override</b>: the program binds the evaluator's "
        "name, right or wrong. <b>Pass</b>: correct by the hidden tests. <b>Unseen evaluator name</b>: the prompt names an evaluator that training "
        "never named."
    )
    parts = [f'<p class="small">{caption}</p>', results_table(study, styles)]
    if study.absent:
        parts.append(f"<p>Missing: {inline(listing([f'`{arm}` seed {seed} ({why})' for arm, seed, why in study.absent]))}.</p>")
    parts += ["<h3>Against controls and the baseline</h3>", comparisons_table(study)]
    geometry = geometry_table(study, styles)
    if geometry:
        parts += ["<h3>What the projections did to the gradient</h3>", '<p class="small">Means over steps, then over seeds.</p>', geometry]
    return "\n".join(parts)


def _samples(study: Study, styles: dict[str, ArmStyle]) -> str:
    rule = (
        "The first rollout of each kind from the final evaluation, in order of seeds and problems: chosen by that rule, not by eye. "
        "Marked lines bind the evaluator's name."
    )
    parts = [f'<p class="small">{rule}</p>']
    for arm, style in styles.items():
        samples = arm_samples(study, arm)
        absent = [KINDS[kind] for kind in KINDS if kind not in {sample.kind for sample in samples}]
        cards = "".join(_card(sample) for sample in samples)
        none = f'<p class="small">None seen: {escape("; ".join(absent))}.</p>' if samples and absent else ""
        content = f'<div class="cards">{cards}</div>{none}' if samples else f'<p class="absent">Rollouts: {NOT_MEASURED}.</p>'
        is_open = " open" if arm in ("vanilla", "projected_live") else ""
        parts.append(f"<details{is_open}><summary>{swatch(arm, style)}<b>{escape(arm)}</b></summary>{content}</details>")
    return "\n".join(parts)


def _card(sample: Sample) -> str:
    reward = NOT_MEASURED if sample.reward is None else f"{sample.reward:g}"
    facts = f"seed {sample.seed}, problem {sample.problem}, reward {reward}, label {sample.label or NOT_MEASURED}"
    block = code_lines(sample.prompt, sample.completion, sample.flagged)
    return f'<article class="card"><p><b>{escape(KINDS[sample.kind])}</b></p><p class="small">{escape(facts)}</p>{block}</article>'


def _time(study: Study, styles: dict[str, ArmStyle]) -> str:
    parts = []
    if study.seconds:
        longest = max(study.seconds.values()) or 1.0
        bars = "".join(
            f'<span>{escape(phase.replace("_", " "))}</span><span><span class="bar" style="display:block;width:{100 * value / longest:.1f}%"></span></span>'
            f"<span>{duration(value)}</span>"
            for phase, value in study.seconds.items()
        )
        parts.append(f'<div class="bars">{bars}</div>')
    else:
        parts.append(f"<p>Seconds per phase: {NOT_MEASURED}.</p>")
    per_run = [run.seconds for run in study.runs if run.seconds is not None]
    if per_run:
        parts.append(f'<p class="small">One run took {duration(min(per_run))} to {duration(max(per_run))} (n={len(per_run)} runs).</p>')
    phases = phase_table(study, styles)
    if phases:
        parts += ["<h3>Per optimizer step, mean over logged steps, then over seeds</h3>", phases]
    return "\n".join(parts)


def _caveats(study: Study) -> str:
    items = [
        "One base model, warm-started once: seeds vary only the prompts and the sampling of reinforcement learning, so every interval is about "
        "those and none about another base.",
        "The detector that labels live pairs sees every hack of this environment. The study shows a mechanism; it does not show that a weaker "
        "detector would do.",
        _resolution(study),
    ]
    items += [f"`{arm}`: {note}." for arm in study.arms if (note := study.note(arm).rstrip("."))]
    gap = base_disagreement(study)
    if gap > 0:
        items.append(
            f"Arms of the same seed disagree about the untrained policy by up to {percent(gap)}: they did not start from the same weights, or were "
            "not evaluated alike."
        )
    counts = {arm: arm_spread(study, arm, "hack_rate").n for arm in study.arms}
    if len(set(counts.values())) > 1:
        text = listing([f"`{arm}` {n}" for arm, n in counts.items()])
        items.append(f"Arms have unequal numbers of finished seeds ({text}): paired differences use the common seeds only.")
    return f"<ul>{''.join(f'<li>{inline(item)}</li>' for item in items if item)}</ul>"


def _resolution(study: Study) -> str:
    """Which difference this many seeds could have resolved at the observed spread."""
    if "vanilla" not in study.arms:
        return ""
    comparisons = [compare(study, arm, "vanilla", "hack_rate") for arm in study.arms if arm != "vanilla"]
    sd, n = pooled_difference_sd(comparisons), min((item.n for item in comparisons if item.n > 1), default=0)
    limits = resolvable_difference(sd, n) if sd is not None else None
    if sd is None or limits is None:
        return "With fewer than two common seeds per arm no difference can be resolved."
    return (
        f"n={n} seeds cannot resolve small differences. At the observed spread (standard deviation of paired differences in hack rate to `vanilla`: "
        f"{100 * sd:.1f} points) an observed difference must exceed {100 * limits[0]:.1f} points for its interval to leave zero, and a true one must "
        f"be {100 * limits[1]:.1f} points to be found four times in five. A two-sided sign test over {n} seeds cannot go below p = {2 / 2**n:.2g}."
    )


def _provenance(study: Study) -> str:
    commands = "\n".join(f"{run.arm}-{run.seed}  {run.command or NOT_MEASURED}" for run in study.runs)
    parts = [f"<p>The command of every run:</p><pre class=\"block\">{escape(commands)}</pre>"]
    flat = [_flatten(run.manifest) for run in study.runs]
    if not any(flat):
        return "\n".join([*parts, f"<p>Manifests: {NOT_MEASURED}.</p>"])
    shared, differing = split_manifests(flat)
    if shared:
        lines = "\n".join(f"{key}: {value}" for key, value in shared.items())
        parts.append(f'<p>The same in all {len(flat)} runs:</p><pre class="block">{escape(lines)}</pre>')
    if differing:
        parts.append("<details><summary>What differs between runs</summary>" + "".join(_own_lines(run, differing) for run in study.runs) + "</details>")
    return "\n".join(parts)


def _own_lines(run: Run, keys: list[str]) -> str:
    own = _flatten(run.manifest)
    lines = "\n".join(f"{key}: {own.get(key, NOT_MEASURED)}" for key in keys)
    return f'<h3>{escape(run.directory.name)}</h3><pre class="block">{escape(lines)}</pre>'


def split_manifests(flat: list[dict[str, str]]) -> tuple[dict[str, str], list[str]]:
    """Entries that all manifests agree on, and the keys of those on which they differ."""
    keys = sorted(set().union(*flat))
    shared = {key: flat[0][key] for key in keys if key in flat[0] and all(other.get(key) == flat[0][key] for other in flat)}
    return shared, [key for key in keys if key not in shared]


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Leaves of nested JSON as ``a.b.c: text``, long ones cut."""
    if isinstance(value, dict):
        return {key: leaf for name in sorted(value) for key, leaf in _flatten(value[name], f"{prefix}.{name}" if prefix else str(name)).items()}
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return {prefix: text if len(text) <= 300 else f"{text[:300]} ..."} if prefix else {}
