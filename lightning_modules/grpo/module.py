"""GRPO with manual optimisation: one window of rollouts per training step, with hooks for callbacks at every stage.

A window is: sync -> rollouts -> grades -> advantages -> microbatches -> gradient sum over ranks -> callbacks -> clip -> step.

Run it (CPU, embedded problems, a policy made by the warm start)::

    theodolite fit --config configs/grpo/mini.yaml --model.policy runs/warm_start/policy

On several processes the same config computes the same numbers::

    torchrun --nproc_per_node=2 train.py fit --config configs/grpo/mini.yaml --trainer.devices=2 --trainer.strategy=ddp ...

Where this differs from the GRPO paper (arXiv 2402.03300): the loss is summed over tokens with one global denominator (``dapo``; the paper's
per-sequence mean is ``grpo``), there is no KL term unless ``beta`` > 0, and its estimator has the reverse KL's gradient (``k3_is``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from theodolite.batch_arithmetic import BatchArithmetic, split_batch
from theodolite.distributed import gather_objects, sum_gradients
from theodolite.functional.advantages import group_advantages, has_signal
from theodolite.functional.policy_loss import WindowTotals, clipped_surrogate, kl_penalty, log_ratio, token_weights
from theodolite.protocols import Grade, Reward, Rollout, TokenSequence, Verdict, Window

from ..evaluation import add_sums, outcome_sums
from ..policy_module import PolicyModule
from .hooks import call_window_hook, oracle_users

Sums = dict[str, tuple[float, float]]


class GRPOModule(PolicyModule):
    """Group-relative policy optimisation of a causal language model on an environment.

    Args:
        group_size: Completions per prompt.
        aggregation: ``dapo`` (mean over all tokens of the window), ``dr_grpo`` (sum over a constant) or ``grpo`` (mean over rollouts of
            per-rollout means); all with a denominator that is global over microbatches and ranks.
        advantage_scale: Divide centred rewards by nothing (``none``), the group's or the window's standard deviation (``batch``).
        clip_low: Lower clipping distance of the importance sampling ratio.
        clip_high: Upper clipping distance.
        updates_per_window: Optimizer steps per window of rollouts; with 1 every step is on policy and clipping never acts.
        beta: Coefficient of the KL term against the reference policy (adapter off, or a frozen copy); 0 = no reference is kept.
        kl_estimator: ``k3_is``, ``k3`` or ``k2``.
        policy_args: Everything else: see :class:`~theodolite.lightning_modules.policy_module.PolicyModule`.
    """

    def __init__(
        self,
        group_size: int = 8,
        aggregation: str = "dapo",
        advantage_scale: str = "group",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        updates_per_window: int = 1,
        beta: float = 0.0,
        kl_estimator: str = "k3_is",
        **policy_args: Any,
    ) -> None:
        super().__init__(**policy_args)
        self.save_hyperparameters()
        _choice("aggregation", aggregation, ("dapo", "dr_grpo", "grpo"))
        _choice("advantage_scale", advantage_scale, ("none", "group", "batch"))
        _choice("kl_estimator", kl_estimator, ("k2", "k3", "k3_is"))
        if group_size < 2:
            raise ValueError(f"model.group_size is {group_size}; a group-relative advantage needs at least 2 completions per prompt.")
        if updates_per_window < 1:
            raise ValueError(f"model.updates_per_window is {updates_per_window}; it must be at least 1.")
        if beta < 0:
            raise ValueError(f"model.beta is {beta}; a negative KL coefficient would push away from the reference, use 0 or more.")
        self.group_size, self.aggregation, self.advantage_scale = group_size, aggregation, advantage_scale
        self.clip_low, self.clip_high, self.updates_per_window = clip_low, clip_high, updates_per_window
        self.beta, self.kl_estimator = beta, kl_estimator
        self.batch_arithmetic: BatchArithmetic | None = None
        self._reference: list[Any] = []  # in a list so that it is no submodule: never trained, moved or saved with the policy

    # ------------------------------------------------------------------ start

    def configure_model(self) -> None:
        """Build the policy, and the reference it starts from: before a checkpoint can replace the weights."""
        super().configure_model()
        if self.beta > 0 and self.lora is None and not self._reference:
            self._reference.append(copy.deepcopy(self.causal_lm).requires_grad_(False).eval())

    def on_fit_start(self) -> None:
        """Split the global batch, and say who may see the oracle's labels."""
        prompts = getattr(self._datamodule(), "global_batch_size", None)
        if not isinstance(prompts, int):
            raise TypeError(
                f"{type(self._datamodule()).__name__} does not say global_batch_size; GRPO needs the global number of prompts per step."
            )
        self.batch_arithmetic = split_batch(prompts, self.trainer.world_size, self.group_size, self.micro_batch_size)
        self._check_ranks()
        users = oracle_users(cast(Any, self.trainer).callbacks)
        if users:
            rank_zero_info(f"uses_oracle: {', '.join(users)} may see the oracle's labels in this run.")

    def on_train_start(self) -> None:
        """Switch dropout off for good: between sampling, old, new and reference log-probabilities it would be noise in every ratio."""
        self.causal_lm.eval()

    def _check_ranks(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, ParallelStrategy) and type(strategy).__name__ not in ("DDPStrategy", "SingleDeviceStrategy"):
            raise ValueError(
                f"GRPO runs on a single device or with strategy ddp; {type(strategy).__name__} shards what the sampler decodes with."
            )

    # ------------------------------------------------------------------ one window

    def training_step(self, batch: list[Any], batch_idx: int) -> None:
        """One window: rollouts, grades, advantages, gradients, ``updates_per_window`` optimizer steps."""
        self.seconds = {}
        window, verdicts = self.collect(batch)
        self._hook("on_rollouts", window, verdicts)
        with self.timed("advantages"):
            window.advantages = self.global_advantages(window.values)
        self._hook("on_advantages", window, verdicts)
        totals = self.totals(window)
        repeats = self.merge_repeats(window)
        microbatches = self.microbatches(window, repeats)
        with self.timed("scoring"):
            anchors = self.anchor_log_probs(window, microbatches)
        sums: list[Sums] = [self.rollout_sums(window, verdicts), window.metrics]
        optimizer = cast(LightningOptimizer, self.optimizers())
        lr = float(optimizer.param_groups[0]["lr"])
        for _ in range(self.updates_per_window):
            optimizer.zero_grad()
            with self.timed("gradients"):
                sums.append(self.accumulate(window, microbatches, totals, repeats, anchors, verdicts))
                sum_gradients(self.trainable_parameters())
            with self.timed("update"):
                optimizer.step()
                cast(Any, self.lr_schedulers()).step()
            for callback in cast(Any, self.trainer).callbacks:
                if hasattr(callback, "on_after_optimizer_step"):
                    callback.on_after_optimizer_step(self.trainer, self, optimizer.optimizer)
        self._log_window(sums, lr)

    def collect(self, batch: list[Any]) -> tuple[Window, list[Verdict]]:
        """Sample and grade this rank's groups. The verdicts come apart from the window: advantages cannot reach them."""
        step = self.trainer.global_step
        with self.timed("rollouts"):
            self.engine.onload()
            self.engine.sync(step)
            prompts, groups = self.sample(batch, self.group_size, self.sampling, "rollouts", step)
            self.engine.offload()
        rollouts = [
            Rollout(
                tokens=TokenSequence(prompts[g], sample.ids),
                text=self.decode(sample.ids),
                sampler_log_probs=sample.log_probs,
                finish=sample.finish,
                problem=batch[g].id,
                slot=self.slot(g),
                sample=i,
                weight_version=sample.weight_version,
            )
            for g, group in enumerate(groups)
            for i, sample in enumerate(group)
        ]
        with self.timed("grading"):
            grades = self.environment.grade([row for row in batch for _ in range(self.group_size)], [r.text for r in rollouts])
        rewards: list[Reward] = [grade.reward for grade in grades]
        values = torch.tensor([reward.value for reward in rewards], dtype=torch.float64)
        return Window(step, list(batch), rollouts, rewards, self.group_size, values), [grade.verdict for grade in grades]

    def global_advantages(self, values: Tensor) -> Tensor:
        """Advantages of this rank's rollouts, with every statistic taken over the window of all ranks."""
        parts = gather_objects(values)
        by_slot = torch.stack([part.view(-1, self.group_size) for part in parts], dim=1).reshape(-1)
        advantages = group_advantages(by_slot, self.group_size, cast(Any, self.advantage_scale))
        return advantages.view(-1, len(parts), self.group_size)[:, self.global_rank].reshape(-1)

    def totals(self, window: Window) -> WindowTotals:
        """Global denominators, over every scorable rollout of every rank, before the first backward pass."""
        lengths = [len(r.tokens.completion_ids) for r, v in zip(window.rollouts, window.values.tolist(), strict=True) if v == v]
        counts = torch.tensor(gather_objects((sum(lengths), sum(n > 0 for n in lengths), len(lengths)))).sum(dim=0).tolist()
        return WindowTotals(*counts, max_length=self.sampling.max_new_tokens)

    def merge_repeats(self, window: Window) -> Tensor:
        """How often each rollout stands for itself and its identical siblings; 0 for those that another stands for.

        On policy the ratio is 1 and the loss is linear in the advantage, so identical completions of a prompt are computed once, with
        their mean advantage and their number as weight: exactly the same gradient. With several updates per window the clip is not linear
        and nothing is merged. ``window.advantages`` becomes the mean over siblings.
        """
        repeats = torch.ones(len(window.rollouts), dtype=torch.float64)
        if self.updates_per_window > 1:
            return repeats
        siblings: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for i, (rollout, value) in enumerate(zip(window.rollouts, window.values.tolist(), strict=True)):
            if value == value:
                siblings.setdefault((rollout.slot, rollout.tokens.completion_ids), []).append(i)
        window.advantages = window.advantages.clone()
        for indices in siblings.values():
            window.advantages[indices] = window.advantages[indices].mean()
            repeats[indices] = 0.0
            repeats[indices[0]] = len(indices)
        return repeats

    def microbatches(self, window: Window, repeats: Tensor) -> list[list[int]]:
        """Indices of this rank's rollouts that carry a gradient, sorted by length and cut into microbatches.

        Without a KL term a rollout with advantage 0 contributes exactly nothing and is left out (the denominators still count it).
        """
        active = [
            i
            for i, rollout in enumerate(window.rollouts)
            if rollout.tokens.completion_ids
            and repeats[i] > 0
            and not window.values[i].isnan()
            and (window.advantages[i] != 0 or self.beta > 0)
        ]
        active.sort(key=lambda i: (-len(window.rollouts[i].tokens.completion_ids), i))
        size = self.micro_batch_size or max(1, len(active))
        return [active[i : i + size] for i in range(0, len(active), size)]

    @torch.no_grad()
    def anchor_log_probs(self, window: Window, microbatches: Sequence[Sequence[int]]) -> list[tuple[Tensor | None, Tensor | None]]:
        """Per microbatch: log-probabilities before the first update (None when on policy) and of the reference (None at beta 0)."""
        anchors: list[tuple[Tensor | None, Tensor | None]] = []
        for indices in microbatches:
            sequences = [window.rollouts[i].tokens for i in indices]
            old = self.completion_log_probs(sequences)[0] if self.updates_per_window > 1 else None
            reference = self.reference_log_probs(sequences) if self.beta > 0 else None
            anchors.append((old, reference))
        return anchors

    @torch.no_grad()
    def reference_log_probs(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """(B, T) log-probabilities under the reference policy: the adapter switched off, or the frozen copy."""
        if self.lora is not None:
            with cast(Any, self.causal_lm).disable_adapter():
                return self._log_probs(self.causal_lm, sequences)[0]
        return self._log_probs(self._reference[0].to(self.device), sequences)[0]

    # ------------------------------------------------------------------ gradients

    def accumulate(
        self,
        window: Window,
        microbatches: Sequence[Sequence[int]],
        totals: WindowTotals,
        repeats: Tensor | None = None,
        anchors: Sequence[tuple[Tensor | None, Tensor | None]] | None = None,
        verdicts: Sequence[Verdict] = (),
    ) -> Sums:
        """Add the window's gradient to ``p.grad``, microbatch by microbatch; local to this rank until summed.

        Args:
            window: Rollouts with advantages.
            microbatches: Lists of rollout indices, in any split.
            totals: Global denominators.
            repeats: (n,) weight of each rollout, as :meth:`merge_repeats` returns it; None = 1 each.
            anchors: As :meth:`anchor_log_probs` returns them; None = on policy, no reference.
            verdicts: Passed on to callbacks that use the oracle.

        Returns:
            (sum, count) pairs for logging; ``loss`` is a sum whose count is 0.
        """
        sums: list[Sums] = []
        for k, indices in enumerate(microbatches):
            old, reference = anchors[k] if anchors is not None else (None, None)
            weights = None if repeats is None else repeats[list(indices)]
            loss, part = self.microbatch_loss(window, indices, totals, weights, old, reference)
            with self._without_gradient_sync():
                self.manual_backward(loss)
            sums.append(part)
            self._hook("on_microbatch_gradients", window, verdicts, "policy")
        return add_sums(sums)

    def microbatch_loss(
        self,
        window: Window,
        indices: Sequence[int],
        totals: WindowTotals,
        repeats: Tensor | None,
        old: Tensor | None,
        reference: Tensor | None,
    ) -> tuple[Tensor, Sums]:
        """This microbatch's share of the window's loss, and token-weighted statistics."""
        rollouts = [window.rollouts[i] for i in indices]
        log_probs, mask = self.completion_log_probs([rollout.tokens for rollout in rollouts])
        advantages = window.advantages[list(indices)].to(log_probs)[:, None]
        difference = log_ratio(log_probs, log_probs.detach() if old is None else old, mask)
        ratio = difference.exp()
        token_loss = clipped_surrogate(ratio, advantages, self.clip_low, self.clip_high)
        weights = mask if repeats is None else mask * repeats.to(mask)[:, None]
        sampler = _pad_rows([rollout.sampler_log_probs for rollout in rollouts], log_probs)
        gap = torch.where(mask.bool(), log_probs.detach() - sampler, 0.0).abs()
        clipped = ((ratio < 1 - self.clip_low) & (advantages < 0)) | ((ratio > 1 + self.clip_high) & (advantages > 0))
        statistics = {"sampler_gap": gap, "clip_fraction": clipped.float()}
        if reference is not None:
            token_loss = token_loss + self.beta * kl_penalty(log_probs, reference, ratio, mask, cast(Any, self.kl_estimator))
            statistics["kl"] = kl_penalty(log_probs.detach(), reference, ratio, mask, "k3")
        per_rollout = 1.0 if repeats is None else repeats.to(mask)[:, None]
        loss = (token_weights(mask, cast(Any, self.aggregation), totals) * per_rollout * token_loss).sum()
        tokens = float(weights.sum())
        sums: Sums = {name: (float((value * weights).sum()), tokens) for name, value in statistics.items()}
        return loss, sums | {"loss": (float(loss.detach()), 0.0)}

    def _hook(self, name: str, window: Window, verdicts: Sequence[Verdict], *extra: Any) -> None:
        with self.timed("hooks"):
            call_window_hook(name, self.trainer, self, window, verdicts, *extra)

    # ------------------------------------------------------------------ logging

    def rollout_sums(self, window: Window, verdicts: Sequence[Verdict]) -> Sums:
        """(sum, count) pairs of this rank's rollouts: reward and oracle side by side."""
        grades = [Grade(reward, verdict) for reward, verdict in zip(window.rewards, verdicts, strict=True)]
        outcomes = outcome_sums(grades, [rollout.finish for rollout in window.rollouts])
        scored = [r.value for r in window.rewards if r.value == r.value]
        lengths = [len(r.sampler_log_probs) for r in window.rollouts]
        signal = has_signal(window.values, self.group_size)
        surprise = -sum(sum(r.sampler_log_probs) for r in window.rollouts)
        return {f"{name}_rate": pair for name, pair in outcomes.items()} | {
            "reward_mean": (sum(scored), len(scored)),
            "completion_tokens": (sum(lengths), len(lengths)),
            "entropy_estimate": (surprise, sum(lengths)),
            "groups_with_signal": (float(signal.sum()), len(signal)),
        }

    def _log_window(self, sums: Sequence[Sums], lr: float) -> None:
        totals = add_sums([part for parts in gather_objects(list(sums)) for part in parts])
        loss, _ = totals.pop("loss", (0.0, 0.0))
        metrics = {f"train/{name}": total / count if count else float("nan") for name, (total, count) in totals.items()}
        metrics["train/loss"] = loss / self.updates_per_window
        seconds = gather_objects(self.seconds)
        metrics |= {f"time/{phase}_s": max(s.get(phase, 0.0) for s in seconds) for phase in self.seconds}
        metrics["train/lr"] = lr
        self.log_dict(metrics, rank_zero_only=False, sync_dist=False)
        shown = {"reward": metrics["train/reward_mean"], "hack": metrics["train/hack_rate"], "pass": metrics["train/pass_rate"]}
        self.log_dict(shown, prog_bar=True, logger=False)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"model.{name} is {value!r}; choose one of {', '.join(choices)}.")


def _pad_rows(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    padded = torch.zeros_like(like)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.tensor(values, dtype=like.dtype)
    return padded
