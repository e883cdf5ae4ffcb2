"""Sums over evaluation tokens, and the numbers that are read off them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from theodolite.distributed import sum_over_ranks
from theodolite.functional.activation_threshold import BINS, activation_histogram, threshold_for_count
from theodolite.metrics.fvu import FractionOfVarianceUnexplained

from .transcoder import Transcoder


def prefix_metrics(prefixes: Sequence[int], fvu: Tensor) -> dict[str, Tensor]:
    """Names of the prefixes' FVUs: each by its size, the last as ``fvu``, and the smallest, largest and mean of all.

    Args:
        prefixes: Ends of the G prefixes.
        fvu: (G,).
    """
    named = {f"fvu_{end}": value for end, value in zip(prefixes, fvu, strict=True)}
    return {"fvu": fvu[-1], "fvu_min": fvu.min(), "fvu_max": fvu.max(), "fvu_mean": fvu.mean()} | named


@torch.no_grad()
def held_out_threshold(coder: Transcoder, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """The threshold with k active latents per token of all ranks' batches; all ranks must call it."""
    device, tokens = coder.W_enc.device, 0
    histogram = torch.zeros(BINS, dtype=torch.int64, device=device)
    for batch in batches:
        inputs = batch["input"].to(device)
        histogram += activation_histogram(coder.scores(coder.normalise_input(inputs)))
        tokens += len(inputs)
    total = sum_over_ranks(torch.cat([histogram, histogram.new_tensor([tokens])]))
    return threshold_for_count(total[:-1].cpu(), coder.k * int(total[-1]))


class CoderEvaluation:
    """What an evaluation sums up: it changes nothing of the coder, draws nothing, and does not depend on how tokens fall over ranks.

    Args:
        coder: The coder, run by its inference rule.
    """

    def __init__(self, coder: Transcoder) -> None:
        self.coder = coder
        device = coder.W_enc.device
        self.prefixes: list[int] = coder.prefixes.tolist()
        self.fvu = FractionOfVarianceUnexplained(groups=self.prefixes).to(device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.active = torch.zeros(coder.latents, dtype=torch.int64, device=device)

    def add(self, inputs: Tensor, target: Tensor) -> None:
        """Add (N, d_in) inputs and their (N, d_out) targets; N may be 0."""
        codes = self.coder.encode(inputs)
        self.fvu.update(target.float(), self.coder.reconstructions(inputs, codes))
        self.tokens += len(inputs)
        self.active += codes.counts()

    def density(self) -> Tensor:
        """(M,) float64 share of tokens on which each latent is active, over all ranks; all ranks must call it."""
        sums = sum_over_ranks(torch.cat([self.tokens[None], self.active]))
        return sums[1:].double() / sums[0].clamp_min(1)

    def metrics(self) -> dict[str, Tensor]:
        """Named scalars over all ranks; all ranks must call it.

        ``fvu*`` by prefix; ``median_fvu``, the median token's own ratio; ``l0`` mean active latents per token, ``l0_<prefix>`` those
        within each prefix; ``dead_fraction`` latents never active on these tokens; ``dense_fraction`` those active on more than a tenth.
        """
        density, fvu = self.density(), self.fvu.compute()
        assert isinstance(fvu, dict)
        named = fvu | {"median_fvu": self.fvu.median()[-1], "l0": density.sum()}
        named |= {f"l0_{end}": density[:end].sum() for end in self.prefixes}
        return named | {"dead_fraction": (density == 0).double().mean(), "dense_fraction": (density > 0.1).double().mean()}
