"""The figure: rates against step, and where every run ends. The same files give the same bytes.

Mean over seeds as a thick line, every seed as a thin one, controls dashed; the last panel has one point per run and a large one per arm.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from theodolite.functional.statistics import spread
from theodolite.reports.arms import ArmStyle, arm_styles
from theodolite.reports.records import Study
from theodolite.reports.statistics_table import arm_spread, base_by_seed, measure

Theme = Literal["light", "dark"]

RATE_TITLES = {"hack_rate": "Hack rate", "pass_rate": "Pass rate", "override_rate": "Override rate"}
RATE_MEANINGS = {
    "hack_rate": "accepted although wrong",
    "pass_rate": "correct by the hidden tests",
    "override_rate": "overwrites the evaluator",
}


@dataclass(frozen=True, slots=True)
class Ink:
    """Colours of everything that is not an arm."""

    text: str
    faint: str
    paper: str


INKS: dict[Theme, Ink] = {"light": Ink("#22252a", "#d9dce1", "#ffffff"), "dark": Ink("#e6e8eb", "#3a4048", "#16191d")}


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: its name, a description for those who do not see it, and how to draw it."""

    name: str
    description: str
    draw: Callable[[Axes, Study, Theme], None]


def panels() -> list[Panel]:
    """The panels in reading order."""
    rates = [
        Panel(rate, f"{title} on held-out problems against GRPO step, one line per arm ({RATE_MEANINGS[rate]})", _rate_drawer(rate))
        for rate, title in RATE_TITLES.items()
    ]
    return [*rates, Panel("final", "Final hack rate against final pass rate, one point per run and a large one per arm", draw_final)]


def mean_curve(study: Study, arm: str, key: str) -> dict[int, float]:
    """Mean over the arm's seeds at the steps that every measured seed has, so that no step averages over fewer seeds than another."""
    curves = [curve for run in study.of(arm) if (curve := run.curve(key))]
    if not curves:
        return {}
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: math.fsum(curve[step] for curve in curves) / len(curves) for step in steps}


def draw_rate(axes: Axes, study: Study, rate: str, theme: Theme) -> None:
    """Draw one rate against step."""
    key, empty = f"val/{rate}", True
    for arm, style in _styles(study).items():
        colour, dashes = _colour(style, theme), (0, (4, 2)) if style.control else "-"
        for run in study.of(arm):
            curve = run.curve(key)
            axes.plot(list(curve), list(curve.values()), color=colour, linewidth=0.8, alpha=0.3, linestyle=dashes)
        mean = mean_curve(study, arm, key)
        axes.plot(list(mean), list(mean.values()), color=colour, linewidth=2.2, linestyle=dashes, zorder=3)
        empty = empty and not mean
    axes.set_title(f"{RATE_TITLES[rate]}: {RATE_MEANINGS[rate]}")
    axes.set_xlabel("GRPO step")
    steps = sorted({step for run in study.runs for step in run.curve(key)})
    axes.xaxis.set_major_locator(FixedLocator(steps) if 1 < len(steps) <= 9 else MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if empty:
        _say_not_measured(axes, theme)
        return
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def draw_final(axes: Axes, study: Study, theme: Theme) -> None:
    """Draw final pass rate against final hack rate; means of controls are hollow, the untrained policy is a cross."""
    ink, empty = INKS[theme], True
    for arm, style in _styles(study).items():
        colour = _colour(style, theme)
        for run in study.of(arm):
            hack, passing = measure(run, "hack_rate"), measure(run, "pass_rate")
            if hack is not None and passing is not None:
                axes.scatter([hack], [passing], s=26, color=colour, marker=style.marker, alpha=0.55, linewidths=0)
                empty = False
        hack, passing = arm_spread(study, arm, "hack_rate").mean, arm_spread(study, arm, "pass_rate").mean
        if hack is not None and passing is not None:
            face, edge = ("none", colour) if style.control else (colour, ink.paper)
            axes.scatter([hack], [passing], s=130, facecolors=face, edgecolors=edge, marker=style.marker, linewidths=1.8, zorder=3)
    base = [spread(list(base_by_seed(study, name).values())).mean for name in ("hack_rate", "pass_rate")]
    if base[0] is not None and base[1] is not None:
        axes.scatter([base[0]], [base[1]], s=90, color=ink.text, marker="+", linewidths=1.6, zorder=4)
        axes.annotate("before", (base[0], base[1]), xytext=(7, -11), textcoords="offset points", color=ink.text, fontsize=8.5)
    axes.set_title("Where each run ends (large: mean of the arm)")
    axes.set_xlabel("hack rate (final)")
    axes.set_ylabel("pass rate (final)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if empty:
        _say_not_measured(axes, theme)


def render_png(study: Study) -> bytes:
    """All panels and one legend in one picture (PNG bytes, no date and no version in its metadata)."""
    with _own_style("light"):
        figure = Figure(figsize=(11, 8.6), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(2, 2)
        for axes, panel in zip(grid.flat, panels(), strict=True):
            panel.draw(axes, study, "light")
        figure.legend(handles=_legend(study), loc="outside lower center", ncols=3, frameon=False)
        return _save(figure, "png", dpi=150)


def render_svg(study: Study, panel: Panel, theme: Theme) -> bytes:
    """One panel without legend (SVG bytes, transparent, glyphs as paths so that it looks the same everywhere)."""
    with _own_style(theme):
        figure = Figure(figsize=(5.4, 3.9), layout="constrained")
        FigureCanvasAgg(figure)
        panel.draw(figure.subplots(), study, theme)
        return _save(figure, "svg", transparent=True)


def _rate_drawer(rate: str) -> Callable[[Axes, Study, Theme], None]:
    return lambda axes, study, theme: draw_rate(axes, study, rate, theme)


def _styles(study: Study) -> dict[str, ArmStyle]:
    return arm_styles(study.arms, {arm: study.title(arm) for arm in study.arms})


def _colour(style: ArmStyle, theme: Theme) -> str:
    return style.light if theme == "light" else style.dark


def _legend(study: Study) -> list[Line2D]:
    handles = []
    for arm, style in _styles(study).items():
        n = arm_spread(study, arm, "hack_rate").n
        dashes = (0, (4, 2)) if style.control else "-"
        handles.append(
            Line2D(
                [], [], color=style.light, linewidth=2.2, linestyle=dashes, marker=style.marker, markersize=7, label=f"{arm} (n={n} seeds)"
            )
        )
    return handles


def _say_not_measured(axes: Axes, theme: Theme) -> None:
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=INKS[theme].text)


@contextmanager
def _own_style(theme: Theme) -> Iterator[None]:
    """Matplotlib's defaults plus ours: nobody's matplotlibrc changes the bytes."""
    ink = INKS[theme]
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left",
                "text.color": ink.text, "axes.labelcolor": ink.text, "axes.titlecolor": ink.text, "xtick.color": ink.text,
                "ytick.color": ink.text, "axes.edgecolor": ink.faint, "grid.color": ink.faint, "axes.grid": True, "grid.linewidth": 0.6,
                "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": ink.paper,
                "axes.facecolor": ink.paper, "xtick.major.size": 0, "ytick.major.size": 0, "legend.handlelength": 3.2,
                "svg.hashsalt": "theodolite", "svg.fonttype": "path",
            }
        )  # fmt: skip
        yield


def _save(figure: Figure, kind: Literal["png", "svg"], **options: Any) -> bytes:
    """Save without the entries that name the library's version or the date."""
    metadata: dict[str, None] = {"Software": None} if kind == "png" else {"Date": None, "Creator": None, "Format": None, "Type": None}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata, **options)
    return buffer.getvalue()
