"""Figures of best-of-K sweeps, from result files: one run with its controls, or several and what they differ by from the first."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from theodolite.reports.best_of_k_differences import Difference
from theodolite.reports.figures import INKS, Theme, _own_style, _save

SELECTED, HELD_OUT = ("#0072b2", "#4ba3dc"), (("#d55e00", "#f0742a"), ("#009e73", "#1fbf92"), ("#cc79a7", "#dc8fb9"))
ENSEMBLE = ("#e69f00", "#e69f00")
RUNS = (SELECTED, *HELD_OUT, ENSEMBLE, ("#7b5cc4", "#a68bea"), ("#56b4e9", "#8fd0f5"))
"""Colours on light and on dark (Okabe and Ito)."""
Result = Mapping[str, Any]


def draw_run(axes: Axes, result: Result, theme: Theme) -> None:
    """One run: selected and held-out curves with bands, the mean of K reconstructions, greedy, and the controls' place below."""
    at, ks, curves = int(theme == "dark"), result["k_values"], result["curves"]
    selecting, held_out = result["run"]["selecting_reconstructor"], result["run"]["held_out_reconstructors"]
    _line(axes, ks, curves[f"best_of_k.{selecting}"]["fve"], SELECTED[at], f"best of K, scored by the one that selects ({selecting})")
    for colour, name in zip(HELD_OUT, held_out, strict=False):
        _line(axes, ks, curves[f"best_of_k.{name}"]["fve"], colour[at], f"same texts, scored by {name} (held out)", "s")
    _line(axes, ks, curves["mean_of_k"]["fve"], ENSEMBLE[at], "mean of K reconstructions", "^", dashes=(0, (4, 2)))
    greedy = curves[f"greedy.{selecting}"]["fve"]["value"][0]
    if greedy is not None:
        axes.axhline(greedy, color=INKS[theme].text, linewidth=1.0, linestyle=(0, (1, 2)), label="greedy text")
    axes.set_title("Variance explained against K")
    _k_axis(axes, ks)


def draw_controls(axes: Axes, result: Result, theme: Theme) -> None:
    """The same selection applied to texts about another document: what choosing alone can do."""
    at, ks, curves = int(theme == "dark"), result["k_values"], result["curves"]
    axes.axhline(0.0, color=INKS[theme].text, linewidth=0.8)
    axes.set_title("Controls: texts about another document")
    if "null" in curves:
        _line(axes, ks, curves["null"]["fve"], RUNS[5][at], "null: best of K of them")
        axes.axhline(curves["shuffled"]["fve"]["value"][0], color=RUNS[6][at], linestyle=(0, (4, 2)), label="shuffled: one greedy text")
    else:
        axes.text(0.5, 0.5, "not measured: one document only", transform=axes.transAxes, ha="center")
    _k_axis(axes, ks)


def draw_runs(axes: Axes, results: Sequence[Result], theme: Theme, held_out: bool) -> None:
    """Several runs, scored by the reconstructor that selects or by the first held-out one; both on one scale."""
    at = int(theme == "dark")
    curves = [_curve_names(result) for result in results]
    shown = [names[held_out] for names in curves if len(names) > held_out]
    for index, (result, names) in enumerate(zip(results, curves, strict=True)):
        if len(names) > held_out:
            colour, marker = RUNS[index % len(RUNS)][at], "os^Dv<>"[index % 7]
            _line(axes, result["k_values"], result["curves"][names[held_out]]["fve"], colour, result["run"]["label"], marker)
    axes.set_title("Scored by a held-out reconstructor" if held_out else "Scored by the reconstructor that selects")
    if not shown:
        axes.text(0.5, 0.5, "no held-out reconstructor", transform=axes.transAxes, ha="center")
    axes.set_ylim(
        *_common_range([result["curves"][name]["fve"] for result, names in zip(results, curves, strict=True) for name in names[:2]])
    )
    _k_axis(axes, results[0]["k_values"])


def draw_differences(axes: Axes, differences: Sequence[Difference], theme: Theme) -> None:
    """FVE of every run minus that of the first, by both reconstructors, with paired bands."""
    at, labels = int(theme == "dark"), list(dict.fromkeys(each.label for each in differences))
    axes.axhline(0.0, color=INKS[theme].text, linewidth=0.8)
    for each in differences:
        index, held_out = labels.index(each.label) + 1, each.role != "selects"
        colour, marker = RUNS[index % len(RUNS)][at], "os^Dv<>"[index % 7]
        values = {"value": each.value, "ci_lower": each.ci_lower, "ci_upper": each.ci_upper}
        label = f"{each.label}, {each.reconstructor} ({'held out' if held_out else 'selects'})"
        _line(axes, each.k_values, values, colour, label, marker, dashes=(0, (4, 2)) if held_out else "-")
    axes.set_title(f"Difference from {differences[0].against}, paired by document")
    _k_axis(axes, differences[0].k_values)
    axes.set_ylabel("difference in FVE")


def panels(results: Sequence[Result], differences: Sequence[Difference] = ()) -> list[tuple[str, Callable[[Axes, Theme], None]]]:
    """What is drawn: an alternative text and a drawer each."""
    if len(results) == 1:
        return [
            ("FVE against K with 95 % bands", lambda axes, theme: draw_run(axes, results[0], theme)),
            ("FVE of the null and shuffled controls against K", lambda axes, theme: draw_controls(axes, results[0], theme)),
        ]
    drawn: list[tuple[str, Callable[[Axes, Theme], None]]] = [
        ("FVE against K by run", lambda axes, theme: draw_runs(axes, results, theme, False)),
        ("FVE against K by run, held-out reconstructor", lambda axes, theme: draw_runs(axes, results, theme, True)),
    ]
    if differences:
        text = "FVE of each run minus that of the first against K, with paired bands"
        drawn.append((text, lambda axes, theme: draw_differences(axes, differences, theme)))
    return drawn


def render(results: Sequence[Result], kind: Literal["png", "pdf"], differences: Sequence[Difference] = ()) -> bytes:
    """All panels side by side, with legends; no date and no version in the file."""
    drawn = panels(results, differences)
    with _own_style("light"):
        figure = Figure(figsize=(6.2 * len(drawn), 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(_size(results[0]), fontsize=9, x=0.995, ha="right")
        for axes, (_, draw) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
            draw(axes, "light")
            _legend(axes)
        if kind == "png":
            return _save(figure, "png", dpi=150)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
        return buffer.getvalue()


def render_svg(draw: Callable[[Axes, Theme], None], theme: Theme) -> bytes:
    """One panel for the page."""
    with _own_style(theme):
        figure = Figure(figsize=(6.2, 4.9), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        draw(axes, theme)
        _legend(axes)
        return _save(figure, "svg", transparent=True)


def _line(
    axes: Axes,
    ks: Sequence[int],
    metric: Mapping[str, Sequence[float | None]],
    colour: str,
    label: str,
    marker: str = "o",
    dashes: Any = "-",
) -> None:
    value, low, high = ([float("nan") if v is None else v for v in metric[key]] for key in ("value", "ci_lower", "ci_upper"))
    axes.plot(ks, value, color=colour, marker=marker, markersize=5, linewidth=1.9, linestyle=dashes, label=label, zorder=3)
    axes.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)


def _curve_names(result: Result) -> list[str]:
    """Curves of the reconstructor that selects and of the first held-out one, if there is one."""
    run = result["run"]
    return [f"best_of_k.{name}" for name in (run["selecting_reconstructor"], *run["held_out_reconstructors"][:1])]


def _common_range(curves: Sequence[Mapping[str, Sequence[float | None]]]) -> tuple[float, float]:
    """Ends of an axis that holds all curves with their bands."""
    known = [value for curve in curves for column in curve.values() for value in column if value is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _k_axis(axes: Axes, ks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(ks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("K (candidates, the best of which is taken)")
    axes.set_ylabel("fraction of variance explained (FVE)")


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8.5)


def _size(result: Result) -> str:
    run = result["run"]
    return f"n={run['rows']} rows, {run['documents']} documents, N={run['candidates']}"
