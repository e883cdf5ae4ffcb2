"""Selection and statistics over the global batch, so that they do not depend on the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from theodolite.distributed import concatenate_over_ranks, sum_over_ranks, world_size
from theodolite.functional.sparse_codes import SparseCodes, entries_as_codes, largest_entries


@dataclass(frozen=True, slots=True)
class Moments:
    """Of a global batch.

    Attributes:
        count: Rows.
        mean: (d,) float64.
        variance: Scalar float64, the total sum of squares around the mean.
        power: Scalar float64, the total sum of squares around zero.
    """

    count: int
    mean: Tensor
    variance: Tensor
    power: Tensor


def global_moments(values: Tensor) -> Moments:
    """Moments over all ranks of (N, d) rows; a rank may have none. All ranks must call it.

    Two sums over ranks, the second around the global mean: no difference of large numbers.
    """
    count = torch.tensor([float(len(values))], dtype=torch.float64, device=values.device)
    first = sum_over_ranks(torch.cat([count, values.sum(dim=0, dtype=torch.float64)]))
    mean = first[1:] / first[0]
    variance = (values - mean.to(values.dtype)).square().sum(dtype=torch.float64)
    power = values.square().sum(dtype=torch.float64)
    second = sum_over_ranks(torch.stack([variance, power]))
    return Moments(int(first[0]), mean, second[0], second[1])


def global_batch_topk(scores: Tensor, count: int) -> tuple[SparseCodes, Tensor]:
    """The ``count`` largest positive scores of the global batch (BatchTopK, arXiv 2412.06410); this rank's share of them.

    Every rank offers its own ``count`` largest, the threshold is the ``count``-th largest of all offers. Exact; of scores that equal the
    threshold to the last bit, ranks may keep more than fit. All ranks must call it.

    Args:
        scores: (N, M) scores of this rank's rows.
        count: k times the rows of the global batch.

    Returns:
        Codes of this rank's rows, and the threshold (at least 0).
    """
    values, positions = largest_entries(scores, count)
    offers = values
    if world_size() > 1:
        offers = concatenate_over_ranks(torch.cat([values, values.new_full((count - len(values),), -torch.inf)]))
    threshold = offers.amin() if len(offers) <= count else offers.kthvalue(len(offers) - count + 1).values
    return entries_as_codes(values, positions, threshold, *scores.shape), threshold.clamp_min(0)
