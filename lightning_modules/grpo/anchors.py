"""What a window's gradient is compared with: log-probabilities of the policy that sampled and of the reference, without gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from theodolite.protocols import TokenSequence, Window

from .limits import LimitedModule


@dataclass(slots=True)
class Anchors:
    """Log-probabilities without gradient, by rollout index: of the policy before the first update, and of the reference."""

    old: dict[int, Tensor] = field(default_factory=dict)
    reference: dict[int, Tensor] = field(default_factory=dict)


class AnchoredModule(LimitedModule):
    """The passes of a window that need no gradient. Where memory runs out they are made in smaller parts, to the same numbers."""

    beta: float
    kl_estimator: str
    updates_per_window: int
    reuse_sampler_log_probs: bool
    overlap_sampling: bool = False

    @property
    def old_is_the_samplers(self) -> bool:
        """Whether ratios are taken against what the sampler reported; with one update, on policy, they are taken against nothing."""
        return self.overlap_sampling or (self.reuse_sampler_log_probs and self.updates_per_window > 1)

    @property
    def beta_in_loss(self) -> float:
        """Coefficient of the KL term of the loss; 0 where the penalty is part of the reward."""
        return 0.0 if self.kl_estimator == "k1_reward" else self.beta

    @torch.no_grad()
    def anchor_log_probs(self, window: Window, microbatches: Sequence[Sequence[int]]) -> Anchors:
        """Log-probabilities before the first update (none when on policy) and of the reference (none at beta 0).

        Raises:
            RuntimeError: One rollout alone does not fit into memory.
        """
        anchors = Anchors()
        for microbatch in microbatches:
            for found in self.in_fitting_parts(lambda indices: self._anchors(window, indices), microbatch):
                anchors.old |= found.old
                anchors.reference |= found.reference
        if self.old_is_the_samplers:
            as_sampled = {"dtype": torch.float32, "device": self.device}  # a precision plugin may make a coarser dtype the default
            anchors.old = {i: torch.tensor(window.rollouts[i].sampler_log_probs, **as_sampled) for m in microbatches for i in m}
        return anchors

    def _anchors(self, window: Window, indices: Sequence[int]) -> Anchors:
        anchors, sequences = Anchors(), [window.rollouts[i].tokens for i in indices]
        if self.updates_per_window > 1 and not self.old_is_the_samplers:
            anchors.old = _rows(indices, sequences, self.completion_log_probs(sequences)[0])
        if self.beta_in_loss > 0:
            anchors.reference = _rows(indices, sequences, self.reference_log_probs(sequences))
        return anchors

    @torch.no_grad()
    def reference_log_probs(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """(B, T) log-probabilities under the reference policy: the adapter switched off, or the frozen copy."""
        return self.base_log_probs(sequences, self.sampling.temperature)


def _rows(indices: Sequence[int], sequences: Sequence[TokenSequence], values: Tensor) -> dict[int, Tensor]:
    return {i: values[row, : len(sequence.completion_ids)] for row, (i, sequence) in enumerate(zip(indices, sequences, strict=True))}
