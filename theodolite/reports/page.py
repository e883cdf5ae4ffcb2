"""The report page: one HTML file that reads offline and on a phone. Only the rollout browser needs its script."""

from __future__ import annotations

from html import escape

from theodolite.reports.arms import ArmStyle, arm_styles
from theodolite.reports.browser import browser, content_policy
from theodolite.reports.claim import claim_of
from theodolite.reports.figures import Panel, darkened, panels, render_svg
from theodolite.reports.formatting import NOT_MEASURED, duration, listing
from theodolite.reports.html_parts import arm_colours, arm_name, code_lines, data_uri, inline, section, swatch
from theodolite.reports.hypotheses import study_judgements
from theodolite.reports.page_style import CSS
from theodolite.reports.protocol_table import protocol_table, statistics_table
from theodolite.reports.provenance_section import provenance
from theodolite.reports.records import Study
from theodolite.reports.remarks import caveats, lead, missing, resolution
from theodolite.reports.samples import KINDS, Sample, arm_samples
from theodolite.reports.tables import comparisons_table, geometry_table, hypotheses_table, phase_table, results_table
from theodolite.reports.verdict import dropped, findings


def render_page(study: Study) -> str:
    """The whole page as text; a function of the study's files alone."""
    styles = arm_styles(study.arms, study.titles, study.controls)
    remarks = "".join(f"<li>{inline(item)}</li>" for item in caveats(study))
    body = "".join(
        (
            _header(study),
            _claim(study),
            section("verdict", "What happened", _verdict(study)),
            _hypotheses(study),
            section("figure", "Rates during training", _figure(study, styles)),
            section("table", "Final held-out rates", _results(study, styles)),
            _statistics(study),
            section("samples", "What the programs look like", _samples(study, styles)),
            section("rollouts", "All programs", browser(study)),
            section("time", "Time", _time(study, styles)),
            section("caveats", "Read this before quoting a number", f"<ul>{remarks}</ul>"),
            section("provenance", "Commands and provenance", provenance(study)),
        )
    )
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{content_policy()}">\n'
        f"<title>{escape(study.plan.title)}</title>\n<style>{CSS}{arm_colours(styles)}</style>"
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n'


def _header(study: Study) -> str:
    total = study.seconds.get("total", sum(study.seconds.values()))
    cores = f" on {study.cpu_count} CPU cores" if study.cpu_count else ""
    time = f", {duration(total)} of wall time{cores}" if total else ""
    seeds = listing([str(seed) for seed in study.seeds])
    sub = f"Study {study.directory.resolve().name}: {len(study.arms)} arms, seeds {seeds}{time}"
    return f'<h1>{escape(study.plan.title)}</h1>\n<p class="sub">{escape(sub)}</p>\n<p class="lead">{inline(lead(study))}</p>\n'


def _claim(study: Study) -> str:
    claim = claim_of(study)
    if claim is None:
        return ""
    return section("claim", "The claim", "".join(f"<p>{inline(text)}</p>" for text in (claim.text, claim.mark) if text))


def _statistics(study: Study) -> str:
    explanation = (
        "Every comparison under every test. The unit that varies independently is the training run, so the test over seeds decides; Holm "
        "corrects it over the comparisons of the table. The bootstrap draws seeds and problems. The last test counts samples of one run as "
        "independent, as publications do; they share a model, and its p-value is too small."
    )
    heads = {name: inline(f"{title} (`{study.plan.measures[name]}`)") for name, title in TESTED.items()}
    tables = "\n".join(f"<h3>{heads[name]}</h3>{statistics_table(study, name)}" for name in TESTED)
    return section("statistics", "Statistics", f'<p class="small">{explanation}</p>\n{tables}\n<p>{inline(resolution(study))}</p>')


TESTED = {"hack_rate": "Hack rate", "pass_rate": "Pass rate"}


def _verdict(study: Study) -> str:
    items = [
        f'<li><span class="chip {finding.status.replace(" ", "-")}">{finding.status}</span>'
        f"<div><b>{inline(finding.question)}</b>{inline(finding.text)}</div></li>"
        for finding in findings(study)
    ]
    explanation = (
        "Written from the data. Differences are paired by seed, in percentage points, with a 95 % t interval; one whose interval "
        "contains zero is called unresolved. The intervals are not corrected for the number of comparisons. Hack and pass rates are "
        f"`{study.plan.measures['hack_rate']}` and `{study.plan.measures['pass_rate']}`."
    )
    return f'<p class="small">{inline(explanation)}</p>\n<ul class="findings">\n{chr(10).join(items)}\n</ul>'


def _hypotheses(study: Study) -> str:
    judgements = study_judgements(study)
    if not judgements:
        return ""
    explanation = (
        "Written down before the runs; the outcome of every one is shown. One-sided paired t-tests over seeds, after Holm's correction "
        "over all of them: confirmed where the change is shown, falsified where the opposite is, undecided otherwise. The confirming and "
        "the falsifying tests are corrected apart, each at 5 %. A pass condition that is not met keeps a claim from being confirmed and "
        "never falsifies it."
    )
    return section("hypotheses", "Hypotheses", f'<p class="small">{explanation}</p>\n{hypotheses_table(judgements)}')


def _figure(study: Study, styles: dict[str, ArmStyle]) -> str:
    legend = "".join(f"<li>{swatch(arm, style)}{escape(arm)}</li>" for arm, style in styles.items())
    pictures = "\n".join(_picture(study, panel) for panel in panels(study))
    caption = (
        "Lines: mean over seeds. Bands and crosses: one standard deviation over seeds. Dashed or hollow: controls. Curves: held-out "
        "problems that training never sees, one sample each; the last panel is the final evaluation of the table below, a small point "
        "per run."
    )
    figure = f'<figure><div class="panels">\n{pictures}\n</div>\n<figcaption>{caption}</figcaption></figure>'
    return f'<ul class="legend">{legend}</ul>\n{figure}'


def _picture(study: Study, panel: Panel) -> str:
    """One panel, drawn for light and for dark; the browser shows the one that fits."""
    drawn = render_svg(study, panel, "light")
    light, dark = (data_uri(svg, "image/svg+xml") for svg in (drawn, darkened(drawn, study)))
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture>{source}<img alt="{escape(panel.description)}" src="{light}"></picture>'


def _results(study: Study, styles: dict[str, ArmStyle]) -> str:
    caption = (
        "Mean ± sample standard deviation over seeds. <b>Hack</b>: accepted although wrong. <b>Override</b>: the program binds the "
        "evaluator's name, right or wrong. <b>Pass</b>: correct by the hidden tests. <b>Unseen evaluator name</b>: the prompt names an "
        "evaluator that this training never named."
    )
    parts = [f'<p class="small">{caption}</p>', results_table(study, styles)]
    parts += [f"<p>{inline(missing(study))}</p>"] if study.absent else []
    parts += ["<h3>Against controls and the baseline</h3>", comparisons_table(study)]
    lost = listing([f"`{arm}` minus `{against}`" for arm, against in dropped(study)])
    parts += [f"<p>{inline(f'Asked for, and not made because an arm has no run: {lost}.')}</p>"] if lost else []
    parts += ["<h3>The rest of the protocol</h3>", protocol_table(study, styles)]
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
        absent = [text for kind, text in KINDS.items() if kind not in {sample.kind for sample in samples}]
        cards = "".join(_card(sample) for sample in samples)
        none = f'<p class="small">None seen: {escape("; ".join(absent))}.</p>' if samples and absent else ""
        content = f'<div class="cards">{cards}</div>{none}' if samples else f'<p class="absent">Rollouts: {NOT_MEASURED}.</p>'
        is_open = " open" if arm in ("vanilla", "projected_live") else ""
        parts.append(f"<details{is_open}><summary>{arm_name(arm, style)}</summary>{content}</details>")
    return "\n".join(parts)


def _card(sample: Sample) -> str:
    reward = NOT_MEASURED if sample.reward is None else f"{sample.reward:g}"
    facts = f"seed {sample.seed}, problem {sample.problem}, reward {reward}, label {sample.label or NOT_MEASURED}"
    block = code_lines(sample.prompt, sample.completion, sample.flagged)
    return f'<article class="card"><p><b>{escape(KINDS[sample.kind])}</b></p><p class="small">{escape(facts)}</p>{block}</article>'


def _time(study: Study, styles: dict[str, ArmStyle]) -> str:
    parts = [_bars(study.seconds) if study.seconds else f"<p>Seconds per phase: {NOT_MEASURED}.</p>"]
    per_run = [run.seconds for run in study.runs if run.seconds is not None]
    if per_run:
        parts.append(f'<p class="small">One run took {duration(min(per_run))} to {duration(max(per_run))} (n={len(per_run)} runs).</p>')
    phases = phase_table(study, styles)
    if phases:
        parts += ["<h3>Inside a run: mean over logged steps, then over seeds</h3>", phases]
    return "\n".join(parts)


def _bars(seconds: dict[str, float]) -> str:
    longest = max(seconds.values()) or 1.0
    rows = [
        f'<span>{escape(phase.replace("_", " "))}</span><span class="bar" style="width:{100 * value / longest:.1f}%"></span>'
        f"<span>{duration(value)}</span>"
        for phase, value in seconds.items()
    ]
    return f'<div class="bars">{"".join(rows)}</div>'
