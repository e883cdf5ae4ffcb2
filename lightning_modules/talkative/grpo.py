"""GRPO of the verbaliser: each activation gets a group of texts, the reward is how well the in-loop reconstructor reads them.

Run it (CPU; the toy system, after its warm start)::

    theodolite fit --config configs/talkative/sft.yaml --config configs/talkative/grpo.yaml --model.weights runs/sft/talkative

On several processes the same config computes the same numbers::

    torchrun --nproc_per_node=2 train.py fit --config configs/talkative/sft.yaml --config configs/talkative/grpo.yaml --trainer.devices=2

The objective is ``theodolite.functional``'s, on policy: one optimizer step per window of texts. The in-loop reconstructor regresses the
same texts in the same step, since a frozen one is soon exploited. The held-out one gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from theodolite.distributed import gather_objects
from theodolite.functional.advantages import group_advantages, has_signal
from theodolite.functional.policy_loss import WindowTotals, clipped_surrogate, kl_penalty, log_ratio, token_weights
from theodolite.protocols import ActivationRows
from theodolite.seeds import derive_seed

from ..evaluation import add_sums
from ..scoring import selected_log_probs
from .module import Sums, TalkativeModule
from .regularisers import Regularisers
from .settings import choice


@dataclass(slots=True)
class TextWindow:
    """The texts of one step on this rank; group after group.

    Attributes:
        activations: (R, d).
        index: (R * G,) the activation of each text.
        ids: (R * G, T) as sampled.
        mask: (R * G, T), 1 on tokens.
        texts: As they are read back; empty where unusable.
        sampler_log_probs: (R * G, T).
        rewards: (R * G,) float64.
        advantages: (R * G,) float64.
        repeats: (R * G,) how many texts of its group each stands for; all 1 before :meth:`merged`.
    """

    activations: Tensor
    index: Tensor
    ids: Tensor
    mask: Tensor
    texts: list[str]
    sampler_log_probs: Tensor
    rewards: Tensor
    advantages: Tensor
    repeats: Tensor

    def merged(self) -> TextWindow:
        """The distinct texts of every group, each with its number and the mean advantage of its copies.

        On policy the loss is linear in the advantage, so the gradient is exactly that of all texts.
        """
        lengths = self.mask.sum(dim=1, keepdim=True).long()
        keys = torch.cat([self.index[:, None], lengths, self.ids], dim=1).cpu()
        _, group, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
        total = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, group, self.advantages)
        first = torch.full((len(counts),), len(group)).scatter_reduce_(0, group, torch.arange(len(group)), "amin")
        at = first.to(self.ids.device)
        texts = [self.texts[i] for i in first.tolist()]
        parts = (self.index[at], self.ids[at], self.mask[at], texts, self.sampler_log_probs[at])
        return TextWindow(self.activations, *parts, self.rewards[first], total / counts, counts.double())


class TalkativeGRPO(TalkativeModule):
    """Group-relative policy optimisation of the verbaliser, with the reconstructor learning online.

    The reward of a text is the negative loss of its reconstruction. A text that is empty or does not end is rewarded as a reconstruction
    that says nothing: the mean activation.

    Args:
        group_size: Texts per activation.
        aggregation: ``dapo``, ``dr_grpo`` or ``grpo``; see :func:`theodolite.functional.policy_loss.token_weights`.
        advantage_scale: ``none``, ``group``, ``batch`` or ``rloo``; see :func:`theodolite.functional.advantages.group_advantages`.
        beta: Weight of the KL penalty against the verbaliser as it was at the start of the run; 0 = none.
        kl_estimator: ``k2``, ``k3`` or ``k3_is``.
        train_reconstructor: Let the in-loop reconstructor learn from the same texts.
        lm_kl: Weight of the KL to the plain language model.
        natural_prefix: The text that the language model continues.
        entropy: Weight of the entropy bonus.
        module_args: Everything else: see :class:`~theodolite.lightning_modules.talkative.module.TalkativeModule`.
    """

    def __init__(
        self,
        group_size: int = 8,
        aggregation: str = "dr_grpo",
        advantage_scale: str = "group",
        beta: float = 0.01,
        kl_estimator: str = "k3_is",
        train_reconstructor: bool = True,
        lm_kl: float = 0.0,
        natural_prefix: str = "",
        entropy: float = 0.0,
        **module_args: Any,
    ) -> None:
        super().__init__(**module_args)
        self.save_hyperparameters(ignore=["verbaliser", "reconstructor", "held_out"])
        choice("aggregation", aggregation, ("dapo", "dr_grpo", "grpo"))
        choice("advantage_scale", advantage_scale, ("none", "group", "batch", "rloo"))
        choice("kl_estimator", kl_estimator, ("k2", "k3", "k3_is"))
        if group_size < 2:
            raise ValueError(f"model.group_size is {group_size}; a group-relative advantage needs at least 2 texts per activation.")
        if beta < 0:
            raise ValueError(f"model.beta is {beta}; a negative KL coefficient would push away from the reference, use 0 or more.")
        self.group_size = self.texts_per_row = group_size
        self.aggregation, self.advantage_scale = cast(Any, aggregation), cast(Any, advantage_scale)
        self.beta, self.kl_estimator, self.train_reconstructor = beta, cast(Any, kl_estimator), train_reconstructor
        self.regularisers = Regularisers(lm_kl, natural_prefix, entropy)
        self._readable = 0.0  # usable texts of the window, over all ranks

    def freeze_parts(self) -> None:
        """The in-loop reconstructor may learn; a held-out one never does."""
        for name, reader in self.texts_to_vectors.items():
            if name != "reconstructor" or not self.train_reconstructor:
                reader.requires_grad_(False)

    # ------------------------------------------------------------------ one window

    def accumulate(self, rows: ActivationRows) -> Sums:
        """Texts, rewards, advantages, then gradients microbatch by microbatch."""
        window = self.collect(rows)
        totals = self.totals(window)
        sums = [self.window_sums(window)]
        window = window.merged()
        with self.timed("gradients"):
            for part in self.microbatches(len(window.index)):
                loss, found = self.microbatch_loss(window, part, totals)
                self.backward_part(loss)
                sums.append(found)
        return add_sums(sums)

    def collect(self, rows: ActivationRows) -> TextWindow:
        """Write a group of texts per activation and reward them; randomness is named by (run seed, step, row, sample)."""
        activations = rows.activations.to(self.device)
        seeds = [
            [derive_seed(self.run_seed, "rollouts", self.trainer.global_step, row, sample) for sample in range(self.group_size)]
            for row in rows.ids
        ]
        with self.timed("rollouts"):
            decoded = self.writer.write(activations, seeds, self.sampling)
        index = torch.arange(len(rows.ids), device=self.device).repeat_interleave(self.group_size)
        texts = self.texts(decoded)
        with self.timed("rewards"):
            rewards = self.rewards(texts, activations[index])
        steps = torch.arange(decoded.ids.shape[1])
        mask = (steps < decoded.lengths[:, None]).float()
        log_probs = decoded.log_probs.to(self.device)
        advantages = self.global_advantages(rewards)
        ids, once = decoded.ids.to(self.device), torch.ones_like(rewards)
        return TextWindow(activations, index, ids, mask.to(self.device), texts, log_probs, rewards, advantages, once)

    @torch.no_grad()
    def rewards(self, texts: Sequence[str], activations: Tensor) -> Tensor:
        """(B,) float64: minus the in-loop reconstructor's loss; for an unusable text that of the mean activation."""
        usable = torch.tensor([bool(text) for text in texts], device=self.device)
        read = torch.where(usable[:, None], self.in_loop.read(texts), 0.0)
        return -self.row_errors(read, activations).double().cpu()

    def global_advantages(self, rewards: Tensor) -> Tensor:
        """Advantages of this rank's texts, with every statistic taken over the window of all ranks."""
        parts = gather_objects(rewards)
        advantages = group_advantages(torch.cat(parts), self.group_size, self.advantage_scale)
        return advantages.split([len(part) for part in parts])[self.global_rank]

    def totals(self, window: TextWindow) -> WindowTotals:
        """Global denominators, before the first backward pass."""
        usable = sum(bool(text) for text in window.texts)
        lengths = window.mask.sum(dim=1)
        local = (float(lengths.sum()), float((lengths > 0).sum()), float(len(lengths)), float(usable))
        tokens, sequences, rollouts, self._readable = torch.tensor(gather_objects(local)).sum(dim=0).tolist()
        return WindowTotals(tokens, sequences, rollouts, max_length=self.sampling.max_new_tokens)

    def microbatch_loss(self, window: TextWindow, part: slice, totals: WindowTotals) -> tuple[Tensor, Sums]:
        """This microbatch's share of the window's loss: the policy's, and the reconstructor's on the same texts."""
        first, last = int(window.index[part][0]), int(window.index[part][-1]) + 1
        activations, index = window.activations[first:last], window.index[part] - first
        ids, mask = window.ids[part], window.mask[part]
        logits = self.writer(activations, index, ids, mask) / self.sampling.temperature
        log_probs = torch.where(mask.bool(), selected_log_probs(logits, ids), 0.0)
        ratio = log_ratio(log_probs, log_probs.detach(), mask).exp()
        token_loss = clipped_surrogate(ratio, window.advantages[part].to(log_probs)[:, None])
        gap = torch.where(mask.bool(), log_probs.detach() - window.sampler_log_probs[part], 0.0).abs()
        terms = {"sampler_gap": gap}
        if self.beta > 0:
            reference = self.reference_logits(activations, index, ids, mask) / self.sampling.temperature
            reference_log_probs = torch.where(mask.bool(), selected_log_probs(reference, ids), 0.0)
            token_loss = token_loss + self.beta * kl_penalty(log_probs, reference_log_probs, ratio, mask, self.kl_estimator)
            terms["kl"] = kl_penalty(log_probs.detach(), reference_log_probs, ratio, mask, "k3")
        extra, more = self.regularisers(self, logits, activations, index, ids, mask)
        repeats = window.repeats[part].to(log_probs)
        policy = (token_weights(mask, self.aggregation, totals) * repeats[:, None] * (token_loss + extra)).sum()
        weights = mask * repeats[:, None]
        sums: Sums = {name: (float((value * weights).sum()), float(weights.sum())) for name, value in (terms | more).items()}
        reading = policy.new_zeros(())
        if self.train_reconstructor:
            reading = self.reconstructor_loss(window.texts[part], activations[index], repeats)
        losses = {"policy_loss": policy, "reconstructor_loss": reading, "loss": policy + reading}
        return policy + reading, sums | {name: (float(value.detach()), 0.0) for name, value in losses.items()}

    def reconstructor_loss(self, texts: Sequence[str], activations: Tensor, repeats: Tensor) -> Tensor:
        """This microbatch's share of the mean error over all usable texts of the window; each text weighs ``repeats`` (B,)."""
        usable = [i for i, text in enumerate(texts) if text]
        if not usable:
            return activations.new_zeros(())
        read = self.in_loop(*self.in_loop.encode([texts[i] for i in usable]))
        return (self.row_errors(read, activations[usable]) * repeats[usable]).sum() / max(self._readable, 1.0)

    def window_sums(self, window: TextWindow) -> Sums:
        """(sum, count) pairs of this rank's texts."""
        signal = has_signal(window.rewards, self.group_size)
        lengths = window.mask.sum(dim=1)
        unusable = sum(not text for text in window.texts)
        count = float(len(window.texts))
        return {
            "reward_mean": (float(window.rewards.sum()), count),
            "unusable_rate": (float(unusable), count),
            "text_tokens": (float(lengths.sum()), count),
            "entropy_estimate": (-float(window.sampler_log_probs.sum()), float(lengths.sum())),
            "groups_with_signal": (float(signal.sum()), float(len(signal))),
        }
