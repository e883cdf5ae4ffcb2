"""A probe on hidden states, fitted on known examples of the concept, as the detector of a live direction.

A text detector sees what it was written for; rollouts that do the same thing in other words pass it and are then taken for *clean*. A probe
fitted on the known ones may see more of them, because states generalise further than regular expressions. It reads what a monitor at
deployment could read, and never the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from theodolite.callbacks.completion_states import decoder_layers, pooled_states, shared_over_ranks
from theodolite.callbacks.detectors import RolloutDetector
from theodolite.callbacks.sequence_gradients import contrast_pairs, encode_pairs, require_pair_source, require_scorer
from theodolite.functional.separation import auc
from theodolite.protocols import Rollout, TokenSequence
from theodolite.seeds import run_seed


class ActivationProbe(RolloutDetector):
    """Difference of means on pooled completion states, thresholded at a false positive rate on held-out clean completions.

    Args:
        n_pairs: Known pairs to fit on; a quarter as many more set the threshold.
        pairs: JSONL file of pairs; None asks the datamodule.
        layer_fraction: Depth of the states, as a fraction of the decoder layers.
        position: ``mean`` over the completion, or its ``last`` token.
        false_positive_rate: Of the held-out clean completions; the threshold is their quantile.
        refit_every: Windows between fits on the same pairs under the current weights; None keeps the probe of the base policy.
        seed: Of the datamodule's pairs; None = the run's ``seed_everything``.
        chunk_size: Sequences per forward pass.

    Raises:
        ValueError: A setting out of range.
    """

    def __init__(
        self,
        n_pairs: int = 64,
        pairs: str | None = None,
        layer_fraction: float = 0.67,
        position: Literal["last", "mean"] = "mean",
        false_positive_rate: float = 0.05,
        refit_every: int | None = None,
        seed: int | None = None,
        chunk_size: int = 32,
    ) -> None:
        if n_pairs < 4 or chunk_size < 1 or not 0 < layer_fraction <= 1 or not 0 <= false_positive_rate < 1:
            raise ValueError(
                f"n_pairs={n_pairs} must be at least 4, chunk_size={chunk_size} at least 1, layer_fraction={layer_fraction} in (0, 1] and "
                f"false_positive_rate={false_positive_rate} in [0, 1)."
            )
        if position not in ("last", "mean") or (refit_every is not None and refit_every < 1):
            raise ValueError(f"position={position!r} must be 'last' or 'mean' and refit_every={refit_every} at least 1.")
        self.n_pairs, self.pairs, self.layer_fraction, self.seed = n_pairs, pairs, layer_fraction, run_seed(seed)
        self.position: Literal["last", "mean"] = position
        self.false_positive_rate, self.refit_every, self.chunk_size = false_positive_rate, refit_every, chunk_size
        self.vector: Tensor | None = None
        """(d,) in float64 on the CPU; a rollout is flagged where ``h . vector > threshold``."""
        self.threshold, self.held_out_auc = 0.0, float("nan")
        self._windows = 0

    def check(self, trainer: Any, pl_module: Any) -> None:
        """The module can be read, and there are known pairs."""
        require_scorer(pl_module)
        decoder_layers(pl_module)
        if self.pairs is None:
            require_pair_source(trainer)
        else:
            contrast_pairs(trainer, self.pairs, self._total(), self.seed)

    def fit(self, trainer: Any, pl_module: Any) -> None:
        """Fit on the known pairs under the current weights."""
        pairs = encode_pairs(require_scorer(pl_module), contrast_pairs(trainer, self.pairs, self._total(), self.seed))
        states = self._states(trainer, pl_module, [side for pair in pairs for side in pair])
        states = shared_over_ranks(trainer, pl_module, states)
        concept, clean, n = states[0::2], states[1::2], self.n_pairs
        difference = concept[:n].mean(0) - clean[:n].mean(0)
        norm = difference.norm()
        if not 0 < float(norm) < float("inf"):
            raise ValueError("The known pairs' two sides have the same mean state or one that is not finite: no probe can be fitted.")
        self.vector = difference / norm
        scores, negatives = concept[n:] @ self.vector, clean[n:] @ self.vector
        self.threshold = float(torch.quantile(negatives, 1 - self.false_positive_rate))
        self.held_out_auc = auc(scores, negatives)

    def flags(self, trainer: Any, pl_module: Any, rollouts: Sequence[Rollout]) -> list[bool]:
        """Whether each rollout's state lies beyond the threshold."""
        if self.refit_every is not None and self._windows > 0 and self._windows % self.refit_every == 0:
            self.fit(trainer, pl_module)
        self._windows += 1
        assert self.vector is not None, "fit has not run"
        states = self._states(trainer, pl_module, [rollout.tokens for rollout in rollouts])
        return (states @ self.vector > self.threshold).tolist()

    def metrics(self) -> dict[str, float]:
        """AUC on held-out known pairs."""
        return {"probe_auc": self.held_out_auc}

    def state_dict(self) -> dict[str, Any]:
        """The probe."""
        return {
            "vector": self.vector,
            "threshold": self.threshold,
            "held_out_auc": self.held_out_auc,
            "windows": self._windows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`."""
        self.vector, self.threshold, self.held_out_auc = state["vector"], state["threshold"], state["held_out_auc"]
        self._windows = state["windows"]

    def _total(self) -> int:
        return self.n_pairs + max(4, self.n_pairs // 4)

    def _states(self, trainer: Any, pl_module: Any, sequences: Sequence[TokenSequence]) -> Tensor:
        layer = max(1, round(self.layer_fraction * decoder_layers(pl_module)))
        return pooled_states(trainer, pl_module, sequences, layer, self.position, self.chunk_size)
