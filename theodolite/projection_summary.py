"""What is logged of a projected step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from theodolite.distributed import gather_objects
from theodolite.projector import StepStats


class PartShares:
    """Credits the component of a gradient to the named parts that were added to it one after the other."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a new gradient."""
        self._parts: dict[str, float] = {}
        self._last = 0.0

    def credit(self, part: str, component: float) -> None:
        """The gradient's component is ``component`` after ``part`` has been added: components are linear in the gradient."""
        self._parts[part] = self._parts.get(part, 0.0) + component - self._last
        self._last = component

    def metrics(self, stats: StepStats) -> dict[str, float]:
        """``part/<name>/cos``: each part's share over all ranks, in units in which the shares add up to ``global_cos``; resets."""
        totals: dict[str, float] = {}
        for parts in gather_objects(self._parts):
            for part, component in parts.items():
                totals[part] = totals.get(part, 0.0) + component
        self.reset()
        if not stats:
            return {}
        norms = stats.column("norm")
        scale = len(stats) ** 0.5 * float(torch.linalg.vector_norm(norms).clamp_min(1e-30))
        return {f"part/{part}/cos": component / scale for part, component in totals.items()}


def summarise(stats: StepStats, null_shares: Mapping[str, float], gate_halves: bool) -> dict[str, Tensor]:
    """What is logged of one step: means over the projected matrices, and cosines of all of them as one vector.

    Args:
        stats: By parameter name.
        null_shares: :meth:`Projector.null_shares`.
        gate_halves: The gate is one-sided, so that half of a random gradient's components stay outside.

    Returns:
        ``cos_before``, ``cos_after``, ``removed_fraction``, ``fired_fraction``, ``cin``, ``cin_after`` (means), ``cin_null`` (root mean
        square for random gradients of these shapes), ``global_cos`` and ``global_cin`` (before the projection).
    """
    if not stats:
        return {}
    columns = {"cos_before": "cos_before", "cos_after": "cos_after", "removed_fraction": "removed_fraction", "fired_fraction": "fired"}
    columns |= {"cin": "cin", "cin_after": "cin_after"}
    result = {key: stats.column(field).mean() for key, field in columns.items()}
    norms = stats.column("norm")
    whole = torch.linalg.vector_norm(norms).clamp_min(1e-30)
    result["global_cos"] = stats.column("component").sum() / (len(stats) ** 0.5 * whole)
    result["global_cin"] = torch.linalg.vector_norm(stats.column("cin") * norms) / whole
    shares = [null_shares[name] for name in stats] if "" not in stats else [_flattened_share(null_shares)]
    result["cin_null"] = torch.tensor((sum(shares) / len(shares) / (2 if gate_halves else 1)) ** 0.5)
    return result


def per_module(stats: StepStats) -> dict[str, Tensor]:
    """``<module>/<field>`` for the scalar fields of every parameter's statistics."""
    wanted = ("cos_before", "cos_after", "cin", "removed_fraction")
    return {f"{name.removesuffix('.weight')}/{field}": getattr(one, field).float() for name, one in stats.items() for field in wanted}


def _flattened_share(null_shares: Mapping[str, float]) -> float:
    """``k / n_total`` from ``k / n_p``: rows are shared, dimensions add up."""
    return 1 / sum(1 / share for share in null_shares.values())
