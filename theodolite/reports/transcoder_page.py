"""The page of a comparison of transcoders: figures, tables, differences in words, commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from theodolite.functional.statistics import Spread, spread
from theodolite.reports.arms import ArmStyle, arm_styles
from theodolite.reports.compare_transcoders import MEASURES, CoderRun, arm_value, arms_of
from theodolite.reports.figures import Theme, _own_style, _save
from theodolite.reports.formatting import NOT_MEASURED
from theodolite.reports.html_parts import arm_colours, arm_name, cell, data_uri, inline, section, swatch, table
from theodolite.reports.page_style import CSS

TITLE = "Transcoders side by side"


def styles_of(runs: Sequence[CoderRun]) -> dict[str, ArmStyle]:
    """A style for each arm; an arm called plain, or whose name says control, is dashed."""
    titles = {arm: "control" if arm == "plain" or "control" in arm else arm for arm in arms_of(runs)}
    return arm_styles(arms_of(runs), titles)


def draw_prefixes(axes: Axes, runs: Sequence[CoderRun], theme: Theme) -> None:
    """FVU against the number of latents; a point per run, a line through the means."""
    sizes = sorted({end for run in runs for end in run.prefixes})
    for arm, style in styles_of(runs).items():
        mine = [run.prefixes for run in runs if run.arm == arm]
        means = {end: spread([fvu.get(end) for fvu in mine]).mean for end in sizes}
        known = {end: mean for end, mean in means.items() if mean is not None}
        colour = style.light if theme == "light" else style.dark
        axes.plot(list(known), list(known.values()), color=colour, linewidth=2.0, linestyle="--" if style.control else "-", zorder=3)
        for fvu in mine:
            axes.scatter(list(fvu), list(fvu.values()), s=22, color=colour, marker=style.marker, alpha=0.7, linewidths=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticklabels([str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_title("Held-out FVU by prefix")
    axes.set_xlabel("latents (prefix)")
    axes.set_ylabel("FVU")


def draw_training(axes: Axes, runs: Sequence[CoderRun], theme: Theme) -> None:
    """FVU of training batches against step."""
    for arm, style in styles_of(runs).items():
        for run in runs:
            if run.arm == arm:
                colour = style.light if theme == "light" else style.dark
                axes.plot(list(run.curve), list(run.curve.values()), color=colour, linewidth=1.0, linestyle="--" if style.control else "-")
    axes.set_yscale("log")
    axes.set_title("FVU of training batches (all latents)")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_layers(axes: Axes, runs: Sequence[CoderRun], theme: Theme) -> None:
    """Final FVU against layer."""
    layers = sorted({run.layer for run in runs})
    for arm, style in styles_of(runs).items():
        colour = style.light if theme == "light" else style.dark
        points = [(run.layer, run.values["fvu"]) for run in runs if run.arm == arm]
        axes.scatter(*zip(*points, strict=True), s=40, color=colour, marker=style.marker, alpha=0.7, linewidths=0)
    axes.xaxis.set_major_locator(FixedLocator(layers))
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    axes.set_ylim(bottom=0)
    axes.set_title("Held-out FVU by layer (all latents)")
    axes.set_xlabel("layer")


PANELS: dict[str, tuple[Callable[[Axes, Sequence[CoderRun], Theme], None], str]] = {
    "prefixes": (draw_prefixes, "Held-out FVU against the number of latents, one line per arm"),
    "training": (draw_training, "FVU of training batches against step, one line per run"),
    "layers": (draw_layers, "Held-out FVU against layer, one point per run"),
}


def _panels(runs: Sequence[CoderRun]) -> list[str]:
    """Panels that have something to show."""
    wanted = ["prefixes"] if any(len(run.prefixes) > 1 for run in runs) else []
    wanted += ["training"] if any(run.curve for run in runs) else []
    return wanted + (["layers"] if len({run.layer for run in runs}) > 1 or not wanted else [])


def comparison_png(runs: Sequence[CoderRun]) -> bytes:
    """All panels in one picture."""
    names = _panels(runs)
    with _own_style("light"):
        figure = Figure(figsize=(5.4 * len(names), 4.3), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            PANELS[name][0](axes, runs, "light")
        handles = [
            figure.axes[0].plot([], [], color=style.light, linestyle="--" if style.control else "-", marker=style.marker, label=arm)[0]
            for arm, style in styles_of(runs).items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        return _save(figure, "png", dpi=150)


def comparison_page(runs: Sequence[CoderRun], summary: dict[str, Any]) -> str:
    """The whole page as text."""
    styles = styles_of(runs)
    body = "".join(
        (
            f'<h1>{TITLE}</h1>\n<p class="sub">{len(runs)} runs of {len(styles)} arms on {escape(_models(runs))}</p>\n',
            section("differences", "What differs", _differences(summary)),
            section("figure", "Figures", _figures(runs, styles)),
            section("prefixes", "FVU by prefix", _prefix_table(runs, styles)),
            section("table", "Numbers", _numbers(runs, styles)),
            section("provenance", "Commands", _commands(runs)),
        )
    )
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{CSS}{arm_colours(styles)}</style>"
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n'


def _models(runs: Sequence[CoderRun]) -> str:
    return ", ".join(dict.fromkeys(run.model.rstrip("/").rpartition("/")[2] for run in runs))


def _differences(summary: dict[str, Any]) -> str:
    names = {"fvu": "FVU", "fvu_mean": "mean FVU over prefixes", "ce_recovered": "share of cross-entropy recovered"}
    items = [_sentence(item, names[item["measure"]]) for item in summary["comparisons"] if item["mean"] is not None]
    note = "Paired by seed, with 95 % t intervals, not corrected for their number; one that contains zero is unresolved."
    return f'<p class="small">{note}</p>\n<ul>{"".join(f"<li>{inline(item)}</li>" for item in items)}</ul>' if items else "<p>One arm.</p>"


def _sentence(item: dict[str, Any], name: str) -> str:
    start = f"`{item['arm']}` against `{item['against']}`, {name}: {item['mean']:+.4f}"
    if item["low"] is None:
        return f"{start} (one seed, no interval)."
    verdict = "unresolved" if item["low"] <= 0 <= item["high"] else "higher" if item["mean"] > 0 else "lower"
    return f"{start} [{item['low']:+.4f}, {item['high']:+.4f}], n={item['n']} seeds: {verdict}."


def _figures(runs: Sequence[CoderRun], styles: dict[str, ArmStyle]) -> str:
    legend = "".join(f"<li>{swatch(arm, style)}{escape(arm)}</li>" for arm, style in styles.items())
    pictures = "\n".join(_picture(runs, name) for name in _panels(runs))
    return f'<ul class="legend">{legend}</ul>\n<figure><div class="panels">\n{pictures}\n</div></figure>'


def _picture(runs: Sequence[CoderRun], name: str) -> str:
    draw, description = PANELS[name]
    light, dark = (data_uri(_svg(runs, draw, theme), "image/svg+xml") for theme in ("light", "dark"))
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture>{source}<img alt="{escape(description)}" src="{light}"></picture>'


def _svg(runs: Sequence[CoderRun], draw: Callable[[Axes, Sequence[CoderRun], Theme], None], theme: Theme) -> bytes:
    with _own_style(theme):
        figure = Figure(figsize=(5.4, 3.9), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots(), runs, theme)
        return _save(figure, "svg", transparent=True)


def _prefix_table(runs: Sequence[CoderRun], styles: dict[str, ArmStyle]) -> str:
    ends = sorted({end for run in runs for end in run.prefixes})
    rows = [
        f"<tr>{_head(runs, arm, style)}{''.join(_value(arm_value(runs, arm, f'fvu_{end}')) for end in ends)}</tr>"
        for arm, style in styles.items()
    ]
    return table(["Arm", *(f"{end} latents" for end in ends)], rows)


def _numbers(runs: Sequence[CoderRun], styles: dict[str, ArmStyle]) -> str:
    rows = [
        f"<tr>{_head(runs, arm, style)}{''.join(_value(arm_value(runs, arm, name)) for name in MEASURES)}</tr>"
        for arm, style in styles.items()
    ]
    stand_in = [run.directory.name for run in runs if run.stage != "test"]
    remark = f"<p>Validation numbers stand in for: {inline(', '.join(stand_in))}.</p>" if stand_in else ""
    note = "Mean ± sample standard deviation over seeds. FVU: 0 is perfect, 1 is the mean. CE recovered: 1 is lossless, 0 is no MLP at all."
    return f'<p class="small">{note}</p>{table(["Arm", *MEASURES.values()], rows)}{remark}'


def _head(runs: Sequence[CoderRun], arm: str, style: ArmStyle) -> str:
    sites = dict.fromkeys(f"{run.input_site} → {run.target_site}" for run in runs if run.arm == arm)
    seeds = sum(run.arm == arm for run in runs)
    small = "".join(f"<small>{escape(site)}</small>" for site in [*sites, f"n={seeds}"])
    return f'<th scope="row">{arm_name(arm, style)}{small}</th>'


def _value(value: Spread) -> str:
    if value.mean is None:
        return cell(NOT_MEASURED)
    return cell(f"{value.mean:.4g}" + ("" if value.sd is None else f" ± {value.sd:.2g}"))


def _commands(runs: Sequence[CoderRun]) -> str:
    lines = "\n".join(f"{run.directory.name}  {run.command or NOT_MEASURED}" for run in runs)
    return f'<pre class="block">{escape(lines)}</pre>'
