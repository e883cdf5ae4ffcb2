"""Where a projection's direction comes from: extracted from contrastive pairs, or drawn at random as its control.

The live source, which refreshes its pairs from rollouts, is in :mod:`theodolite.callbacks.live_direction`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from theodolite.callbacks.detectors import text_detector
from theodolite.callbacks.direction_checks import (
    DEFAULT_CHECKS,
    DirectionChecks,
    check_separation,
    gradient_scores,
    steering_rates,
    stepped_towards,
)
from theodolite.callbacks.pair_sets import CleanSide, PairSet, pair_set, require_completer
from theodolite.callbacks.sequence_gradients import (
    TokenPair,
    contrast_pairs,
    matrix_names,
    pair_gradient,
    require_pair_source,
    require_scorer,
)
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.extraction import (
    Control,
    apply_control,
    check_control,
    check_method,
    gradient_difference,
    haar_random_like,
)
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

    The reduction over tokens is that of the live loss: sums where the module's loss sums them over a common denominator (which disappears
    in the normalisation), means per completion where its ``aggregation`` is ``grpo``.

    Args:
        n_pairs: Contrastive pairs to extract from.
        method: ``mean`` (one batched backward) or ``svd`` (one backward per pair).
        k: Rows per matrix; 1 for ``mean``.
        pairs: JSONL file of pairs, ``{"prompt", "concept", "clean"}`` per line; None asks ``trainer.datamodule.contrast_pairs(n_pairs,
            seed)``.
        clean_side: ``given``, or ``base`` for the policy's own greedy completion in the clean side's place.
        control: ``none``, ``haar``, ``shuffled``, ``placebo`` or ``reversed`` (:mod:`theodolite.functional.extraction`).
        normalize: ``tensor``, or ``none`` so that a flattened target weighs matrices as the pairs do.
        noise_floor: For ``svd``: the share of the lowest pooled singular values to drop.
        seed: Seed of the datamodule's pairs and of a control; None = the run's ``seed_everything``.
        parameters: Glob patterns of parameter names; None takes every trainable 2-dimensional parameter.
        refresh_every: Score the same pairs again under the current weights every so many optimizer steps; None keeps the base policy's.
        chunk_size: Sequences per backward pass.
        checks: What the direction has to show on held-out pairs before training.

    Raises:
        ValueError: Contradictory settings.
    """

    def __init__(
        self,
        n_pairs: int = 64,
        method: Literal["mean", "svd"] = "mean",
        k: int = 1,
        pairs: str | None = None,
        clean_side: CleanSide = "given",
        control: Control = "none",
        normalize: Literal["tensor", "none"] = "tensor",
        noise_floor: float = 0.0,
        seed: int | None = None,
        parameters: list[str] | None = None,
        refresh_every: int | None = None,
        chunk_size: int = 32,
        checks: DirectionChecks = DEFAULT_CHECKS,
    ) -> None:
        check_method(method, k)
        check_control(control)
        if n_pairs < k or chunk_size < 1 or (refresh_every is not None and refresh_every < 1):
            raise ValueError(
                f"n_pairs={n_pairs} (at least k={k}), chunk_size={chunk_size} and refresh_every={refresh_every} must be positive."
            )
        self.method: Literal["mean", "svd"] = method
        self.clean_side: CleanSide = clean_side
        self.normalize: Literal["tensor", "none"] = normalize
        self.n_pairs, self.k, self.seed, self.control, self.noise_floor = n_pairs, k, run_seed(seed), control, noise_floor
        self.pairs, self.parameters, self.refresh_every, self.chunk_size = pairs, parameters, refresh_every, chunk_size
        self.checks = checks
        self._pairs: PairSet | None = None
        self._validation: dict[str, Any] = {}

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module scores sequences, the patterns match, and there is somewhere to take pairs from."""
        require_scorer(pl_module)
        matrix_names(pl_module, self.parameters)
        if self.pairs is None:
            require_pair_source(trainer)
        else:
            contrast_pairs(trainer, self.pairs, self.n_pairs + self.checks.held_out, self.seed)
        if self.clean_side == "base" or self.control == "placebo" or self.checks.steering_alphas:
            require_completer(pl_module)

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> ConceptDirection:
        """Extract from the weights as they are now, and validate.

        Raises:
            ValueError: The direction does not separate held-out pairs.
        """
        direction = self._extract(trainer, pl_module, trainer.global_step)
        pairs = self._pair_set(trainer, pl_module)
        self._validation = check_separation(self.checks, lambda sequences: gradient_scores(trainer, pl_module, direction, sequences), pairs)
        facts: dict[str, Any] = {"separation": self._validation, "steering": self._steering(pl_module, direction, pairs)}
        return ConceptDirection(direction.vectors, direction.space, {**direction.metadata, "validation": facts})

    def refresh(self, trainer: Trainer, pl_module: LightningModule, step: int) -> ConceptDirection | None:
        """Extract again every ``refresh_every`` steps."""
        if self.refresh_every is None or step == 0 or step % self.refresh_every:
            return None
        return self._extract(trainer, pl_module, step)

    def metrics(self) -> dict[str, float]:
        """The number of pairs, and accuracy and AUC on the held-out ones (after a resume only the former)."""
        measured = {f"held_out_{key}": float(self._validation[key]) for key in ("accuracy", "auc") if key in self._validation}
        return {"pairs": float(self.n_pairs)} | measured

    def _pair_set(self, trainer: Trainer, pl_module: LightningModule) -> PairSet:
        if self._pairs is None:
            held_out = self.checks.held_out
            self._pairs = pair_set(trainer, pl_module, self.pairs, self.n_pairs, held_out, self.seed, self.clean_side, self.control)
        return self._pairs

    def _extract(self, trainer: Trainer, pl_module: LightningModule, step: int) -> ConceptDirection:
        pairs = self._pair_set(trainer, pl_module)
        names = matrix_names(pl_module, self.parameters)
        differences = pair_differences(trainer, pl_module, pairs.fit, names, self.method, self.chunk_size)
        facts = {"source": "gradient_difference", "step": step, **pairs.facts}
        direction = gradient_difference(differences, self.method, self.k, facts, normalize=self.normalize, noise_floor=self.noise_floor)
        return apply_control(direction, self.control, self.seed)

    def _steering(self, pl_module: LightningModule, direction: ConceptDirection, pairs: PairSet) -> dict[str, Any]:
        random = haar_random_like(direction, seed=self.seed)
        prompts = [pair.prompt for pair in pairs.held_out_text]

        def steered(alpha: float, at_random: bool) -> AbstractContextManager[None]:
            return stepped_towards(pl_module, random if at_random else direction, alpha)

        return steering_rates(pl_module, self.checks, prompts, text_detector(self.checks.detector), steered, self.seed)


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
    per_token = getattr(pl_module, "aggregation", None) == "grpo"  # that live loss is a mean over each completion's tokens
    gradients = [pair_gradient(trainer, pl_module, group, names, chunk_size, per_token) for group in groups]
    return {name: torch.stack([gradient[name] for gradient in gradients]) for name in names}
