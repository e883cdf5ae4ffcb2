"""From a window with advantages to its gradient, in any number of microbatches, by any of three paths that agree."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from theodolite.distributed import gather_objects
from theodolite.functional.importance import MismatchMode, mismatch_log_ratio, mismatch_statistics, mismatch_weights
from theodolite.functional.policy_loss import WindowTotals, kl_penalty, log_ratio, token_weights
from theodolite.out_of_memory import is_out_of_memory, release_memory
from theodolite.protocols import TokenSequence, Verdict, Window

from ..evaluation import add_sums
from ..sharded_weights import OUT_OF_MEMORY_IN_SHARDS
from ..split_prefix import Backbone, SplitPrefix
from .anchors import AnchoredModule, Anchors
from .hooks import call_window_hook, measures_parts
from .losses import PolicyLoss, TokenBatch
from .window import counted, cut, foreign, merged, pad_rows, part_of, per_token, prefix_runs

logger = logging.getLogger(__name__)
Sums = dict[str, tuple[float, float]]


class PolicyGradientModule(AnchoredModule):
    """The gradient of a window. Subclasses sample it and decide its advantages.

    Attributes:
        policy_loss: Loss per token.
        mismatch: (mode, low, high) of the correction for the sampler's own distribution; None = only statistics.
        split_backward: Compute prompts once per window; see :mod:`theodolite.lightning_modules.split_prefix`.
    """

    policy_loss: PolicyLoss
    aggregation: str
    truncated: str
    zero_variance: str
    mismatch: tuple[MismatchMode, float, float] | None
    backbone: Backbone | None = None
    _reference: list[Any]
    _split: SplitPrefix | None = None

    # ------------------------------------------------------------------ denominators and microbatches

    def kept(self, window: Window) -> list[bool]:
        """Which rollouts the objective is made of."""
        return counted(window, cast(Any, self.truncated), cast(Any, self.zero_variance))

    def totals(self, window: Window) -> WindowTotals:
        """Global denominators, over every counted rollout of every rank, before the first backward pass."""
        lengths = [len(r.tokens.completion_ids) for r, kept in zip(window.rollouts, self.kept(window), strict=True) if kept]
        counts = torch.tensor(gather_objects((sum(lengths), sum(n > 0 for n in lengths), len(lengths)))).sum(dim=0).tolist()
        return WindowTotals(*counts, max_length=self.sampling.max_new_tokens)

    @property
    def linear_loss(self) -> bool:
        """Whether the loss says that it is proportional to the advantage: then advantage 0 is skipped, and siblings are merged."""
        return bool(getattr(self.policy_loss, "linear", False))

    def merge_repeats(self, window: Window) -> Tensor:
        """How often each rollout stands for itself and its identical siblings; 0 for those that another stands for.

        On policy the ratio is 1 and the loss is linear in the advantage, so identical completions of a prompt are computed once, with
        their mean advantage and their number as weight: exactly the same gradient. With several updates per window, or a sampler that
        ratios are taken against, the clip is not linear and nothing is merged. ``window.advantages`` becomes the mean over siblings.
        """
        if self.updates_per_window > 1 or self.old_is_the_samplers or not self.linear_loss or self.mismatch is not None:
            return torch.ones(len(window.rollouts), dtype=torch.float64)
        return merged(window, self.kept(window))

    def microbatches(self, window: Window, repeats: Tensor) -> list[list[int]]:
        """Indices of this rank's rollouts that carry a gradient, part by part, sorted by length and cut into microbatches.

        Where prompts are computed once per window, rollouts come run of prompts by run of prompts: no prompt is computed twice. Without a
        KL term a rollout with advantage 0 contributes exactly nothing and is left out (the denominators still count it).
        """
        kept = self.kept(window)
        silent = self.linear_loss and self.beta_in_loss == 0
        by_part: dict[str, list[int]] = {}
        for i, rollout in enumerate(window.rollouts):
            if rollout.tokens.completion_ids and repeats[i] > 0 and kept[i] and not (silent and not bool(window.advantages[i].any())):
                by_part.setdefault(part_of(window, i), []).append(i)
        lengths = [len(rollout.tokens.completion_ids) for rollout in window.rollouts]
        runs = [run for part in sorted(by_part) for run in self._prompt_runs(window, by_part[part])]
        return [m for run in runs for m in cut(run, lengths, self._most_rows(), self.token_budget)]

    def _prompt_runs(self, window: Window, indices: Sequence[int]) -> list[list[int]]:
        """The indices, by the run in which their prompts are computed; longest prompts first, which leaves little padding."""
        if self.backbone is None:
            return [list(indices)]
        prompts = {i: window.rollouts[i].tokens.prompt_ids for i in indices}
        distinct = list(dict.fromkeys(prompts.values()))
        most = self._most_prompt_tokens([rollout.tokens.prompt_ids for rollout in window.rollouts])
        runs = cut(range(len(distinct)), [len(prompt) for prompt in distinct], None, most)
        number = {distinct[k]: run for run, members in enumerate(runs) for k in members}
        return [[i for i in indices if number[prompts[i]] == run] for run in range(len(runs))]

    # ------------------------------------------------------------------ gradients

    def window_gradient(
        self,
        window: Window,
        microbatches: Sequence[Sequence[int]],
        totals: WindowTotals,
        repeats: Tensor,
        anchors: Anchors,
        verdicts: Sequence[Verdict],
        by_part: bool,
    ) -> Sums:
        """The window's gradient in ``p.grad``, summed over ranks; every part alone goes past ``on_part_gradients`` first if wanted."""
        whole = self.backbone is not None
        if not by_part:
            with self.gradients_over_ranks(whole):
                return self.accumulate(window, microbatches, totals, repeats, anchors, verdicts)
        own = {part_of(window, i) for i in range(len(window.rollouts))}
        total: list[Tensor] | None = None
        found: list[Sums] = []
        for part in sorted(set().union(*gather_objects(own))):
            mine = [m for m in microbatches if part_of(window, m[0]) == part]
            with self.gradients_over_ranks(whole):
                found.append(self.accumulate(window, mine, totals, repeats, anchors, verdicts))
            self._hook("on_part_gradients", window, verdicts, part)
            parameters = self.trainable_parameters()
            grads = [cast(Tensor, p.grad) for p in parameters]
            total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
            for parameter in parameters:
                parameter.grad = None
        for parameter, gradient in zip(self.trainable_parameters(), total or [], strict=bool(total)):
            parameter.grad = gradient
        return add_sums(found)

    def accumulate(
        self,
        window: Window,
        microbatches: Sequence[Sequence[int]],
        totals: WindowTotals,
        repeats: Tensor | None = None,
        anchors: Anchors | None = None,
        verdicts: Sequence[Verdict] = (),
    ) -> Sums:
        """Add the window's gradient to ``p.grad``, microbatch by microbatch; local to this rank until summed.

        When memory runs out, what was added is taken back, microbatches are halved (for the rest of the run) and the window is tried
        again: the objective and its denominators do not know about microbatches.

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
        before = [(p, None if p.grad is None else p.grad.clone()) for p in self.trainable_parameters()]
        while True:
            try:
                return self._accumulate(window, microbatches, totals, repeats, anchors or Anchors(), verdicts)
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error) and self.in_shards:
                    raise RuntimeError(OUT_OF_MEMORY_IN_SHARDS) from error
                if not is_out_of_memory(error) or max(map(len, microbatches)) == 1:
                    raise
                message = str(error).splitlines()[0]
            self._split = None
            for parameter, gradient in before:
                parameter.grad = gradient if gradient is None else gradient.clone()
            release_memory()
            self._halvings += 1
            microbatches = [half for m in microbatches for half in (m[: -(-len(m) // 2)], m[-(-len(m) // 2) :]) if half]
            self._row_limit = max(map(len, microbatches))
            logger.warning("Out of memory (%s): microbatches are halved, the window is tried again.", message)

    def _accumulate(
        self,
        window: Window,
        microbatches: Sequence[Sequence[int]],
        totals: WindowTotals,
        repeats: Tensor | None,
        anchors: Anchors,
        verdicts: Sequence[Verdict],
    ) -> Sums:
        sums: list[Sums] = []
        idle = self.idle_passes(len(microbatches))
        for own_prompts, members in self._runs(window, microbatches):
            if self.backbone is not None:
                self._split = self.split_prefix(self.backbone, own_prompts)
            for k in members:
                indices = microbatches[k]
                weights = None if repeats is None else repeats[list(indices)]
                old, reference = (self._padded(found, window, indices) for found in (anchors.old, anchors.reference))
                loss, part = self.microbatch_loss(window, indices, totals, weights, old, reference)
                self._backward(loss)
                sums.append(part)
                self._hook("on_microbatch_gradients", window, verdicts, part_of(window, indices[0]))
            if self._split is not None and members:
                self._split.finish(self._backward)
                self._split = None
                self._hook("on_microbatch_gradients", window, verdicts, part_of(window, microbatches[members[-1]][0]))
        for _ in range(idle):
            self._backward(0.0 * self.completion_log_probs([TokenSequence((self.pad_id,), (self.pad_id,))])[0].sum())
        return add_sums(sums)

    def _runs(self, window: Window, microbatches: Sequence[Sequence[int]]) -> list[tuple[list[tuple[int, ...]], list[int]]]:
        """Prompts that are computed together and their microbatches, of one gradient part where a callback tells parts apart."""
        if self.backbone is None:
            return [([], list(range(len(microbatches))))]
        prompts = [rollout.tokens.prompt_ids for rollout in window.rollouts]
        apart = measures_parts(cast(Any, self.trainer).callbacks)
        parts = [part_of(window, m[0]) for m in microbatches] if apart else None
        return prefix_runs(microbatches, prompts, self._most_prompt_tokens(prompts), parts)

    def split_prefix(self, backbone: Backbone, prompts: Sequence[tuple[int, ...]]) -> SplitPrefix:
        """These prompts, computed for the gradient; with the adapter folded in where sampling folds it in as well."""
        fold = bool(getattr(self.engine, "merge_adapter", False))
        return SplitPrefix(backbone, prompts, self.pad_id, self.device, self.sampling.temperature, fold)

    def _backward(self, loss: Tensor) -> None:
        with self._without_gradient_sync():
            self.manual_backward(loss)

    def _padded(self, found: dict[int, Tensor], window: Window, indices: Sequence[int]) -> Tensor | None:
        if not found:
            return None
        width = max(1, *(len(window.rollouts[i].tokens.completion_ids) for i in indices))
        like = torch.zeros(len(indices), width, dtype=found[indices[0]].dtype, device=self.device)
        return pad_rows([found[i] for i in indices], like)

    def scored(self, sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Differentiable log-probabilities, entropies where they come for free, and mask, all (B, T)."""
        if self._split is not None:
            return self._split.score(sequences)
        log_probs, mask = self.completion_log_probs(sequences)
        return log_probs, None, mask

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
        log_probs, entropies, mask = self.scored([rollout.tokens for rollout in rollouts])
        batch = self._token_batch(window, indices, log_probs, mask, old)
        token_loss, statistics = self.policy_loss(batch)
        weights = mask if repeats is None else mask * repeats.to(mask)[:, None]
        gap = mismatch_log_ratio(batch.old_log_probs, batch.sampler_log_probs, mask)
        if self.mismatch is not None:
            correction = mismatch_weights(gap, mask, *self.mismatch)
            token_loss, statistics = token_loss * correction, statistics | {"mismatch_weight": correction}
        ratio = log_ratio(log_probs, batch.old_log_probs, mask).exp()
        if old is not None or any(map(foreign, rollouts)):
            statistics["ratio"] = ratio.detach()
        if entropies is not None:
            statistics["entropy"] = entropies
        if reference is not None:
            token_loss = token_loss + self.beta * kl_penalty(log_probs, reference, ratio, mask, cast(Any, self.kl_estimator))
            statistics["kl"] = kl_penalty(log_probs.detach(), reference, ratio, mask, "k3")
        if window.weights.numel():
            token_loss = token_loss * per_token(window.weights, indices, mask.shape[1], "weights").to(mask)
        per_rollout = 1.0 if repeats is None else repeats.to(mask)[:, None]
        loss = (token_weights(mask, cast(Any, self.aggregation), totals) * per_rollout * token_loss).sum()
        tokens = float(weights.sum())
        sums: Sums = {name: (float((value * weights).sum()), tokens) for name, value in statistics.items()}
        sampled = torch.tensor([[float(not foreign(rollout))] for rollout in rollouts], device=mask.device)
        return loss, sums | self._sampler_sums(window, batch, gap, weights * sampled) | {"loss": (float(loss.detach()), 0.0)}

    def _sampler_sums(self, window: Window, batch: TokenBatch, gap: Tensor, weights: Tensor) -> Sums:
        """How far sampler and trainer are apart, under the weights that sampled."""
        if self.old_is_the_samplers:  # then that gap is 0 whatever the sampler did; only the first update still has those weights
            if self.trainer.global_step != window.step:
                return {}
            gap = mismatch_log_ratio(batch.log_probs, batch.sampler_log_probs, batch.mask)
        return mismatch_statistics(gap, batch.mask, weights)

    def _token_batch(self, window: Window, indices: Sequence[int], log_probs: Tensor, mask: Tensor, old: Tensor | None) -> TokenBatch:
        rollouts = [window.rollouts[i] for i in indices]
        sampler = pad_rows([rollout.sampler_log_probs for rollout in rollouts], log_probs.detach())
        own = log_probs.detach() if old is None else old
        if any(map(foreign, rollouts)):  # what another author assigned is the only true denominator of its ratios
            own = torch.where(torch.tensor([[foreign(rollout)] for rollout in rollouts], device=mask.device), sampler.to(own), own)
        advantages = per_token(window.advantages, indices, mask.shape[1], "advantages").to(log_probs)
        return TokenBatch(log_probs, own, sampler, advantages, mask)

    def _hook(self, name: str, window: Window, verdicts: Sequence[Verdict], *extra: Any) -> None:
        with self.timed("hooks"):
            call_window_hook(name, self.trainer, self, window, verdicts, *extra)
