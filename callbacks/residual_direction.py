"""A direction from residual-stream states: mean difference over contrastive pairs, denoised by the matrices that write it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from theodolite.callbacks.completion_states import decoder_layers, layer_band, pooled_states, shared_over_ranks
from theodolite.callbacks.detectors import text_detector
from theodolite.callbacks.direction_checks import DEFAULT_CHECKS, DirectionChecks, added_to_layers, check_separation, steering_rates
from theodolite.callbacks.direction_sources import DirectionSource
from theodolite.callbacks.pair_sets import CleanSide, PairSet, pair_set, require_completer
from theodolite.callbacks.sequence_gradients import contrast_pairs, require_pair_source, require_scorer, without_trace
from theodolite.functional.directions import ConceptDirection, match_names
from theodolite.functional.extraction import Control, Denoised, apply_control, check_control, denoise, state_difference
from theodolite.functional.spaces import residual_to_output, residual_to_parameter, writer_site
from theodolite.functional.subspaces import haar_rows
from theodolite.protocols import TokenSequence
from theodolite.residual_writers import base_weight_name, residual_writers
from theodolite.seeds import run_seed


class ResidualDifference(DirectionSource):
    """``d = mean(h(concept) - h(clean))`` in the residual stream, on the trainable matrices that write to it.

    Args:
        n_pairs: Contrastive pairs to extract from.
        pairs: JSONL file of pairs; None asks the datamodule.
        clean_side: ``given``, or ``base`` for the policy's own greedy completion in the clean side's place.
        band: Depth of the layers, as fractions of their number.
        per_layer: Each layer of the band gets its own direction, which acts on the matrices of that layer alone. Otherwise the mean over
            the band acts on the matrices of every layer.
        position: ``last`` completion token, or the ``mean`` over the completion.
        denoise_rank: Restrict the direction, for each matrix, to the span of so many leading *left* singular vectors of its (base) weight;
            null leaves it as it is.
        act_on: ``output``: take the direction out of every column (has no sign: needs a two-sided gate). ``reference``: the single row
            that changes the output for the mean input of the pairs' concept sides (has one).
        parameters: Glob patterns of parameter names among the residual-writing ones.
        control: ``none``, ``haar``, ``shuffled``, ``placebo`` or ``reversed``.
        seed: Of the datamodule's pairs and of a control; None = the run's ``seed_everything``.
        chunk_size: Sequences per forward pass.
        checks: What the direction has to show on held-out pairs before training.

    Raises:
        ValueError: A setting out of range.
    """

    def __init__(
        self,
        n_pairs: int = 60,
        pairs: str | None = None,
        clean_side: CleanSide = "given",
        band: tuple[float, float] = (0.6, 0.75),
        per_layer: bool = False,
        position: Literal["last", "mean"] = "last",
        denoise_rank: int | None = 16,
        act_on: Literal["output", "reference"] = "output",
        parameters: list[str] | None = None,
        control: Control = "none",
        seed: int | None = None,
        chunk_size: int = 32,
        checks: DirectionChecks = DEFAULT_CHECKS,
    ) -> None:
        check_control(control)
        layer_band(100, band)
        if n_pairs < 1 or chunk_size < 1 or (denoise_rank is not None and denoise_rank < 1):
            raise ValueError(f"n_pairs={n_pairs}, chunk_size={chunk_size} and denoise_rank={denoise_rank} must be positive.")
        if position not in ("last", "mean") or act_on not in ("output", "reference"):
            raise ValueError(f"position={position!r} must be 'last' or 'mean' and act_on={act_on!r} 'output' or 'reference'.")
        self.n_pairs, self.pairs, self.band, self.per_layer, self.denoise_rank = n_pairs, pairs, band, per_layer, denoise_rank
        self.clean_side: CleanSide = clean_side
        self.position: Literal["last", "mean"] = position
        self.act_on, self.parameters, self.control, self.seed = act_on, parameters, control, run_seed(seed)
        self.chunk_size, self.checks = chunk_size, checks
        self.residual: ConceptDirection | None = None
        """The direction in the residual stream, before it is bound to matrices (space ``residual``)."""
        self._metrics: dict[str, float] = {}

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module can be read, trains residual-writing matrices, and there are pairs."""
        require_scorer(pl_module)
        decoder_layers(pl_module)
        self._writers(pl_module)
        if self.pairs is None:
            require_pair_source(trainer)
        else:
            contrast_pairs(trainer, self.pairs, self.n_pairs + self.checks.held_out, self.seed)
        if self.clean_side == "base" or self.control == "placebo" or self.checks.steering_alphas:
            require_completer(pl_module)

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> ConceptDirection:
        """Extract from the weights as they are now, validate, denoise and bind.

        Raises:
            ValueError: The direction does not separate held-out pairs, or a matrix is too small for ``denoise_rank``.
        """
        pairs = pair_set(trainer, pl_module, self.pairs, self.n_pairs, self.checks.held_out, self.seed, self.clean_side, self.control)
        layers = layer_band(decoder_layers(pl_module), self.band)
        concept, clean = self._states(trainer, pl_module, pairs, layers)
        by_layer = {layer: state_difference(concept[i], clean[i]) for i, layer in enumerate(layers)}
        validation = self._validate(trainer, pl_module, pairs, by_layer)
        sites = {f"resid_post.{layer - 1}": d for layer, d in by_layer.items()}
        if not self.per_layer:
            sites = {"resid_post": torch.stack(list(by_layer.values())).mean(0)}
        facts = {"source": "residual_difference", "layers": layers, "position": self.position, "act_on": self.act_on} | pairs.facts
        facts |= {"denoise_rank": self.denoise_rank, "validation": validation}
        vectors = {site: d[None].float() for site, d in sites.items()}
        self.residual = apply_control(ConceptDirection(vectors, "residual", facts), self.control, self.seed)
        return self._bound(trainer, pl_module, self.residual, pairs)

    def metrics(self) -> dict[str, float]:
        """Accuracy, AUC, retained energy and its null (nothing after a resume)."""
        return dict(self._metrics)

    def _writers(self, pl_module: nn.Module) -> dict[str, int]:
        """Trainable residual-writing matrices and their layers; in ``per_layer`` mode those of the band."""
        found = residual_writers(name for name, parameter in pl_module.named_parameters() if parameter.requires_grad)
        if self.per_layer:
            band = layer_band(decoder_layers(pl_module), self.band)
            found = {name: layer for name, layer in found.items() if layer + 1 in band}
        if not found:
            raise ValueError(f"{type(pl_module).__name__} trains no matrix that writes to the residual stream: train o_proj or down_proj.")
        return {name: found[name] for name in match_names(found, self.parameters)}

    def _states(self, trainer: Any, pl_module: Any, pairs: PairSet, layers: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """States (n, d) of the fit pairs' sides, layer by layer."""
        sequences = [side for pair in pairs.fit for side in pair]
        states = [self._pooled(trainer, pl_module, sequences, layer) for layer in layers]
        return [part[0::2] for part in states], [part[1::2] for part in states]

    def _pooled(self, trainer: Any, pl_module: Any, sequences: Sequence[TokenSequence], layer: int) -> Tensor:
        states = pooled_states(trainer, pl_module, sequences, layer, self.position, self.chunk_size)
        return shared_over_ranks(trainer, pl_module, states)

    def _validate(self, trainer: Any, pl_module: Any, pairs: PairSet, by_layer: dict[int, Tensor]) -> dict[str, Any]:
        """Separation and steering with the direction as it was found."""

        def scores(sequences: list[TokenSequence]) -> Tensor:
            parts = [self._pooled(trainer, pl_module, sequences, layer) @ (d / d.norm()) for layer, d in by_layer.items()]
            return torch.stack(parts).mean(0)

        separation = check_separation(self.checks, scores, pairs)
        self._metrics |= {f"held_out_{key}": float(separation[key]) for key in ("accuracy", "auc") if key in separation}
        size = len(next(iter(by_layer.values())))
        chance = haar_rows("steering", 1, (size,), self.seed)[0]

        def steered(alpha: float, at_random: bool) -> AbstractContextManager[None]:
            vectors = {layer: chance * d.norm().float() if at_random else d.float() for layer, d in by_layer.items()}
            return added_to_layers(pl_module, vectors, alpha)

        prompts = [pair.prompt for pair in pairs.held_out_text]
        steering = steering_rates(pl_module, self.checks, prompts, text_detector(self.checks.detector), steered, self.seed)
        return {"separation": separation, "steering": steering}

    def _bound(self, trainer: Any, pl_module: LightningModule, residual: ConceptDirection, pairs: PairSet) -> ConceptDirection:
        """Denoised rows of the writing matrices."""
        layers = self._writers(pl_module)
        sites = {name: writer_site(layer, residual) for name, layer in layers.items()}
        writers = {name: site for name, site in sites.items() if site is not None}
        vectors = {name: residual.vectors[site] for name, site in writers.items()}
        facts = residual.metadata
        if self.denoise_rank is not None:
            weights = dict(pl_module.named_parameters())
            denoised = {n: denoise(d[0], weights[base_weight_name(n, weights) or n], self.denoise_rank) for n, d in vectors.items()}
            vectors = {name: one.vector[None].float() for name, one in denoised.items()}
            facts = facts | self._retained(list(denoised.values()))
        by_matrix = ConceptDirection(vectors, "residual", facts)
        own = {name: name for name in writers}
        if self.act_on == "output":
            return residual_to_output(by_matrix, own)
        sequences = [concept for concept, _ in pairs.fit]
        return residual_to_parameter(by_matrix, own, mean_inputs(trainer, pl_module, sequences, list(own), self.chunk_size))

    def _retained(self, denoised: Sequence[Denoised]) -> dict[str, float]:
        """The retained energy beside its null, logged, and warned about near it."""
        retained = sum(one.retained for one in denoised) / len(denoised)
        null = sum(one.null for one in denoised) / len(denoised)
        if all(one.is_noise for one in denoised):
            rank_zero_warn(
                f"Denoising to {self.denoise_rank} left singular vectors keeps {retained:.2%} of it, of a random one {null:.2%}: "
                "what is left is mostly chance; raise denoise_rank or set it to null."
            )
        self._metrics |= {"retained_energy": retained, "retained_energy_null": null}
        return {"retained_energy": retained, "retained_energy_null": null}


@torch.no_grad()
def mean_inputs(trainer: Any, module: Any, sequences: Sequence[TokenSequence], names: Sequence[str], chunk_size: int) -> dict[str, Tensor]:
    """Mean input over completion tokens of the modules that own the named weights.

    Args:
        trainer: Gives the precision context.
        module: A :class:`~theodolite.protocols.SequenceScorer`.
        sequences: What to run.
        names: Parameter names, ``<module>.weight``.
        chunk_size: Sequences per forward pass.

    Returns:
        ``{name: (d_in,)}`` in float32.
    """
    sums: dict[str, Tensor] = {}
    count = 0.0
    scorer = require_scorer(module)
    with without_trace(module), trainer.precision_plugin.forward_context():
        for start in range(0, len(sequences), chunk_size):
            with _inputs_of(module, names) as seen:
                _, mask = scorer.completion_states(sequences[start : start + chunk_size], 1)
            for name, x in seen.items():
                kept = x[:, -mask.shape[1] :].float() * mask[..., None].to(x.device)
                sums[name] = sums.get(name, 0.0) + kept.sum((0, 1))
            count += float(mask.sum())
    return {name: total.cpu() / max(count, 1.0) for name, total in sums.items()}


@contextmanager
def _inputs_of(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Filled with the input (B, T, d_in) of each named weight's module."""
    owners = dict(module.named_modules())
    seen: dict[str, Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[name] = arguments[0].detach()

        return hook

    handles = [owners[name.removesuffix(".weight")].register_forward_pre_hook(hook_of(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
