"""Figures of a decomposition: importances of one-hot inputs, components, histograms. The same numbers give the same bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from theodolite.functional.identity_error import dense_order, identity_order

BLUE, VERMILION = "#0b5cad", "#d55e00"


def component_orders(importances: Mapping[str, Tensor], dense: Mapping[str, bool]) -> dict[str, Tensor]:
    """Order of components by module: towards the identity, or by use where ``dense``."""
    return {name: dense_order(g) if dense.get(name, False) else identity_order(g) for name, g in importances.items()}


def draw_importances(importances: Mapping[str, Tensor], orders: Mapping[str, Tensor]) -> bytes:
    """Permuted causal importances of one-hot inputs (features, C), one heat map per module (PNG)."""

    def draw(axes: Axes, name: str) -> None:
        matrix = importances[name][:, orders[name]]
        image = axes.imshow(matrix.tolist(), vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest")
        axes.set(title=name, xlabel="component (permuted)", ylabel="active feature")
        _whole_ticks(axes, "both")
        axes.figure.colorbar(image, ax=axes, label="causal importance", shrink=0.85)

    return _panels(list(importances), draw)


def draw_components(matrices: Mapping[str, tuple[Tensor, Tensor]], orders: Mapping[str, Tensor], most: int = 40) -> bytes:
    """V and U of each module in the order of its importances, the first ``most`` components (PNG)."""
    keys = [f"{name} {side}" for name in matrices for side in ("V", "U")]

    def draw(axes: Axes, key: str) -> None:
        name, side = key.rsplit(" ", 1)
        chosen = orders[name][:most]
        matrix = matrices[name][0][:, chosen] if side == "V" else matrices[name][1][chosen].T
        bound = float(matrix.abs().max()) or 1.0
        image = axes.imshow(matrix.tolist(), vmin=-bound, vmax=bound, cmap="RdBu", aspect="auto", interpolation="nearest")
        axes.set(title=f"{side} of {name}", xlabel="component (permuted)", ylabel="input" if side == "V" else "output")
        _whole_ticks(axes, "both")
        axes.figure.colorbar(image, ax=axes, label="weight", shrink=0.85)

    return _panels(keys, draw)


def draw_histograms(counts: Mapping[str, Tensor], low: float, high: float, label: str) -> bytes:
    """Histograms with a logarithmic count axis, from counts in equal bins between ``low`` and ``high``, one panel per module (PNG)."""

    def draw(axes: Axes, name: str) -> None:
        bins = counts[name].tolist()
        width = (high - low) / len(bins)
        axes.bar([low + (i + 0.5) * width for i in range(len(bins))], bins, width=width, color=BLUE)
        axes.set_yscale("symlog")
        axes.set(title=name, xlabel=label, ylabel="(position, component) pairs")

    return _panels(list(counts), draw)


def draw_mean_importances(means: Mapping[str, Tensor]) -> bytes:
    """Mean causal importance of each component, sorted, on a linear and a logarithmic axis per module (PNG)."""
    keys = [f"{name} {axis}" for name in means for axis in ("linear", "logarithmic")]

    def draw(axes: Axes, key: str) -> None:
        name, axis = key.rsplit(" ", 1)
        values = means[name].sort(descending=True).values
        axes.plot(values.clamp_min(1e-8).tolist() if axis == "logarithmic" else values.tolist(), ".-", color=BLUE)
        axes.set(title=f"{name} ({axis})", xlabel="component (sorted)", ylabel="mean causal importance")
        _whole_ticks(axes, "x")
        if axis == "logarithmic":
            axes.set_yscale("log")

    return _panels(keys, draw)


def draw_attacks(curves: Mapping[str, Mapping[int, float]]) -> bytes:
    """Loss under attack against the number of steps, one line per attack (PNG)."""
    with _style():
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        assert isinstance(axes, Axes)
        colours = [BLUE, "#009e73", VERMILION, "#cc79a7", "#e69f00", "#56b4e9"]
        for index, (label, curve) in enumerate(curves.items()):
            dashed = label.startswith("averaged")
            style = {"marker": "x" if dashed else "o", "linestyle": "--" if dashed else "-", "zorder": 3 if dashed else 2}
            axes.plot(list(curve), list(curve.values()), color=colours[index % len(colours)], label=label, **style)
        axes.set(xlabel="steps of the attack", ylabel="reconstruction loss", title="Attacks over different batches")
        axes.set_xscale("symlog", linthresh=1)
        steps = sorted({step for curve in curves.values() for step in curve})
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        return _png(figure)


def histogram(values: Tensor, low: float, high: float, bins: int = 50) -> Tensor:
    """Counts in equal bins; what lies outside goes to the outermost ones."""
    return torch.histc(values.detach().to(torch.float32).clamp(low, high), bins=bins, min=low, max=high).cpu()


def _whole_ticks(axes: Axes, which: str) -> None:
    for axis in [axes.xaxis, axes.yaxis][: 1 if which == "x" else 2]:
        axis.set_major_locator(MaxNLocator(integer=True))


def _panels(names: list[str], draw: Callable[[Axes, str], None]) -> bytes:
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    with _style():
        figure = Figure(figsize=(5.6 * columns, 3.6 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, name in zip(grid.flat, names, strict=False):
            draw(axes, name)
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib's defaults plus ours: nobody's matplotlibrc changes the bytes."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left"})
        yield
