"""Imports torchmetrics without what it imports for plots and for speech: a run of the command line needs neither.

``import torchmetrics``, and with it ``import lightning``, brings matplotlib, for ``Metric.plot``, and ``scipy.signal``, to add one alias
for a package that measures speech. Here stand-ins take their places while torchmetrics is imported. Plots work as ever: matplotlib is
imported by the first one. The alias, ``scipy.signal.hamming`` for ``scipy.signal.windows.hamming``, is not made.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

PYPLOT = "matplotlib.pyplot"


class StandIn(ModuleType):
    """A module that is imported when something else is asked of it than what is known beforehand.

    Args:
        name: Of the module.
        known: What it answers without being imported.
    """

    def __init__(self, name: str, **known: Any) -> None:
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None), []
        self.known = known

    def __getattr__(self, name: str) -> Any:
        """What is known, or the module's own."""
        if name in self.known:
            return self.known[name]
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        _make_way()
        return getattr(importlib.import_module(self.__name__), name)


def import_torchmetrics() -> None:
    """Import torchmetrics; a library that is imported already stays as it is."""
    if "torchmetrics" in sys.modules:
        return
    places = [stand_in for stand_in in _stand_ins() if stand_in.__name__ not in sys.modules]
    sys.modules.update({stand_in.__name__: stand_in for stand_in in places})
    try:
        importlib.import_module("torchmetrics")
    finally:
        _make_way()
        for stand_in in places:
            stand_in.known.clear()


def _stand_ins() -> list[StandIn]:
    """Those of all modules that would be imported in vain, with what torchmetrics asks of them at once: types for its annotations."""
    signal = [StandIn("scipy.signal", hamming=None)]
    if "matplotlib" in sys.modules:
        return signal
    axes, colors = StandIn("matplotlib.axes", Axes=object), StandIn("matplotlib.colors", Colormap=object)
    pyplot = StandIn(PYPLOT, Figure=object, style=SimpleNamespace(context=_style))
    return [*signal, axes, colors, pyplot, StandIn("matplotlib", axes=axes, colors=colors, pyplot=pyplot)]


@contextmanager
def _style(*arguments: Any, **keywords: Any) -> Iterator[None]:
    with importlib.import_module(PYPLOT).style.context(*arguments, **keywords):
        yield


def _make_way() -> None:
    """Leave the places to the modules themselves."""
    for name in [name for name, module in sys.modules.items() if isinstance(module, StandIn)]:
        del sys.modules[name]
