"""Where a projection's direction comes from: extracted from contrastive pairs, or drawn at random as its control.

The live source, which refreshes its pairs from rollouts, is in :mod:`theodolite.callbacks.live_direction`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from theodolite.callbacks.sequence_gradients import (
    TokenPair,
    contrast_pairs,
    encode_pairs,
    matrix_names,
    pair_gradient,
    pair_set_hash,
    require_pair_source,
    require_scorer,
)
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.extraction import check_method, gradient_difference, haar_random_like
from theodolite.protocols import Window
from theodolite.seeds import run_seed


class DirectionSource(ABC):
    """Makes, and perhaps refreshes, the direction of a :class:`~theodolite.callbacks.gradient_projection.GradientProjectionCallback`.

    Every rank must come to the same direction from the same calls; the callback then copies rank 0's numbers, so that kernels which are
    not deterministic cannot pull the ranks apart.
    """

    needs_gradients = True
    """Whether extraction differentiates or runs the module, which sharded weights do not allow."""

    @abstractmethod
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise, in one sentence, what would make extraction fail; called before training."""

    @abstractmethod
    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> ConceptDirection | None:
        """The direction at the start of a fresh fit (not called on resume), or None where the first ``refresh`` brings it."""

    def on_rollouts(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:  # noqa: B027 (optional)
        """See the rollouts of a window; sources that need none ignore it."""

    def refresh(self, trainer: Trainer, pl_module: LightningModule, step: int) -> ConceptDirection | None:
        """A new direction before optimizer step ``step`` (counted from 0), or None to keep the present one."""
        return None

    def metrics(self) -> dict[str, float]:
        """Numbers to log beside the projection's."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State beyond the direction itself: plain numbers, strings, lists and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional)
        """Take back :meth:`state_dict`."""


class GradientDifference(DirectionSource):
    """``v_p`` = mean or top singular vectors of ``grad NLL(concept) - grad NLL(clean)``, normalised per weight matrix.

    Losses are sums over completion tokens, as in the live loss (a common denominator disappears in the normalisation).

    Args:
        n_pairs: Contrastive pairs.
        method: ``mean`` (one batched backward) or ``svd`` (one backward per pair).
        k: Rows per matrix; 1 for ``mean``.
        pairs: JSONL file of pairs, ``{"prompt", "concept", "clean"}`` per line; None asks ``trainer.datamodule.contrast_pairs(n_pairs,
            seed)``.
        seed: Seed of the datamodule's pairs; None = the run's ``seed_everything``.
        parameters: Glob patterns of parameter names; None takes every trainable 2-dimensional parameter.
        refresh_every: Score the same pairs again under the current weights every so many optimizer steps; None keeps the base policy's.
        chunk_size: Sequences per backward pass.

    Raises:
        ValueError: Contradictory settings.
    """

    def __init__(
        self,
        n_pairs: int = 64,
        method: Literal["mean", "svd"] = "mean",
        k: int = 1,
        pairs: str | None = None,
        seed: int | None = None,
        parameters: list[str] | None = None,
        refresh_every: int | None = None,
        chunk_size: int = 32,
    ) -> None:
        check_method(method, k)
        if n_pairs < k or chunk_size < 1 or (refresh_every is not None and refresh_every < 1):
            raise ValueError(
                f"n_pairs={n_pairs} (at least k={k}), chunk_size={chunk_size} and refresh_every={refresh_every} must be positive."
            )
        self.method: Literal["mean", "svd"] = method
        self.n_pairs, self.k, self.seed = n_pairs, k, run_seed(seed)
        self.pairs, self.parameters, self.refresh_every, self.chunk_size = pairs, parameters, refresh_every, chunk_size
        self._encoded: list[TokenPair] | None = None

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module scores sequences, the patterns match, and there is somewhere to take pairs from."""
        require_scorer(pl_module)
        matrix_names(pl_module, self.parameters)
        if self.pairs is None:
            require_pair_source(trainer)
        else:
            contrast_pairs(trainer, self.pairs, self.n_pairs, self.seed)

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> ConceptDirection:
        """Extract from the weights as they are now."""
        return self._extract(trainer, pl_module, trainer.global_step)

    def refresh(self, trainer: Trainer, pl_module: LightningModule, step: int) -> ConceptDirection | None:
        """Extract again every ``refresh_every`` steps."""
        if self.refresh_every is None or step == 0 or step % self.refresh_every:
            return None
        return self._extract(trainer, pl_module, step)

    def metrics(self) -> dict[str, float]:
        """The number of pairs."""
        return {"pairs": float(self.n_pairs)}

    def _extract(self, trainer: Trainer, pl_module: LightningModule, step: int) -> ConceptDirection:
        if self._encoded is None:
            scorer = require_scorer(pl_module)
            self._encoded = encode_pairs(scorer, contrast_pairs(trainer, self.pairs, self.n_pairs, self.seed))
        names = matrix_names(pl_module, self.parameters)
        metadata = {"source": "gradient_difference", "step": step, "n_pairs": self.n_pairs, "pair_set_sha256": pair_set_hash(self._encoded)}
        differences = pair_differences(trainer, pl_module, self._encoded, names, self.method, self.chunk_size)
        return gradient_difference(differences, self.method, self.k, metadata)


class HaarRandom(DirectionSource):
    """The control: ``k`` uniformly random orthonormal rows per weight matrix, drawn once.

    Args:
        k: Rows per matrix.
        seed: Seed of the draw; None = the run's ``seed_everything``.
        parameters: Glob patterns of parameter names; None takes every trainable 2-dimensional parameter.
    """

    needs_gradients = False

    def __init__(self, k: int = 8, seed: int | None = None, parameters: list[str] | None = None) -> None:
        if k < 1:
            raise ValueError(f"k={k} is out of range: draw at least 1 row per matrix.")
        self.k, self.seed, self.parameters = k, run_seed(seed), parameters

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The patterns match and every matrix has room for ``k`` rows."""
        self.prepare(trainer, pl_module)

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> ConceptDirection:
        """Draw the rows."""
        shapes = dict(pl_module.named_parameters())
        return haar_random_like({name: shapes[name].shape for name in matrix_names(pl_module, self.parameters)}, self.k, self.seed)


def pair_differences(
    trainer: Trainer, pl_module: LightningModule, pairs: list[TokenPair], names: list[str], method: str, chunk_size: int
) -> dict[str, Tensor]:
    """What :func:`gradient_difference` takes: for ``mean`` the sum as one row, for ``svd`` one row per pair."""
    groups = [pairs] if method == "mean" else [[pair] for pair in pairs]
    gradients = [pair_gradient(trainer, pl_module, group, names, chunk_size) for group in groups]
    return {name: torch.stack([gradient[name] for gradient in gradients]) for name in names}
