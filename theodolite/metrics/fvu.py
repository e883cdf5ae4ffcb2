"""Fraction of variance unexplained as a torchmetrics metric: exact over batches, ranks and interruptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from theodolite.functional.fvu import (
    FvuSums,
    fvu,
    fvu_per_dimension,
    fvu_per_position,
    fvu_sums,
    matched_rows,
    median_ratio,
    merge_fvu_sums,
    overall_mean,
)
from theodolite.functional.row_sample import NO_KEY, sample_keys
from theodolite.metrics.joining import join_sample, join_sums, largest_shape, summed

_SUMS = ("fvu_count", "fvu_mean", "fvu_scatter", "fvu_residual")
_SAMPLE = ("fvu_sample_key", "fvu_sample_target", "fvu_sample_error")


class FractionOfVarianceUnexplained(Metric):
    r"""Streaming FVU, :math:`\sum \lVert y - \hat y\rVert^2 / \sum \lVert y - \bar y\rVert^2` with the mean of the whole data set.

    See :mod:`theodolite.functional.fvu` for the arithmetic. States are float64 whatever becomes of the module that holds the metric, and
    ranks are joined by additive reduces, so any number of ranks with any number of rows, also none, gives the same value.

    ``compute()`` is a scalar; with ``groups`` it is a dict ``fvu`` (of the last group, the whole reconstruction), ``fvu_min``,
    ``fvu_max``, ``fvu_mean`` and ``fvu_<group>``.

    Args:
        groups: Names of the G reconstructions in an update's (..., G, d), for example the prefixes of a Matryoshka coder.
        positions: Keep the sums of this many token positions apart; later positions count as the last one. 0 = do not.
        sample_size: Rows kept for the median; 0 = none. The sample is uniform, and the same whatever the ranks if rank r of W holds rows
            r, r + W, ... of a global batch.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: Repeated group names, or negative numbers.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = True  # the states only mean something together, so torchmetrics cannot merge them one by one
    fvu_count: Tensor
    fvu_mean: Tensor
    fvu_scatter: Tensor
    fvu_residual: Tensor
    fvu_sample_key: Tensor
    fvu_sample_target: Tensor
    fvu_sample_error: Tensor
    fvu_rows: Tensor

    def __init__(self, groups: Sequence[str | int] | None = None, positions: int = 0, sample_size: int = 2048, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.groups = None if groups is None else [str(group) for group in groups]
        if self.groups is not None and (not self.groups or len(set(self.groups)) != len(self.groups)):
            raise ValueError(f"groups={self.groups} must be different names, at least one.")
        if positions < 0 or sample_size < 0:
            raise ValueError(f"positions={positions} and sample_size={sample_size} must not be negative.")
        self.positions, self.sample_size = positions, sample_size
        for name in (*_SUMS, *_SAMPLE[1:]):
            self.add_state(name, torch.zeros(0, dtype=torch.float64))
        for name in (_SAMPLE[0], "fvu_rows"):
            self.add_state(name, torch.zeros(0 if name in _SAMPLE else (), dtype=torch.int64))

    def update(self, target: Tensor, reconstruction: Tensor, mask: Tensor | None = None, position: Tensor | None = None) -> None:
        """Add rows.

        Args:
            target: (..., d).
            reconstruction: (..., d), or (..., G, d) with ``groups``.
            mask: (...) bool; rows that count.
            position: (...) int64 token positions, needed with ``positions``.

        Raises:
            ValueError: Shapes that do not fit each other, the groups or earlier batches; a missing position.
        """
        y, prediction = matched_rows(target, reconstruction, mask)
        self._check(y, prediction, position)
        if self.device.type != "mps":
            y, prediction = y.to(self.device), prediction.to(self.device)
        ids = self._row_ids(target)
        kept = slice(None) if mask is None else mask.reshape(-1).bool()
        bucket = None
        if self.positions and position is not None:
            bucket = position.reshape(-1)[kept].clamp(0, self.positions - 1).to(y.device)
        self._add_sums(fvu_sums(y, prediction, bucket, max(1, self.positions)))
        if self.sample_size and len(y):
            self._add_sample(sample_keys(ids[kept].to(y.device)), y, prediction)

    def compute(self) -> Any:
        """FVU of everything so far over all ranks, a float64 tensor (or, with groups, a dict of them); NaN without variance or rows."""
        values = self._per_group(fvu)
        if self.groups is None:
            return values[0]
        named = {f"fvu_{group}": value for group, value in zip(self.groups, values, strict=True)}
        return {"fvu": values[-1], "fvu_min": values.min(), "fvu_max": values.max(), "fvu_mean": values.mean()} | named

    def per_dimension(self) -> Tensor:
        """(d,) or (G, d) FVU of each dimension; all ranks must call it."""
        return self._joined(lambda: self._ungrouped(self._per_group(fvu_per_dimension)))

    def per_position(self) -> Tensor:
        """(P,) or (G, P) FVU of each token position, around the overall mean; all ranks must call it."""
        return self._joined(lambda: self._ungrouped(self._per_group(fvu_per_position)))

    def median(self) -> Tensor:
        """Scalar or (G,) median over the sampled rows of error / squared distance from the mean; all ranks must call it."""
        return self._joined(lambda: self._ungrouped(self._median()))

    def rows(self) -> int:
        """Rows counted so far over all ranks; all ranks must call it."""
        return int(self._joined(lambda: self.fvu_count.sum()))

    # ------------------------------------------------------------------ joining

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Take in the rows of another metric of the same settings, as a rank would.

        Raises:
            TypeError: It is none.
        """
        if not isinstance(incoming_state, FractionOfVarianceUnexplained):
            raise TypeError(f"Only another FractionOfVarianceUnexplained can be merged, got {type(incoming_state).__name__}.")
        other = incoming_state
        self._computed = None
        self._update_count += other._update_count
        self.fvu_rows = self.fvu_rows + other.fvu_rows.to(self.fvu_rows.device)
        if other.fvu_count.numel():
            self._add_sums(FvuSums(*(getattr(other, name).to(self.fvu_count.device) for name in _SUMS)))
        if other.fvu_sample_key.numel():
            self._keep_smallest(*(getattr(other, name).to(self.fvu_sample_key.device) for name in _SAMPLE))

    def _sync_dist(self, dist_sync_fn: Callable | None = None, process_group: Any | None = None) -> None:
        """Join all ranks' states by sums alone; a rank without rows takes part with zeros."""
        group = process_group or self.process_group
        groups, buckets, width = largest_shape(self.fvu_residual, 3, group)
        if width == 0:
            return
        self._allocate(groups, buckets, width)
        self._set_sums(join_sums(self._sums(), group))
        self.fvu_rows = summed(self.fvu_rows, group)
        if self.sample_size:
            sample = (self.fvu_sample_key, self.fvu_sample_target, self.fvu_sample_error)
            self.fvu_sample_key, self.fvu_sample_target, self.fvu_sample_error = join_sample(
                *sample, (self.sample_size, width, groups), group
            )

    def _joined(self, view: Callable[[], Tensor]) -> Tensor:
        """A view of all ranks' rows."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            return view()

    # ------------------------------------------------------------------ parts

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> torch.nn.Module:
        """Move states, but never change their dtype: a module in bfloat16 would round the sums away."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)

    def _check(self, y: Tensor, prediction: Tensor, position: Tensor | None) -> None:
        groups = 1 if self.groups is None else len(self.groups)
        if prediction.shape[1] != groups:
            raise ValueError(f"The metric has {groups} group(s) {self.groups or ''}, the reconstruction has {prediction.shape[1]}.")
        if self.fvu_mean.numel() and self.fvu_mean.shape[1] != y.shape[1]:
            raise ValueError(f"Earlier batches were {self.fvu_mean.shape[1]} wide, this one is {y.shape[1]}: use one metric for each site.")
        if self.positions and position is None:
            raise ValueError("The metric separates positions, so update needs position=, one token position per row.")

    def _row_ids(self, target: Tensor) -> Tensor:
        """Each row's number in the global stream, if rank r of W holds rows r, r + W, ... of it; (lead * inner,) int64."""
        lead = target.shape[0] if target.ndim > 1 else 1
        inner = target[..., 0].numel() // max(1, lead)
        available = dist.is_available() and dist.is_initialized()
        world, rank = (dist.get_world_size(), dist.get_rank()) if available else (1, 0)
        leading = (torch.arange(lead, device=target.device) + self.fvu_rows.to(target.device)) * world + rank
        self.fvu_rows = self.fvu_rows + lead
        return (leading[:, None] * inner + torch.arange(inner, device=target.device)).flatten()

    def _allocate(self, groups: int, buckets: int, width: int) -> None:
        if self.fvu_count.numel():
            return
        shapes = {"fvu_count": (buckets,), "fvu_mean": (buckets, width), "fvu_scatter": (buckets, width)}
        shapes |= {"fvu_residual": (groups, buckets, width)}
        for name, shape in shapes.items():
            setattr(self, name, getattr(self, name).new_zeros(shape))

    def _sums(self) -> FvuSums:
        return FvuSums(self.fvu_count, self.fvu_mean, self.fvu_scatter, self.fvu_residual)

    def _set_sums(self, sums: FvuSums) -> None:
        self.fvu_count, self.fvu_mean, self.fvu_scatter, self.fvu_residual = sums.count, sums.mean, sums.scatter, sums.residual

    def _add_sums(self, new: FvuSums) -> None:
        self._set_sums(merge_fvu_sums(self._sums(), new) if self.fvu_count.numel() else new)

    def _add_sample(self, keys: Tensor, y: Tensor, prediction: Tensor) -> None:
        bound = self.fvu_sample_key[-1] if len(self.fvu_sample_key) == self.sample_size else NO_KEY
        new = (keys < bound).nonzero()[:, 0]
        if len(new) > self.sample_size:
            new = new[keys[new].argsort()[: self.sample_size]]
        target = y[new].double()
        self._keep_smallest(keys[new], target, (prediction[new].double() - target[:, None]).square().sum(-1))

    def _keep_smallest(self, keys: Tensor, target: Tensor, error: Tensor) -> None:
        if self.fvu_sample_key.numel():
            keys = torch.cat([self.fvu_sample_key, keys])
            target, error = torch.cat([self.fvu_sample_target, target]), torch.cat([self.fvu_sample_error, error])
        order = keys.argsort(stable=True)[: self.sample_size]
        self.fvu_sample_key, self.fvu_sample_target, self.fvu_sample_error = keys[order], target[order], error[order]

    def _per_group(self, view: Callable[[FvuSums], Tensor]) -> Tensor:
        if not self.fvu_count.numel():
            return torch.full((len(self.groups or [""]), 1), torch.nan, dtype=torch.float64, device=self.fvu_count.device).squeeze(1)
        return view(self._sums())

    def _median(self) -> Tensor:
        if not self.fvu_sample_key.numel():
            return torch.full((len(self.groups or [""]),), torch.nan, dtype=torch.float64, device=self.fvu_count.device)
        centre = overall_mean(self._sums())
        return median_ratio(self.fvu_sample_error, (self.fvu_sample_target - centre).square().sum(-1))

    def _ungrouped(self, values: Tensor) -> Tensor:
        return values[0] if self.groups is None else values

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values; see ``torchmetrics.Metric.plot``."""
        return self._plot(val, ax)
