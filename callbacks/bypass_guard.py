"""Finds optimizer steps that went past a callback which must see every one of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


class BypassGuard:
    """Notices optimizer steps that ``on_before_optimizer_step`` never saw.

    Two ways past the hook are known: an optimizer that ignores its closure (steps are counted, the hook does not fire), and manual
    optimisation with ``self.optimizers(use_pl_optimizer=False)`` (nothing is counted, but the parameters' version counters move).
    """

    def __init__(self) -> None:
        self.reached = False
        self._batches = 0
        self._steps, self._firings, self._versions = 0, 0, 0

    def begin_fit(self) -> None:
        """Forget earlier fits."""
        self.reached, self._batches = False, 0

    def begin_batch(self, steps: int, firings: int, watched: Mapping[str, nn.Parameter]) -> None:
        """Remember where the counters stand."""
        self._steps, self._firings, self._versions = steps, firings, _versions(watched)

    def end_batch(self, steps: int, firings: int, watched: Mapping[str, nn.Parameter]) -> None:
        """Raise ``RuntimeError`` if an optimizer stepped unseen."""
        self._batches += 1
        unseen = (steps - self._steps) - (firings - self._firings)
        if unseen > 0:
            raise RuntimeError(
                f"{unseen} optimizer step(s) bypassed GradientProjectionCallback: the optimizer ignores the closure that it is given; "
                "call it in step(closure)."
            )
        if not self.reached and firings == self._firings and _versions(watched) != self._versions:
            raise RuntimeError(
                "Parameters changed without GradientProjectionCallback: the module steps a raw optimizer; use self.optimizers() without "
                "use_pl_optimizer=False."
            )

    def end_fit(self) -> None:
        """Raise ``RuntimeError`` if no step was seen in a fit that had batches."""
        if self._batches > 0 and not self.reached:
            raise RuntimeError(
                f"GradientProjectionCallback saw no optimizer step on its parameters in {self._batches} batches: nothing was projected; "
                "step with self.optimizers() and without use_pl_optimizer=False."
            )


def _versions(watched: Mapping[str, nn.Parameter]) -> int:
    """Sum of the counters that every in-place change of a tensor raises."""
    return sum(parameter._version for parameter in watched.values())
