"""The page of a comparison of transcoders: figures, tables, differences in words, commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import floor, log10
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from theodolite.functional.statistics import Spread, spread
from theodolite.reports.arms import ArmStyle, arm_styles
from theodolite.reports.compare_transcoders import MEASURES, CoderRun, arms_of
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
    styles = styles_of(runs)
    for place, (arm, style) in enumerate(styles.items(), 1):
        points = [(end, value) for run in runs if run.arm == arm for end, value in run.prefixes.items()]
        _means_and_points(axes, points, style, theme, len(styles) - place)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(size) for size in sizes])
    _fvu_axis(axes)
    axes.set_title("Held-out FVU by prefix" + (", mean of layers" if len({run.layer for run in runs}) > 1 else ""))
    axes.set_xlabel("latents (prefix)")


def draw_training(axes: Axes, runs: Sequence[CoderRun], theme: Theme) -> None:
    """FVU of training batches against step."""
    for arm, style in styles_of(runs).items():
        for run in runs:
            if run.arm == arm:
                colour, dashes = _line_style(style, theme)
                axes.plot(list(run.curve), list(run.curve.values()), color=colour, linewidth=1.0, linestyle=dashes)
    _fvu_axis(axes)
    axes.set_title("FVU of training batches (all latents)")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_layers(axes: Axes, runs: Sequence[CoderRun], theme: Theme) -> None:
    """FVU of all latents against layer; a point per run, a line through the means."""
    layers, styles = sorted({run.layer for run in runs}), styles_of(runs)
    for place, (arm, style) in enumerate(styles.items(), 1):
        _means_and_points(axes, [(run.layer, run.values["fvu"]) for run in runs if run.arm == arm], style, theme, len(styles) - place)
    axes.xaxis.set_major_locator(FixedLocator(layers))
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    _fvu_axis(axes)
    axes.set_title("Held-out FVU by layer (all latents)")
    axes.set_xlabel("layer")


def _means_and_points(axes: Axes, points: Sequence[tuple[int, float]], style: ArmStyle, theme: Theme, above: int) -> None:
    """Points, and a line through their means: thicker the more lines are drawn ``above`` it, so that lines on one another all show."""
    colour, dashes = _line_style(style, theme)
    means = {x: sum(near) / len(near) for x in sorted({x for x, _ in points}) for near in [[y for other, y in points if other == x]]}
    axes.plot(list(means), list(means.values()), color=colour, linewidth=min(4.6, 1.3 + 1.1 * above), linestyle=dashes, zorder=3)
    axes.scatter(*zip(*points, strict=True), s=24, color=colour, marker=style.marker, alpha=0.7, linewidths=0, zorder=4)


def _line_style(style: ArmStyle, theme: Theme) -> tuple[str, str]:
    return style.light if theme == "light" else style.dark, "--" if style.control else "-"


def _fvu_axis(axes: Axes) -> None:
    """Logarithmic: small differences between good coders are what is looked for."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("FVU")


PANELS: dict[str, tuple[Callable[[Axes, Sequence[CoderRun], Theme], None], str]] = {
    "prefixes": (draw_prefixes, "Held-out FVU against the number of latents, one line per arm"),
    "training": (draw_training, "FVU of training batches against step, one line per run"),
    "layers": (draw_layers, "Held-out FVU of all latents against layer, one line per arm"),
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
            f'<h1>{TITLE}</h1>\n<p class="sub">{len(runs)} runs of {len(styles)} arms. Language model: {inline(_models(runs))}</p>\n',
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
    return ", ".join(f"`{name}`" for name in dict.fromkeys(run.model.rstrip("/").rpartition("/")[2] for run in runs))


def _differences(summary: dict[str, Any]) -> str:
    names = {"fvu": "FVU", "fvu_mean": "mean FVU over prefixes", "ce_recovered": "share of cross-entropy recovered"}
    items = [_sentence(item, names[item["measure"]]) for item in summary["comparisons"] if item["mean"] is not None]
    note = "Paired by seed and layer, with 95 % t intervals, not corrected for their number; one that contains zero is unresolved."
    return f'<p class="small">{note}</p>\n<ul>{"".join(f"<li>{inline(item)}</li>" for item in items)}</ul>' if items else "<p>One arm.</p>"


def _sentence(item: dict[str, Any], name: str) -> str:
    start = f"`{item['arm']}` against `{item['against']}`, {name}: {_signed(item['mean'])}"
    if item["low"] is None:
        return f"{start} (one pair, no interval)."
    verdict = "unresolved" if item["low"] <= 0 <= item["high"] else "higher" if item["mean"] > 0 else "lower"
    return f"{start} [{_signed(item['low'])}, {_signed(item['high'])}], n={item['n']} pairs: {verdict}."


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def _figures(runs: Sequence[CoderRun], styles: dict[str, ArmStyle]) -> str:
    legend = "".join(f"<li>{swatch(arm, style)}{escape(arm)}</li>" for arm, style in styles.items())
    pictures = "\n".join(_picture(runs, name) for name in _panels(runs))
    return f'<ul class="legend">{legend}</ul>\n<figure><div class="panels">\n{pictures}\n</div>{_caption(runs)}</figure>'


def _caption(runs: Sequence[CoderRun]) -> str:
    seeds = {arm: sum(run.arm == arm for run in runs) for arm in arms_of(runs)}
    counts = ", ".join(f"{arm} {n}" for arm, n in seeds.items())
    text = f"Held-out: lines are means over runs, a point is a run ({counts}). Training: a line is a run. FVU axes are logarithmic."
    return f"<figcaption>{escape(text)}</figcaption>"


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
    note = '<p class="small">Held-out FVU of the first so many latents, mean ± sample standard deviation over runs.</p>'
    return note + table(["Arm", *(f"{end} latents" for end in ends)], _rows(runs, styles, [f"fvu_{end}" for end in ends]))


def _numbers(runs: Sequence[CoderRun], styles: dict[str, ArmStyle]) -> str:
    stand_in = [run.directory.name for run in runs if run.stage != "test"]
    remark = f"<p>Validation numbers stand in for: {inline(', '.join(stand_in))}.</p>" if stand_in else ""
    note = "Mean ± sample standard deviation over seeds. FVU: 0 is perfect, 1 is the mean. CE recovered: 1 is lossless, 0 is no MLP at all."
    return f'<p class="small">{note}</p>{table(["Arm", *MEASURES.values()], _rows(runs, styles, list(MEASURES)))}{remark}'


def _rows(runs: Sequence[CoderRun], styles: dict[str, ArmStyle], names: Sequence[str]) -> list[str]:
    """A row for every arm and pair of sites: a mean over layers would mean nothing."""
    rows: list[str] = []
    for arm, style in styles.items():
        for sites in dict.fromkeys(run.sites for run in runs if run.arm == arm):
            chosen = [run for run in runs if (run.arm, run.sites) == (arm, sites)]
            small = "".join(f"<small>{escape(line)}</small>" for line in (" → ".join(sites), f"n={len(chosen)}"))
            values = "".join(_value(spread([run.values.get(name) for run in chosen])) for name in names)
            rows.append(f'<tr><th scope="row">{arm_name(arm, style)}{small}</th>{values}</tr>')
    return rows


def _value(value: Spread) -> str:
    """Mean and deviation with as many decimals as the deviation has something to say about, at most four."""
    if value.mean is None:
        return cell(NOT_MEASURED)
    if not value.sd:
        return cell(f"{value.mean:.4g}" + (" ± 0" if value.sd == 0 else ""))
    decimals = min(4, max(0, 1 - floor(log10(value.sd))))
    return cell(f"{value.mean:.{decimals}f} ± {value.sd:.{decimals}f}")


def _commands(runs: Sequence[CoderRun]) -> str:
    lines = "\n".join(f"{run.directory.name}  {run.command or NOT_MEASURED}" for run in runs)
    return f'<pre class="block">{escape(lines)}</pre>'
