r"""What other libraries call explained variance, as fractions *un*explained, so that a published number is compared with the right one.

Every variant is 0 for a perfect reconstruction. They differ in which mean they subtract, in what they average, and in how they treat
batches; on activations with massive tokens or large means they differ by factors. ``batch_size`` matters for those that average ratios
of batches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from theodolite.functional.fvu import fraction_of_variance_unexplained


def named_variants(target: Tensor, reconstruction: Tensor, batch_size: int | None = None) -> dict[str, Tensor]:
    """All variants of (N, d) rows, in float64.

    Args:
        target: (N, d).
        reconstruction: (N, d).
        batch_size: Rows per batch of the library's evaluation; None = all at once.

    Returns:
        ``{name: scalar}``; what each is: :data:`VARIANTS`.
    """
    y, prediction = target.double(), reconstruction.double()
    batches = list(zip(y.split(batch_size or len(y)), prediction.split(batch_size or len(y)), strict=True))
    return {name: variant(batches) for name, variant in VARIANTS.items()}


Batches = list[tuple[Tensor, Tensor]]


def whole(batches: Batches) -> Tensor:
    """One ratio over all rows, mean per dimension: this package's FVU."""
    return fraction_of_variance_unexplained(*_joined(batches))


def mean_of_batches(batches: Batches) -> Tensor:
    """Mean over batches of each batch's own ratio around its own mean: larger than the whole, the more so the smaller the batches."""
    return torch.stack([_squares(y - p) / _squares(y - y.mean(0)) for y, p in batches]).mean()


def mean_of_tokens(batches: Batches) -> Tensor:
    """Mean over tokens of each token's own ratio around its batch's mean: dominated by tokens near the mean."""
    return torch.cat([(y - p).square().sum(-1) / (y - y.mean(0)).square().sum(-1) for y, p in batches]).mean()


def residual_variance(batches: Batches) -> Tensor:
    """Mean over batches of the residual's *variance* over the target's: a constant error costs nothing."""
    return torch.stack([(y - p).var(0).sum() / y.var(0).sum() for y, p in batches]).mean()


def squared_mean_of_squares(batches: Batches) -> Tensor:
    """Means of batches, with the square of the mean of the squared entries where the squared mean belongs."""
    power = torch.stack([y.square().sum(-1).mean() for y, _ in batches]).mean()
    entries = torch.cat([y.square().mean(0) for y, _ in batches]).mean()
    return torch.stack([(y - p).square().sum(-1).mean() for y, p in batches]).mean() / (power - entries.square())


def mean_of_dimensions(batches: Batches) -> Tensor:
    """Mean over dimensions of each dimension's own ratio: dominated by dimensions that hardly vary."""
    y, p = _joined(batches)
    return ((y - p).square().sum(0) / (y - y.mean(0)).square().sum(0)).mean()


def scalar_mean(batches: Batches) -> Tensor:
    """Mean over batches, around one mean of all entries, with 1e-8 added: wrong for unequal means and for small scales."""
    return torch.stack([(y - p).square().mean() / (y.var() + 1e-8) for y, p in batches]).mean()


def uncentred(batches: Batches) -> Tensor:
    """Summed squared error over summed squared target, nothing subtracted."""
    y, p = _joined(batches)
    return _squares(y - p) / _squares(y)


VARIANTS: dict[str, Callable[[Batches], Tensor]] = {
    "fvu": whole,
    "torchmetrics_r2": whole,
    "torchmetrics_r2_uniform": mean_of_dimensions,
    "sae_lens": whole,
    "sae_lens_legacy": mean_of_tokens,
    "sparsify": mean_of_batches,
    "dictionary_learning": residual_variance,
    "sae_bench": squared_mean_of_squares,
    "sae_bench_legacy": mean_of_tokens,
    "scalar_mean": scalar_mean,
    "uncentred": uncentred,
}
"""``torchmetrics_r2``: ``1 - R2Score(multioutput="variance_weighted")`` in float64. ``sae_lens``: ``explained_variance`` of its evaluation
(6.54); its training log is ``sparsify``'s formula. ``sparsify``: ``fvu`` (1.3.3). ``dictionary_learning``: ``frac_variance_explained``
(0.1.0). ``sae_bench``: ``explained_variance`` of 0.6.0, ``sae_bench_legacy`` that of its paper.
``scalar_mean``: ``MSE / (Var + 1e-8)`` of all entries.
"""


def _joined(batches: Batches) -> tuple[Tensor, Tensor]:
    return torch.cat([y for y, _ in batches]), torch.cat([p for _, p in batches])


def _squares(values: Tensor) -> Tensor:
    return values.square().sum()
