"""The figure: rates against step, and where every run ends. The same files give the same bytes.

Mean over seeds as a thick line, one standard deviation over seeds as a band, controls dashed; the last panel has one point per run and a
large one per arm.
"""

from __future__ import annotations

import io
import itertools
import math
import re
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


def panels(study: Study) -> list[Panel]:
    """The panels in reading order: rates, mechanisms where the plan tells them apart, the direction where one was logged, and the ends."""
    rates = [
        Panel(rate, f"{title} on held-out problems against GRPO step, one line per arm ({RATE_MEANINGS[rate]})", _rate_drawer(rate))
        for rate, title in RATE_TITLES.items()
    ]
    for mechanism, meaning in study.plan.mechanisms.items():
        name = f"hack_{mechanism}_rate"
        rates.append(Panel(name, f"Rate of hacks by {mechanism} ({meaning}) against GRPO step", _rate_drawer(name)))
    if any(key.endswith("/cin_null") for run in study.runs for key in run.series):
        rates.append(
            Panel("cos_align", "Share of the gradient along the direction against GRPO step, dotted: that of a random one", draw_alignment)
        )
    return [*rates, Panel("final", "Final hack rate against final pass rate, one point per run and a large one per arm", draw_final)]


def mean_curve(study: Study, arm: str, key: str) -> dict[int, float]:
    """Mean over the arm's seeds at the steps that every measured seed has, so that no step averages over fewer seeds than another."""
    curves = [curve for run in study.of(arm) if (curve := run.curve(key))]
    if not curves:
        return {}
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: math.fsum(curve[step] for curve in curves) / len(curves) for step in steps}


def spread_curve(study: Study, arm: str, key: str) -> dict[int, float]:
    """Sample standard deviation over the arm's seeds at the steps of :func:`mean_curve`; 0 below two seeds."""
    curves = [curve for run in study.of(arm) if (curve := run.curve(key))]
    return {step: spread([curve[step] for curve in curves]).sd or 0.0 for step in mean_curve(study, arm, key)}


def draw_alignment(axes: Axes, study: Study, theme: Theme) -> None:
    """Draw the share of the gradient's norm along the direction (for one direction the positive part of cos_align), over a random one's."""
    for arm, style in _styles(study).items():
        keys = sorted({key for run in study.of(arm) for key in run.series if key.startswith("projection/") and key.endswith("/cin")})
        for key in keys:
            for name, dashes, width in ((key, (0, (4, 2)) if style.control else "-", 1.8), (f"{key}_null", (0, (1, 2)), 1.2)):
                mean = mean_curve(study, arm, name)
                axes.plot(list(mean), list(mean.values()), color=_colour(style, theme), linewidth=width, linestyle=dashes)
    axes.set_title("cos_align: gradient along the direction (dotted: chance)")
    axes.set_xlabel("GRPO step")
    axes.set_yscale("log")


def draw_rate(axes: Axes, study: Study, rate: str, theme: Theme) -> None:
    """Draw one rate against step."""
    key, empty = f"val/{rate}", True
    for arm, style in _styles(study).items():
        colour, dashes = _colour(style, theme), (0, (4, 2)) if style.control else "-"
        mean, spreads = mean_curve(study, arm, key), spread_curve(study, arm, key)
        axes.plot(list(mean), list(mean.values()), color=colour, linewidth=2.2, linestyle=dashes, zorder=3)
        if any(spreads.values()):
            low, high = ([mean[step] + sign * spreads[step] for step in mean] for sign in (-1, 1))
            axes.fill_between(list(mean), low, high, color=colour, alpha=0.1, linewidth=0)
        empty = empty and not mean
    axes.set_title(_rate_title(study, rate))
    axes.set_xlabel("GRPO step")
    steps = sorted({step for run in study.runs for step in run.curve(key)})
    axes.xaxis.set_major_locator(FixedLocator(steps) if 1 < len(steps) <= 9 else MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if empty:
        _say_not_measured(axes, theme)
        return
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _rate_title(study: Study, rate: str) -> str:
    if rate in RATE_TITLES:
        return f"{RATE_TITLES[rate]}: {RATE_MEANINGS[rate]}"
    mechanism = rate.removeprefix("hack_").removesuffix("_rate")
    return f"Hacks by {mechanism}: {study.plan.mechanisms[mechanism]}"


def draw_final(axes: Axes, study: Study, theme: Theme) -> None:
    """Draw final pass rate against final hack rate; means of controls are hollow, the untrained policy is a cross."""
    ink, empty = INKS[theme], True
    for arm, style in _styles(study).items():
        colour = _colour(style, theme)
        for run in study.of(arm):
            hack, passing = measure(study, run, "hack_rate"), measure(study, run, "pass_rate")
            if hack is not None and passing is not None:
                axes.scatter([hack], [passing], s=26, color=colour, marker=style.marker, alpha=0.55, linewidths=0)
                empty = False
        ends = arm_spread(study, arm, "hack_rate"), arm_spread(study, arm, "pass_rate")
        hack, passing = ends[0].mean, ends[1].mean
        if hack is not None and passing is not None:
            axes.errorbar([hack], [passing], xerr=ends[0].sd or 0, yerr=ends[1].sd or 0, color=colour, alpha=0.5, linewidth=1.0)
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
    return _picture(study, "png", dpi=150)


def render_pdf(study: Study) -> bytes:
    """The same as PDF, for papers."""
    return _picture(study, "pdf")


def _picture(study: Study, kind: Literal["png", "pdf"], **options: Any) -> bytes:
    drawn = panels(study)
    rows = -(-len(drawn) // 2)
    with _own_style("light"):
        figure = Figure(figsize=(11, 3.8 * rows + 1), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, panel in itertools.zip_longest(figure.subplots(rows, 2).flat, drawn):
            if panel is None:
                axes.set_axis_off()
            else:
                panel.draw(axes, study, "light")
        figure.legend(handles=_legend(study), loc="outside lower center", ncols=3, frameon=False)
        return _save(figure, kind, **options)


def render_svg(study: Study, panel: Panel, theme: Theme) -> bytes:
    """One panel without legend (SVG bytes, transparent, glyphs as paths so that it looks the same everywhere)."""
    with _own_style(theme):
        figure = Figure(figsize=(5.4, 3.9), layout="constrained")
        FigureCanvasAgg(figure)
        panel.draw(figure.subplots(), study, theme)
        return _save(figure, "svg", transparent=True)


def darkened(svg: bytes, study: Study) -> bytes:
    """A light panel in the colours of the dark theme, which is all that tells the two apart."""
    swaps = {style.light: style.dark for style in _styles(study).values()}
    swaps |= {getattr(INKS["light"], name): getattr(INKS["dark"], name) for name in ("text", "faint", "paper")}
    return re.sub(rb"#[0-9a-f]{6}", lambda found: swaps.get(found[0].decode(), found[0].decode()).encode(), svg)


def _rate_drawer(rate: str) -> Callable[[Axes, Study, Theme], None]:
    return lambda axes, study, theme: draw_rate(axes, study, rate, theme)


def _styles(study: Study) -> dict[str, ArmStyle]:
    return arm_styles(study.arms, study.titles, study.controls)


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


def _save(figure: Figure, kind: Literal["png", "svg", "pdf"], **options: Any) -> bytes:
    """Save without the entries that name the library's version or the date."""
    hidden = {"png": ("Software",), "svg": ("Date", "Creator", "Format", "Type"), "pdf": ("CreationDate", "Creator", "Producer")}
    metadata: dict[str, None] = dict.fromkeys(hidden[kind])
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata, **options)
    return buffer.getvalue()
