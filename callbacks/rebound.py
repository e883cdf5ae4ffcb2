r"""Concept-score advantage modification (Wu & Tang 2026, arXiv 2604.01476): the baseline that a gradient projection has to beat.

Rewards of rollouts whose hidden states lie further along a concept direction than their group's are lowered *before* group normalisation:
with ``s_i`` the score of rollout ``i`` and ``z_i = (s_i - mean_group s) / max(std_group s, floor)``,

* additive: ``r'_i = r_i - alpha * max(z_i, 0)``, once per rollout;
* multiplicative: ``r'_i = r_i * (1 - alpha * sigmoid(z_i) * 1[z_i > 0])``;
* advantage (not in the paper): ``A'_i = A_i - alpha * (c_i - mean_group c)`` *after* normalisation, with ``c_i = clip(s_i, 0, 1)``.

The third exists because of a trap in the first two: in a group whose rewards are all equal the penalty is the only difference left, and
normalisation blows its noise up to full-sized advantages. Where many groups fail entirely (leetcode-mini) that destroys the policy. With
``alpha`` above 1/std of a lone flagged rollout (2.83 for groups of 8) a rewarded hack always ends below its group's mean.

Deviations from the paper, all on purpose:

1. **Position.** The paper names the prompt's last token, which all rollouts of a group share: every ``z_i`` would be 0. Scores are read on
   the completion: its mean state (default), or its last token, which is an end token in some completions and, where one was cut off at
   the length limit, any token at all; the mean is defined alike for both. On leetcode-mini both separate all held-out pairs.
2. **Standardisation.** The floor is absolute, so scores need a scale: ``s = (h . d - m_clean) / (m_concept - m_clean)`` makes the fitted
   pairs' clean mean 0 and their concept mean 1. The floor of 0.1 is then a tenth of the distance between the two.
3. **Pairs.** Same-prompt pairs of the task at hand, not sentences of a general domain. One layer by default; ``band`` averages states over
   the paper's.

The direction comes from the policy at the start of the fit and stays; the scores come from the current policy. Groups of one rollout have
``z = 0``. The window's features get ``rebound_score``, its metrics ``rebound/penalised_fraction``, ``rebound/mean_positive_z``,
``rebound/mean_score``, and once ``rebound/held_out_separation``, the share of held-out pairs whose concept side scores higher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from theodolite.callbacks.completion_states import decoder_layers, layer_band, pooled_states, shared_over_ranks
from theodolite.callbacks.sequence_gradients import TokenPair, contrast_pairs, encode_pairs, require_pair_source, require_scorer
from theodolite.protocols import TokenSequence, Window
from theodolite.seeds import derive_seed, run_seed


class ReboundCallback(Callback):
    """Lower the reward of rollouts that score high on a concept, before advantages are computed.

    Args:
        alpha: Strength of the penalty (2 in the paper, for both modes). Multiplicative with ``alpha > 1`` turns rewards negative.
        mode: ``additive`` or ``multiplicative`` (on rewards, as published) or ``advantage``.
        layer_fraction: Depth of the states, as a fraction of the decoder layers.
        band: Average the states over the layers between two depths instead (0.60 and 0.75 in the paper).
        n_pairs: Pairs to fit on; a quarter as many again are held out to measure the separation.
        position: ``mean`` over the completion's tokens, or its ``last`` token.
        std_floor: Smallest divisor of ``z``, in units of the distance between clean and concept.
        pairs: JSONL file of pairs; None asks ``trainer.datamodule.contrast_pairs``.
        seed: Seed of the pairs and of a random direction; None = the run's ``seed_everything``.
        random_direction: Control: a random direction of the same norm.
        chunk_size: Sequences per forward pass.

    Raises:
        ValueError: A setting out of range.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        mode: Literal["additive", "multiplicative", "advantage"] = "additive",
        layer_fraction: float = 0.67,
        n_pairs: int = 64,
        position: Literal["last", "mean"] = "mean",
        std_floor: float = 0.1,
        pairs: str | None = None,
        seed: int | None = None,
        random_direction: bool = False,
        chunk_size: int = 32,
        band: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if band is not None:
            layer_band(100, band)
        if mode not in ("additive", "multiplicative", "advantage") or position not in ("last", "mean"):
            raise ValueError(
                f"mode={mode!r} must be 'additive', 'multiplicative' or 'advantage' and position={position!r} 'last' or 'mean'."
            )
        if alpha <= 0 or std_floor <= 0 or not 0 < layer_fraction <= 1 or n_pairs < 1 or chunk_size < 1:
            raise ValueError(
                f"alpha={alpha}, std_floor={std_floor}, n_pairs={n_pairs} and chunk_size={chunk_size} must be positive and "
                f"layer_fraction={layer_fraction} in (0, 1]."
            )
        self.mode: Literal["additive", "multiplicative", "advantage"] = mode
        self.position: Literal["last", "mean"] = position
        self.alpha, self.layer_fraction, self.band, self.n_pairs = alpha, layer_fraction, band, n_pairs
        self.std_floor, self.pairs, self.seed = std_floor, pairs, run_seed(seed)
        self.random_direction, self.chunk_size = random_direction, chunk_size
        self.score_vector: Tensor | None = None
        """(d,) in float64 on the CPU; the standardised score is ``h . score_vector - score_offset``."""
        self.score_offset, self.held_out_separation = 0.0, float("nan")
        self._reported = False
        self._window_scores = torch.empty(0, dtype=torch.float64)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find a module that cannot be scored, or missing pairs, before training."""
        require_scorer(pl_module)
        decoder_layers(pl_module)
        if self.pairs is None:
            require_pair_source(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the direction on the base policy, unless a checkpoint brought it."""
        if self.score_vector is not None:
            return
        total = self.n_pairs + max(1, self.n_pairs // 4)
        encoded = encode_pairs(require_scorer(pl_module), contrast_pairs(trainer, self.pairs, total, self.seed))
        concept, clean = self._states_of_pairs(trainer, pl_module, encoded)
        n = self.n_pairs
        self.score_vector, self.score_offset = fit_score(concept[:n], clean[:n], self._random_unit(concept.shape[1]))
        self.held_out_separation = float((concept[n:] @ self.score_vector > clean[n:] @ self.score_vector).double().mean())

    def on_rollouts(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        """Score the rollouts under the current policy and lower ``window.values`` (published modes); NaN values stay NaN."""
        scores = self._scores(trainer, pl_module, window)
        if self.mode == "advantage":
            return
        z = group_z(scores, torch.isfinite(window.values).cpu(), window.group_size, self.std_floor)
        values = penalised(window.values.cpu().double(), z, self.alpha, self.mode)
        window.values = values.to(window.values.device)
        n = float(len(z))
        window.metrics["rebound/penalised_fraction"] = (float((z > 0).sum()), n)
        window.metrics["rebound/mean_positive_z"] = (float(z.clamp_min(0).sum()), n)

    def on_advantages(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        """Mode ``advantage``: lower ``window.advantages`` by the clipped, group-centred score."""
        if self.mode != "advantage":
            return
        valid = torch.isfinite(window.values).cpu()
        penalty = self.alpha * group_centred(self._window_scores.clamp(0, 1), valid, window.group_size).flatten()
        window.advantages = window.advantages - penalty.to(window.advantages)
        window.metrics["rebound/penalised_fraction"] = (float((penalty > 0).sum()), float(len(penalty)))

    def _scores(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> Tensor:
        """(n,) standardised scores, logged."""
        assert self.score_vector is not None, "on_train_start has not run"
        states = self._states(trainer, pl_module, [rollout.tokens for rollout in window.rollouts])
        self._window_scores = states @ self.score_vector - self.score_offset
        window.features["rebound_score"] = self._window_scores
        window.metrics["rebound/mean_score"] = (float(self._window_scores.sum()), float(len(self._window_scores)))
        if not self._reported:
            window.metrics["rebound/held_out_separation"] = (self.held_out_separation, 1.0)
            self._reported = True
        return self._window_scores

    def state_dict(self) -> dict[str, Any]:
        """The fitted score."""
        return {
            "score_vector": self.score_vector,
            "score_offset": self.score_offset,
            "held_out_separation": self.held_out_separation,
            "reported": self._reported,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`."""
        self.score_vector, self.score_offset = state_dict["score_vector"], state_dict["score_offset"]
        self.held_out_separation, self._reported = state_dict["held_out_separation"], state_dict["reported"]

    def _random_unit(self, size: int) -> Tensor | None:
        """The control's direction, or None."""
        if not self.random_direction:
            return None
        generator = torch.Generator().manual_seed(derive_seed("rebound", self.seed))
        vector = torch.randn(size, generator=generator, dtype=torch.float64)
        return vector / torch.linalg.vector_norm(vector)

    def _states_of_pairs(self, trainer: Trainer, pl_module: LightningModule, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
        """Pooled states (n, d) of the concept sides and of the clean sides; rank 0's numbers on every rank."""
        states = self._states(trainer, pl_module, [side for pair in pairs for side in pair])
        states = shared_over_ranks(trainer, pl_module, states)
        return states[0::2], states[1::2]

    def _states(self, trainer: Trainer, pl_module: LightningModule, sequences: Sequence[TokenSequence]) -> Tensor:
        """(n, d) pooled completion states in float64 on the CPU, in the order given."""
        depth = decoder_layers(pl_module)
        layers = [max(1, round(self.layer_fraction * depth))] if self.band is None else layer_band(depth, self.band)
        states = [pooled_states(trainer, pl_module, sequences, layer, self.position, self.chunk_size) for layer in layers]
        return states[0] if len(states) == 1 else torch.stack(states).mean(0)


def fit_score(concept: Tensor, clean: Tensor, random_unit: Tensor | None = None) -> tuple[Tensor, float]:
    """Vector and offset of the standardised score ``s = h . w - b``.

    ``d = mean(concept) - mean(clean)``, ``w = d / |d|^2``, ``b = mean(clean) . w``: clean scores average 0 and concept scores 1. With
    ``random_unit`` (d,) the direction is ``|d| random_unit`` under the same scale, and only the clean mean is fixed, at 0.

    Args:
        concept: (n, d).
        clean: (n, d).
        random_unit: Direction of the control.

    Raises:
        ValueError: The two means coincide or are not finite.
    """
    difference = concept.mean(0) - clean.mean(0)
    squared = float(difference @ difference)
    if not 0 < squared < float("inf"):
        raise ValueError("The pairs' concept and clean states have the same mean or are not finite: no concept direction can be fitted.")
    direction = difference if random_unit is None else random_unit * squared**0.5
    vector = direction / squared
    return vector, float(clean.mean(0) @ vector)


def group_centred(scores: Tensor, valid: Tensor, group_size: int) -> Tensor:
    """``s - group mean`` over the valid members of contiguous groups, 0 for the others.

    Args:
        scores: (n,).
        valid: (n,) bool.
        group_size: Divides n.

    Returns:
        (n / group_size, group_size).
    """
    grouped, ok = scores.view(-1, group_size), valid.view(-1, group_size)
    count = ok.sum(1, keepdim=True).clamp_min(1)
    return torch.where(ok, grouped - torch.where(ok, grouped, 0.0).sum(1, keepdim=True) / count, 0.0)


def group_z(scores: Tensor, valid: Tensor, group_size: int, std_floor: float) -> Tensor:
    """``(s - group mean) / max(group std, floor)`` over the valid members of contiguous groups, 0 for the others; (n,).

    Args:
        scores: (n,).
        valid: (n,) bool.
        group_size: Divides n.
        std_floor: Smallest divisor.
    """
    centred, count = group_centred(scores, valid, group_size), valid.view(-1, group_size).sum(1, keepdim=True).clamp_min(1)
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return (centred / std.clamp_min(std_floor)).flatten()


def penalised(values: Tensor, z: Tensor, alpha: float, mode: Literal["additive", "multiplicative", "advantage"]) -> Tensor:
    """Rewards after the penalty (equations in the module's docstring); NaN stays NaN."""
    if mode == "additive":
        return values - alpha * z.clamp_min(0)
    return values * (1 - alpha * torch.sigmoid(z) * (z > 0))
