"""FVU of some rows together with how many came and how many counted: what a callback keeps of a window or a pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from theodolite.distributed import sum_over_ranks, world_size

from .fvu import FractionOfVarianceUnexplained


class CountedFvu:
    """Sums of one window or pass. It is no submodule of anything, so nothing casts it to 16 bits.

    Args:
        groups: Names of the reconstructions, as in :class:`FractionOfVarianceUnexplained`.

    Attributes:
        metric: The FVU.
        seen: (2,) float64: rows that came, rows that counted, on this rank.
    """

    def __init__(self, groups: list[str] | None = None) -> None:
        self.groups = groups
        self.metric = FractionOfVarianceUnexplained(groups=groups)
        self.metric.persistent(True)
        self.seen = torch.zeros(2, dtype=torch.float64)

    def to(self, device: torch.device) -> CountedFvu:
        """Move the sums; MPS has no float64, so there they stay on the CPU."""
        self.metric.to("cpu" if device.type == "mps" else device)
        return self

    def reset(self) -> None:
        """Forget everything."""
        self.metric.reset()
        self.seen.zero_()

    def add(self, target: Tensor, reconstruction: Tensor, mask: Tensor) -> None:
        """Add a batch; ``mask`` (...) says which rows count."""
        self.seen += torch.tensor([mask.numel(), int(mask.sum())])
        self.metric.update(target.detach(), reconstruction.detach(), mask)

    def values(self) -> dict[str, Tensor]:
        """Named scalars over all ranks; all of them must call it.

        ``fvu`` (and those of the groups), ``fvu_median`` of the rows' own ratios, ``fvu_dropped`` the share of rows that did not count.
        """
        values, median = self.metric.compute(), self.metric.median()
        named = {"fvu": values} if self.groups is None else dict(values)
        came, kept = self._seen_by_all().tolist()
        named["fvu_median"] = median if self.groups is None else median[-1]
        named["fvu_dropped"] = torch.tensor(1 - kept / came if came else torch.nan, dtype=torch.float64, device=self.metric.device)
        return named

    def joined_state(self) -> dict[str, Any]:
        """The rows of all ranks as tensors; all ranks must call it."""
        several = world_size() > 1
        with self.metric.sync_context(should_sync=several, should_unsync=several):
            sums = {key: value.cpu() for key, value in self.metric.state_dict().items()}
        return {"sums": sums, "seen": self._seen_by_all().cpu()}

    def load(self, state: dict[str, Any]) -> None:
        """Take :meth:`joined_state` back; on one rank only, or its rows would count several times."""
        self.metric.load_state_dict(state["sums"])
        self.seen = state["seen"].clone()

    def _seen_by_all(self) -> Tensor:
        return sum_over_ranks(self.seen.clone().to(self.metric.device))
