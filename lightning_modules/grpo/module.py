"""GRPO with manual optimisation: one window of rollouts per training step, with hooks for callbacks at every stage.

A window is: sync -> rollouts -> grades -> advantages -> microbatches -> gradient sum over ranks -> callbacks -> clip -> step. docs/grpo.md
has the whole of it: objectives, paths, hooks, and what every logged number means.

Run it (CPU, embedded problems, a policy made by the warm start)::

    theodolite fit --config configs/grpo/mini.yaml --model.policy runs/warm_start/policy

On several processes the same config computes the same numbers::

    torchrun --nproc_per_node=2 train.py fit --config configs/grpo/mini.yaml --trainer.devices=2 --trainer.strategy=ddp ...

Where this differs from the GRPO paper (arXiv 2402.03300): the loss is summed over tokens with one global denominator (``dapo``; the paper's
per-sequence mean is ``grpo``), there is no KL term unless ``beta`` > 0, and its estimator has the reverse KL's gradient (``k3_is``).
"""

from __future__ import annotations

import copy
import random
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from theodolite.batch_arithmetic import BatchArithmetic, split_batch
from theodolite.distributed import gather_objects
from theodolite.functional.advantages import gdpo_advantages, group_advantages
from theodolite.protocols import Window
from theodolite.seeds import derive_seed

from ..merged_adapter import check_merging
from ..sharded_weights import check_sharding
from ..split_prefix import take_apart
from .balance import Share, balance
from .collection import CollectionModule
from .hooks import measures_parts, oracle_users, wants_parts
from .losses import build_loss
from .mismatch import settled_mismatch
from .reporting import log_window, rollout_sums, write_table
from .self_check import check_gradient_path
from .settings import check_preview, check_reserve, check_settings
from .window import REPLAYED, foreign

Sums = dict[str, tuple[float, float]]


class GRPOModule(CollectionModule):
    """Group-relative policy optimisation of a causal language model on an environment.

    Args:
        group_size: Completions per prompt.
        aggregation: ``dapo`` (mean over all tokens of the window), ``dr_grpo`` (sum over a constant), ``grpo`` (mean over rollouts of
            per-rollout means) or ``seq_mean_token_sum``; all with a denominator that is global over microbatches and ranks.
        advantage_scale: Divide centred rewards by nothing (``none``), the group's or the window's standard deviation (``batch``), or take
            each against the mean of the others (``rloo``).
        clip_low: Lower clipping distance of the importance sampling ratio.
        clip_high: Upper clipping distance.
        loss: ``class_path`` and ``init_args`` of another loss, e.g. ``CISPOLoss`` or ``ClippedLoss`` with ``ratio: sequence`` (GSPO), from
            :mod:`theodolite.lightning_modules.grpo.losses` or your own module; null = the clipped surrogate on token ratios.
        updates_per_window: Optimizer steps per window of rollouts; with 1 every step is on policy and clipping never acts.
        beta: Coefficient of the KL term against the reference policy (adapter off, or a frozen copy); 0 = no reference is kept.
        kl_estimator: ``k3_is``, ``k3`` or ``k2`` in the loss; ``k1_reward`` subtracts the estimate from the reward instead.
        reward_weights: Weight of each named component of a reward; null = the environment's own sum.
        reward_mix: ``sum`` weights and adds components before advantages; ``gdpo`` normalises each within its group first.
        overlong_buffer: Tokens before ``max_new_tokens`` over which a penalty grows from 0 to 1; 0 = off.
        truncated: Completions without an end token: ``keep``, ``mask`` (no loss, not in the denominators, but in the group's mean) or
            ``exclude`` (not in the group's mean either).
        zero_variance: Groups whose rewards are all equal: ``skip`` (nothing to compute, but in the denominators), ``drop`` (not in the
            denominators, no KL term either) or ``refill`` (their slots go to further training prompts, which the sampler names by step).
        refill_attempts: Most rounds of further prompts per window; a slot that stays without signal keeps its own.
        mismatch: ``mode`` (token, sequence or geometric, with _tis or _mis: token_tis), ``low`` and ``high``: correct for a sampler
            whose probabilities are not the trainer's; ``auto`` = with another ``rollout`` than the trainer's own model, ``geometric_mis``
            in [0.9, 1.1] for completions of more than 512 tokens and ``token_tis`` up to 2 for shorter ones; null = only measure.
            With ``reuse_sampler_log_probs`` or ``overlap_sampling`` there is nothing left to correct, and ``auto`` is null.
        truncated_sampling: What to do where ``top_p`` or ``top_k`` cut what is sampled: ``refuse``, or take ratios and gradients of the
            ``untruncated`` distribution nevertheless, as most published setups do; it is another than the one that was sampled from.
        reuse_sampler_log_probs: With several updates per window, take ratios against the sampler's log-probabilities: one pass less.
        token_budget: Most completion tokens (rows times longest) per microbatch, and most prompt tokens computed at once; null = no bound.
        split_backward: Compute every distinct prompt once per window and back-propagate through it once, and the head on loss positions
            only. The fastest path; an architecture for which it is not exact takes the next one, which is said at start.
        balance_ranks: On several ranks, deal groups out again before gradients are computed, so that all ranks have about as many tokens.
            The gradient stays the same; hooks on gradients see the groups that their rank computes.
        overlap_sampling: Sample the next window while this one trains, with a sampler that computes elsewhere (``VLLMServerRollout``).
            Completions are then one window old when they are learnt from, and ratios are taken against what the sampler assigned.
        overlap_grading: Compute old and reference log-probabilities while completions are graded (in a thread).
        grading_timeout_s: Stop the run, on all ranks, when grading one window takes longer; null = wait.
        table_every: Windows between two tables of all rollouts in ``completions/`` (and W&B, where it logs); 0 = none.
        policy_args: Everything else: see :class:`~theodolite.lightning_modules.policy_module.PolicyModule`.
    """

    shards = True

    def __init__(
        self,
        group_size: int = 8,
        aggregation: str = "dapo",
        advantage_scale: str = "group",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        loss: dict[str, Any] | None = None,
        updates_per_window: int = 1,
        beta: float = 0.0,
        kl_estimator: str = "k3_is",
        reward_weights: dict[str, float] | None = None,
        reward_mix: str = "sum",
        overlong_buffer: int = 0,
        truncated: str = "keep",
        zero_variance: str = "skip",
        refill_attempts: int = 3,
        mismatch: dict[str, Any] | Literal["auto"] | None = "auto",
        truncated_sampling: str = "refuse",
        reuse_sampler_log_probs: bool = False,
        token_budget: int | None = None,
        split_backward: bool = False,
        balance_ranks: bool = True,
        overlap_sampling: bool = False,
        overlap_grading: bool = False,
        grading_timeout_s: float | None = None,
        table_every: int = 50,
        **policy_args: Any,
    ) -> None:
        super().__init__(**policy_args)
        self.save_hyperparameters()
        self.group_size, self.aggregation, self.advantage_scale = group_size, aggregation, advantage_scale
        self.policy_loss = build_loss(loss, clip_low, clip_high)
        self.updates_per_window, self.beta, self.kl_estimator = updates_per_window, beta, kl_estimator
        self.reward_weights, self.reward_mix, self.overlong_buffer = reward_weights, reward_mix, overlong_buffer
        self.truncated, self.zero_variance, self.refill_attempts = truncated, zero_variance, refill_attempts
        self.reuse_sampler_log_probs, self.token_budget, self.split_backward = reuse_sampler_log_probs, token_budget, split_backward
        self.overlap_grading, self.grading_timeout_s, self.table_every = overlap_grading, grading_timeout_s, table_every
        self.balance_ranks, self.truncated_sampling, self.overlap_sampling = balance_ranks, truncated_sampling, overlap_sampling
        mismatch = settled_mismatch(self, mismatch)
        check_settings(self, mismatch)
        self.mismatch = None if mismatch is None else (mismatch["mode"], float(mismatch.get("low", 0.0)), float(mismatch["high"]))
        self.batch_arithmetic: BatchArithmetic | None = None
        self._checked = False

    # ------------------------------------------------------------------ start

    def setup(self, stage: str) -> None:
        """Refuse what weights in shards cannot do, before any are built."""
        super().setup(stage)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            check_sharding(self, [type(c).__name__ for c in cast(Any, self.trainer).callbacks if measures_parts([c])])

    def configure_model(self) -> None:
        """Build the policy, and the reference it starts from: before a checkpoint can replace the weights."""
        super().configure_model()
        if self.beta > 0 and self.lora is None and not self._reference:
            self._reference.append(copy.deepcopy(self.causal_lm).requires_grad_(False).eval())
        if self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy) and not self._sharded:
            self.shard(self.causal_lm, *self._reference)

    def on_fit_start(self) -> None:
        """Split the global batch, choose the gradient path, and say who may see the oracle's labels."""
        check_merging(self.engine, str(self.trainer.precision))
        prompts = getattr(self._datamodule(), "global_batch_size", None)
        if not isinstance(prompts, int):
            raise TypeError(
                f"{type(self._datamodule()).__name__} does not say global_batch_size; GRPO needs the global number of prompts per step."
            )
        self.batch_arithmetic = split_batch(prompts, self.trainer.world_size, self.group_size, self.micro_batch_size)
        self._check_ranks()
        if self.split_backward:
            self._split_if_exact()
        users = oracle_users(cast(Any, self.trainer).callbacks)
        if users:
            rank_zero_info(f"uses_oracle: {', '.join(users)} may see the oracle's labels in this run.")

    def on_train_start(self) -> None:
        """Switch dropout off for good: between sampling, old, new and reference log-probabilities it would be noise in every ratio.

        Raises:
            TypeError: Groups without signal are to be refilled, or the next window sampled ahead, and the data know no further prompts.
            ValueError: The next window is to be sampled ahead, and epochs are cut short.
        """
        self.causal_lm.eval()
        sampler = getattr(cast(Any, self.trainer).train_dataloader, "sampler", None)
        if self.zero_variance == "refill":
            check_reserve(sampler)
        if self.overlap_sampling:
            check_preview(self.trainer, sampler)

    def _split_if_exact(self) -> None:
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError("model.split_backward does not work with a gradient scaler; use bf16 precision, or set it to false.")
        with self.whole_weights():
            self.backbone = take_apart(self.causal_lm) if self.shared_prefix and not self.gradient_checkpointing else None
        if self.gradient_checkpointing:
            rank_zero_info("split_backward: a layer that is computed once more has no cache; the padded path is used instead.")
        elif self.backbone is None:
            path = "microbatches share prompts" if self.shared_prefix and not self._sharded else "the padded path is used"
            rank_zero_info(f"split_backward: not exact for this architecture; {path} instead.")

    def _check_ranks(self) -> None:
        strategy = self.trainer.strategy
        known = ("DDPStrategy", "SingleDeviceStrategy", "ModelParallelStrategy")
        if isinstance(strategy, ParallelStrategy) and type(strategy).__name__ not in known:
            raise ValueError(
                f"GRPO runs on a single device, with ddp or with ModelParallelStrategy: under {type(strategy).__name__} every "
                "forward pass is a collective, but ranks decode and learn from different numbers of tokens, so they would wait for one "
                "another for ever."
            )

    # ------------------------------------------------------------------ one window

    def training_step(self, batch: list[Any], batch_idx: int) -> None:
        """One window: rollouts, grades, advantages, gradients, ``updates_per_window`` optimizer steps.

        Nothing here draws from the libraries' global generators. A callback or environment of one's own may: every window begins with
        states that follow from seed, step and rank, so that a resumed run draws what the uninterrupted one drew.
        """
        self.seconds = {}
        _seed_libraries(derive_seed(self.run_seed, "libraries", self.trainer.global_step, self.global_rank))
        self.gather_weights()
        window, verdicts, anchors = self.collect(batch)
        self._hook("on_rollouts", window, verdicts)
        verdicts = [REPLAYED if foreign(r) else verdict for r, verdict in zip(window.rollouts, verdicts, strict=True)]
        self.shape_rewards(window)
        with self.timed("advantages"):
            window.advantages = self.window_advantages(window)
        self._hook("on_advantages", window, verdicts)
        totals = self.totals(window)
        repeats = self.merge_repeats(window)
        stale = any(gather_objects(anchors is None or any(map(foreign, window.rollouts))))
        share = self._share(Share(window, verdicts, repeats, None if stale else anchors))
        with self.timed("scoring"):
            anchors = share.anchors or self.anchor_log_probs(share.window, self.microbatches(share.window, share.repeats))
        sums: list[Sums] = [rollout_sums(window, verdicts), window.metrics]
        optimizer = cast(LightningOptimizer, self.optimizers())
        lr = float(optimizer.param_groups[0]["lr"])
        by_part = wants_parts(cast(Any, self.trainer).callbacks)
        for _ in range(self.updates_per_window):
            microbatches = self.microbatches(share.window, share.repeats)  # smaller ones, where memory ran out
            optimizer.zero_grad()
            self._check_path_once(share.window, microbatches)
            with self.timed("gradients"):
                own = (totals, share.repeats, anchors, share.verdicts)
                sums.append(self.window_gradient(share.window, microbatches, *own, by_part))
            with self.timed("update"):
                optimizer.step()
                cast(Any, self.lr_schedulers()).step()
            for callback in cast(Any, self.trainer).callbacks:
                if hasattr(callback, "on_after_optimizer_step"):
                    callback.on_after_optimizer_step(self.trainer, self, optimizer.optimizer)
        if self.table_every and (window.step // self.updates_per_window) % self.table_every == 0:
            write_table(self, window, verdicts)
        log_window(self, sums, lr, share.loads)

    def _share(self, own: Share) -> Share:
        """What this rank computes the gradient of: what it sampled, or its part of all ranks' groups."""
        if not self.balance_ranks:
            return own
        active = [i for m in self.microbatches(own.window, own.repeats) for i in m]
        slots = [self.slot(g) for g in range(len(own.window.rows))]
        with self.timed("balance"):
            return balance(own, active, slots, self.global_rank, self.device)

    def _check_path_once(self, window: Window, microbatches: list[list[int]]) -> None:
        """On the run's first window with a gradient, compare the path in use with the padded one."""
        padded = not self.shared_prefix or self.gradient_checkpointing or self._sharded
        if self._checked or (padded and self.backbone is None):
            return  # the padded path itself is in use
        few = sorted((i for m in microbatches for i in m), key=lambda i: len(window.rollouts[i].tokens.completion_ids))
        if any(gather_objects(bool(few))):
            middle = len(few) // 2
            with self.timed("self_check"), self.whole_weights():
                check_gradient_path(self, window, few[max(0, middle - 1) : middle + 2])
            self._checked = True

    def window_advantages(self, window: Window) -> Tensor:
        """(n,) advantages of this rank's rollouts, of their values or, under ``gdpo``, of their components."""
        if self.reward_mix == "sum":
            return self.global_advantages(window.values)
        weights = dict(self.reward_weights or {})
        columns = [[reward.parts.get(name, torch.nan) for reward in window.rewards] for name in weights]
        components = torch.tensor(columns, dtype=torch.float64).T
        # whatever hooks, penalties and exclusions did to the values is a component of its own
        change = window.values - torch.tensor([reward.value for reward in window.rewards], dtype=torch.float64)
        components = torch.where(window.values.isnan()[:, None], torch.nan, torch.cat([components, change[:, None]], dim=1))
        by_slot = self._by_slot(components)
        factors = torch.tensor([*weights.values(), 1.0], dtype=torch.float64)
        return self._own(gdpo_advantages(by_slot, factors, self.group_size))

    def global_advantages(self, values: Tensor) -> Tensor:
        """Advantages of this rank's rollouts, with every statistic taken over the window of all ranks."""
        return self._own(group_advantages(self._by_slot(values), self.group_size, cast(Any, self.advantage_scale)))

    def _by_slot(self, values: Tensor) -> Tensor:
        """All ranks' (n, ...) rows in the order of their global slots."""
        parts = gather_objects(values)
        return torch.stack([part.view(-1, self.group_size, *part.shape[1:]) for part in parts], dim=1).reshape(-1, *values.shape[1:])

    def _own(self, by_slot: Tensor) -> Tensor:
        """This rank's rows of what :meth:`_by_slot` gathered."""
        ranks = self.trainer.world_size
        return by_slot.view(-1, ranks, self.group_size)[:, self.global_rank].reshape(-1)


def _seed_libraries(seed: int) -> None:
    """Set the global generators of Python, NumPy and torch (every device's), for code of others that draws from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
