"""A run imports torchmetrics without matplotlib and scipy.signal, and nothing that torchmetrics offers is lost by it."""

from __future__ import annotations

import subprocess
import sys

LIGHT = "import sys, theodolite.cli; assert not {'matplotlib', 'scipy.signal'} & set(sys.modules), sorted(sys.modules)\n"


def run(source: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_command_line_imports_neither_and_both_are_themselves_when_asked_for() -> None:
    said = run(
        LIGHT + "import torchmetrics, torch, scipy.signal\n"
        "print(scipy.signal.windows.boxcar(2).tolist(), type(scipy.signal).__name__)\n"
        "metric = torchmetrics.MeanMetric(); metric.update(torch.tensor([1.0, 2.0]))\n"
        "figure, axes = metric.plot()\n"
        "import matplotlib, matplotlib.axes, matplotlib.pyplot\n"
        "print(isinstance(figure, matplotlib.pyplot.Figure), isinstance(axes, matplotlib.axes.Axes), matplotlib.__file__ is not None)\n"
        "confusion = torchmetrics.ConfusionMatrix(task='binary'); confusion.update(torch.tensor([1, 0]), torch.tensor([1, 1]))\n"
        "print(type(confusion.plot()[0]) is matplotlib.pyplot.Figure)\n"
    )
    assert said.splitlines() == ["[1.0, 1.0] module", "True True True", "True"]


def test_libraries_that_are_imported_already_stay_as_they_are() -> None:
    said = run(
        "import matplotlib, scipy.signal, sys; from theodolite.light_torchmetrics import import_torchmetrics\n"
        "import_torchmetrics(); import torchmetrics.utilities.plot as plot\n"
        "print(plot.matplotlib is matplotlib, plot.plt is sys.modules['matplotlib.pyplot'], hasattr(scipy.signal, 'hamming'))\n"
        "first = torchmetrics = sys.modules['torchmetrics']; import_torchmetrics(); print(sys.modules['torchmetrics'] is first)\n"
    )
    assert said.splitlines() == ["True True True", "True"]


def test_a_stand_in_that_is_asked_for_more_gives_way_to_the_module() -> None:
    said = run(
        "import sys; from theodolite import light_torchmetrics as light\n"
        "sys.modules.update({each.__name__: each for each in light._stand_ins()})\n"
        "from scipy.signal import find_peaks\n"
        "print(find_peaks([0, 1, 0])[0].tolist(), [name for name, each in sys.modules.items() if isinstance(each, light.StandIn)])\n"
    )
    assert said.splitlines() == ["[1] []"]
