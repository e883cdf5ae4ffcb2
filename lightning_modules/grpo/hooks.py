"""Calls the window hooks of callbacks; see ``theodolite.protocols.WindowHooks``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from theodolite.protocols import OracleWindow, Verdict, Window


def oracle_users(callbacks: Sequence[Any]) -> list[str]:
    """Class names of the callbacks that asked for the oracle's labels by name (``uses_oracle = True``)."""
    return [type(callback).__name__ for callback in callbacks if getattr(callback, "uses_oracle", False)]


def call_window_hook(name: str, trainer: Any, module: Any, window: Window, verdicts: Sequence[Verdict], *extra: Any) -> None:
    """Call hook ``name`` on every callback that defines it, in the trainer's order.

    Only a callback that declares ``uses_oracle = True`` is handed the verdicts; for all others the window has none to look at.
    """
    for callback in trainer.callbacks:
        hook = getattr(callback, name, None)
        if hook is None:
            continue
        if getattr(callback, "uses_oracle", False):
            view = OracleWindow(**{f.name: getattr(window, f.name) for f in fields(Window)}, verdicts=list(verdicts))
            hook(trainer, module, view, *extra)
            for f in fields(Window):
                setattr(window, f.name, getattr(view, f.name))
        else:
            hook(trainer, module, window, *extra)


def wants_parts(callbacks: Sequence[Any]) -> bool:
    """Whether a callback wants to see every gradient part before the parts are added."""
    return any(hasattr(callback, "on_part_gradients") for callback in callbacks)


def measures_parts(callbacks: Sequence[Any]) -> bool:
    """Whether a callback looks at the gradient after every microbatch; one with ``measure_parts = False`` says that it does not."""
    return any(hasattr(callback, "on_microbatch_gradients") and getattr(callback, "measure_parts", True) for callback in callbacks)
