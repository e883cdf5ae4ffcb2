"""What a language model loses when a transcoder computes one of its sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from theodolite.distributed import sum_over_ranks
from theodolite.protocols import ActivationSource, NestedCoder
from theodolite.sites import capture_sites, replace_sites

Splice = Callable[[Tensor, Tensor], Tensor]
"""(input, target) at the two sites to what the model goes on with."""


class SpliceEvaluation(Callback):
    r"""Cross-entropy of the language model with the coder spliced in, at the end of ``test`` (and of ``validate`` outside ``fit``).

    Four kinds of passes over the same held-out tokens: untouched, target site replaced by the coder's reconstruction (once for each
    prefix), and replaced by zeros. Logged as ``<stage>/``:

    * ``ce``, ``ce_spliced``, ``ce_zero``: mean next-token cross-entropy in nats;
    * ``ce_recovered`` and ``ce_recovered_<prefix>``: (zero - spliced) / (zero - untouched), 1 is lossless;
    * ``kl_spliced``: mean KL divergence of the spliced from the untouched prediction.

    The first token of every sequence keeps its activation, as coders are not trained on it. Sums are over all ranks; the number does not
    depend on their number or on ``batch_sequences``.

    Args:
        sequences: Held-out sequences over all ranks.
        batch_sequences: Sequences per forward pass on one rank.

    Raises:
        ValueError: Numbers below 1.
    """

    def __init__(self, sequences: int = 64, batch_sequences: int = 8) -> None:
        if min(sequences, batch_sequences) < 1:
            raise ValueError(f"SpliceEvaluation: sequences={sequences} and batch_sequences={batch_sequences} must be at least 1.")
        self.sequences, self.batch_sequences = sequences, batch_sequences

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a datamodule or module that cannot be spliced."""
        source = getattr(trainer, "datamodule", None)
        if not isinstance(source, ActivationSource):
            raise TypeError(f"SpliceEvaluation needs a datamodule with a producer and two sites; {type(source).__name__} has none.")
        if source.target_site.name == "resid_mid":
            raise ValueError(f"SpliceEvaluation cannot replace {source.target_site}: no module outputs it; choose another target_site.")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        self._measure(trainer, pl_module, "test")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, unless this is the validation inside a fit."""
        if trainer.state.fn == "validate":
            self._measure(trainer, pl_module, "val")

    @torch.no_grad()
    def _measure(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        source, coder = _source(trainer), _coder(pl_module)
        prefixes: list[int] = coder.prefixes.tolist()
        splices: list[Splice | None] = [None, lambda x, y: torch.zeros_like(y)]
        splices += [_reconstruction(coder, index) for index in range(len(prefixes))]
        split = "test" if stage == "test" else "validation"
        tokens = source.held_out_tokens(self.sequences, split)[trainer.global_rank :: trainer.world_size].to(pl_module.device)
        sums = torch.zeros(2 * len(splices) + 1, dtype=torch.float64, device=pl_module.device)
        for part in tokens.split(self.batch_sequences):
            sums += _losses(source, part, splices)
        means = sum_over_ranks(sums)
        means = means[:-1] / means[-1]
        ce, kl = means[: len(splices)], means[len(splices) :]
        recovered = (ce[1] - ce[2:]) / (ce[1] - ce[0])
        values = {"ce": ce[0], "ce_zero": ce[1], "ce_spliced": ce[-1], "ce_recovered": recovered[-1], "kl_spliced": kl[-1]}
        if len(prefixes) > 1:
            values |= {f"ce_recovered_{end}": value for end, value in zip(prefixes, recovered, strict=True)}
        shown = {f"{stage}/{name}": value.float() for name, value in values.items()}
        pl_module.log_dict(shown, rank_zero_only=False, sync_dist=False)


def _reconstruction(coder: NestedCoder, index: int) -> Splice:
    return lambda x, y: torch.cat([y[:, :1], coder(x[:, 1:], index).to(y.dtype)], dim=1)


def _losses(source: ActivationSource, tokens: Tensor, splices: list[Splice | None]) -> Tensor:
    """Summed cross-entropies, summed divergences from the first (untouched) pass, and the number of predictions."""
    targets = tokens[:, 1:].reshape(-1)
    entropies: list[Tensor] = []
    divergences: list[Tensor] = []
    untouched = torch.empty(0)
    for splice in splices:
        log_probs = _log_probs(source, tokens, splice)
        untouched = log_probs if splice is None else untouched
        entropies.append(F.nll_loss(log_probs, targets, reduction="sum"))
        divergences.append(F.kl_div(log_probs, untouched, reduction="sum", log_target=True))
    count = torch.tensor(float(len(targets)), device=tokens.device)
    return torch.stack([*entropies, *divergences, count]).double()


def _log_probs(source: ActivationSource, tokens: Tensor, splice: Splice | None) -> Tensor:
    """(B * (T - 1), V) float32 log-probabilities of the next tokens."""
    model: Any = source.producer
    with capture_sites(model, [source.input_site]) as captured:  # the untouched pass too: no other thread's hooks may see it
        replacements = {} if splice is None else {source.target_site: lambda target: splice(captured[source.input_site], target)}
        with replace_sites(model, replacements):
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return logits[:, :-1].float().log_softmax(dim=-1).reshape(-1, logits.shape[-1])


def _source(trainer: Trainer) -> ActivationSource:
    source = getattr(trainer, "datamodule", None)
    assert isinstance(source, ActivationSource)
    return source


def _coder(pl_module: LightningModule) -> NestedCoder:
    coder = getattr(pl_module, "coder", None)
    if not isinstance(coder, NestedCoder):
        raise TypeError(f"{type(pl_module).__name__} has no coder to splice in; use TranscoderModule.")
    return coder
