"""Numbers per rollout that say how it stands to a concept, for gates and reports: gradient products and activation scores.

They are computed after the rewards are known and before advantages are, and left in ``window.features``, where callbacks that come later
in the list may use them. Nothing is changed and the oracle is not asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from theodolite.callbacks.completion_states import decoder_layers, layer_band, pooled_states
from theodolite.callbacks.detectors import text_detector
from theodolite.callbacks.gradient_projection import GradientProjectionCallback
from theodolite.callbacks.sequence_gradients import require_scorer, without_trace
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.separation import auc
from theodolite.functional.sequence_products import sums_over_weights, watch_sequences
from theodolite.protocols import TokenSequence, Window


class RolloutFeatures(Callback):
    """Measure every rollout of a window against a direction.

    ``window.features`` gets, as float64 on the CPU: ``gradient_dot`` (``<grad NLL_i, V>``, positive = towards the concept once multiplied
    by a positive advantage: learning the rollout lowers its NLL), ``gradient_norm``, ``gradient_cos``, and with a residual direction
    ``activation_score`` (mean over its layers of ``h_i . d/|d|``). The window's metrics get the mean of each as ``features/<name>``, and
    with a detector the AUC with which each tells flagged rollouts of this rank from the others, ``features/<name>_auc``.

    Args:
        direction: Folder of a direction in space ``parameter`` (on weights of linear layers) or ``residual``; None takes the direction in
            force of the projection named ``projection``.
        projection: Name of a :class:`GradientProjectionCallback` in the same trainer.
        position: Of the states: ``mean`` over the completion or its ``last`` token.
        detector: Regular expression or dotted path of a callable on text; None leaves the AUCs out.
        every: Windows between measurements (each costs a forward and a backward pass over the rollouts).
        chunk_size: Sequences per pass.

    Raises:
        ValueError: A setting out of range.
    """

    def __init__(
        self,
        direction: str | ConceptDirection | None = None,
        projection: str = "projection",
        position: str = "mean",
        detector: str | None = None,
        every: int = 1,
        chunk_size: int = 32,
    ) -> None:
        super().__init__()
        if every < 1 or chunk_size < 1 or position not in ("last", "mean"):
            raise ValueError(f"every={every} and chunk_size={chunk_size} must be positive and position={position!r} 'last' or 'mean'.")
        self.direction, self.projection, self.position, self.every, self.chunk_size = direction, projection, position, every, chunk_size
        self._flagged = None if detector is None else text_detector(detector)
        self._loaded: ConceptDirection | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load a saved direction, or find the projection whose direction is measured (``ValueError`` where there is none)."""
        if stage != "fit":
            return
        if self.direction is not None:
            self._loaded = self.direction if isinstance(self.direction, ConceptDirection) else ConceptDirection.load(self.direction)
            if self._loaded.space not in ("parameter", "residual"):
                raise ValueError(f"RolloutFeatures measures directions in space 'parameter' or 'residual', not {self._loaded.space!r}.")
        elif self._projections(trainer) == []:
            raise ValueError(f"There is no projection named {self.projection!r} to take a direction of: name one, or give `direction`.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find a module that cannot be scored, and wrong shapes, before training."""
        require_scorer(pl_module)
        if self._loaded is not None and self._loaded.space == "parameter":
            self._loaded.check_against({name: parameter.shape for name, parameter in pl_module.named_parameters()})

    def on_rollouts(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        """Fill ``window.features``."""
        direction = self._loaded or next((one.current for one in self._projections(trainer)), None)
        if window.step % self.every or direction is None:  # a live direction exists from the first step on
            return
        sequences = [rollout.tokens for rollout in window.rollouts]
        if direction.space == "residual":
            found = {"activation_score": self._activation_scores(trainer, pl_module, direction, sequences)}
        else:
            dots, norms = gradient_features(trainer, pl_module, direction, sequences, self.chunk_size)
            # learning a rollout is a descent step on its NLL
            found = {"gradient_dot": dots, "gradient_norm": norms, "gradient_cos": dots / norms.clamp_min(1e-30)}
        window.features.update(found)
        flags = None if self._flagged is None else torch.tensor([self._flagged(rollout.text) for rollout in window.rollouts])
        for name, values in found.items():
            window.metrics[f"features/{name}"] = (float(values.sum()), float(len(values)))
            if flags is not None and bool(flags.any()) and not bool(flags.all()):
                window.metrics[f"features/{name}_auc"] = (auc(values[flags], values[~flags]), 1.0)

    def _projections(self, trainer: Any) -> list[GradientProjectionCallback]:
        return [one for one in trainer.callbacks if isinstance(one, GradientProjectionCallback) and one.name == self.projection]

    def _activation_scores(self, trainer: Any, pl_module: Any, direction: ConceptDirection, sequences: Sequence[TokenSequence]) -> Tensor:
        """Mean over layers of the state's coordinate along the unit direction."""
        everywhere = layer_band(decoder_layers(pl_module), (0.6, 0.75))
        layers = direction.metadata.get("layers", everywhere) if "resid_post" in direction.vectors else [n + 1 for n in direction.layers]
        scores = []
        for layer in layers:
            site = "resid_post" if "resid_post" in direction.vectors else f"resid_post.{layer - 1}"
            d = direction.vectors[site][0].double().cpu()
            states = pooled_states(trainer, pl_module, sequences, layer, "last" if self.position == "last" else "mean", self.chunk_size)
            scores.append(states @ (d / d.norm()))
        return torch.stack(scores).mean(0)


def gradient_features(
    trainer: Any, module: nn.Module, direction: ConceptDirection, sequences: Sequence[TokenSequence], chunk_size: int
) -> tuple[Tensor, Tensor]:
    """``<grad NLL_i, V>`` and ``|grad NLL_i|`` over the direction's weights, token sums, one backward pass per chunk.

    Args:
        trainer: Gives the precision context.
        module: A :class:`~theodolite.protocols.SequenceScorer` that keeps sequences apart in its linear layers (a ``shared_prefix``
            attribute is switched off meanwhile).
        direction: Space ``parameter``; rows (k, d_out, d_in) of linear layers' weights.
        sequences: What to measure.
        chunk_size: Sequences per pass.

    Returns:
        Two (n,) tensors in float64 on the CPU, in the order given. No ``p.grad``, RNG state or mode is touched.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].prompt_ids) + len(sequences[i].completion_ids))
    dots, norms = torch.zeros(len(sequences), dtype=torch.float64), torch.zeros(len(sequences), dtype=torch.float64)
    scorer = require_scorer(module)
    parameters = dict(module.named_parameters())
    watched = [parameters[name] for name in direction.vectors]
    with without_trace(module), _apart(module), torch.enable_grad():
        for start in range(0, len(order), chunk_size):
            chunk = order[start : start + chunk_size]
            with watch_sequences(module, direction.vectors, len(chunk)) as products:
                with trainer.precision_plugin.forward_context():
                    log_probs, mask = scorer.completion_log_probs([sequences[i] for i in chunk])
                torch.autograd.grad(-(log_probs.float() * mask).sum(), watched, allow_unused=True)
            found = sums_over_weights(products)
            dots[chunk], norms[chunk] = found[0].double().cpu(), found[1].double().cpu()
    return dots, norms


@contextmanager
def _apart(module: Any) -> Iterator[None]:
    """Prompts are not shared between sequences, inside."""
    shared = getattr(module, "shared_prefix", None)
    if shared is None:
        yield
        return
    module.shared_prefix = False
    try:
        yield
    finally:
        module.shared_prefix = shared
