"""The first half of a window: sample, grade, sample again where nothing can be learnt, and shape the rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from typing import Any, TypeVar, cast

import torch

from theodolite.background import in_background
from theodolite.distributed import gather_objects, on_every_rank
from theodolite.functional.advantages import has_signal, overlong_penalty, weighted_reward
from theodolite.protocols import Grade, PromptReserve, Reward, Rollout, TokenSequence, Verdict, Window

from ..rollouts import Sample
from .anchors import Anchors
from .overlap import AheadModule
from .window import check_reported, cut

T = TypeVar("T")


class CollectionModule(AheadModule):
    """Rollouts and rewards of a window."""

    reward_weights: dict[str, float] | None
    overlong_buffer: int
    refill_attempts: int
    overlap_grading: bool
    grading_timeout_s: float | None

    def collect(self, batch: list[Any]) -> tuple[Window, list[Verdict], Anchors | None]:
        """Sample and grade this rank's groups. The verdicts come apart from the window: advantages cannot reach them.

        Returns:
            The window, its verdicts, and the anchors where they were computed while grading ran.
        """
        step = self.trainer.global_step
        begun = self.sampled_ahead(batch, step)
        rollouts = self._draw(batch, step) if begun is None else self._rollouts(batch, *begun)
        if self.old_is_the_samplers:
            on_every_rank(lambda: check_reported(rollouts))
        self.sample_ahead(step)
        grades, anchors = self._grade(batch, rollouts, step)
        window = self._window(step, batch, rollouts, grades)
        if self.zero_variance == "refill":
            grades, refilled = self._refill(window, grades)
            anchors = None if refilled else anchors
        if self.overlap_sampling:
            ages = [step - rollout.weight_version for rollout in window.rollouts]
            window.metrics["staleness"] = (sum(ages), len(ages))
        return window, [grade.verdict for grade in grades], anchors

    def _draw(self, batch: Sequence[Any], step: int, *purpose: int | str) -> list[Rollout]:
        with self.timed("rollouts"):
            self.engine.onload()
            self.engine.sync(step)
            prompts, groups = self.sample(batch, self.group_size, self.sampling, "rollouts", step, *purpose)
            self.engine.offload()
        return self._rollouts(batch, prompts, groups)

    def _rollouts(self, batch: Sequence[Any], prompts: Sequence[tuple[int, ...]], groups: Sequence[Sequence[Sample]]) -> list[Rollout]:
        return [
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

    def _window(self, step: int, batch: Sequence[Any], rollouts: list[Rollout], grades: Sequence[Grade]) -> Window:
        rewards = [grade.reward for grade in grades]
        values = torch.tensor([reward.value for reward in rewards], dtype=torch.float64)
        return Window(step, list(batch), rollouts, rewards, self.group_size, values)

    def _grade(self, batch: Sequence[Any], rollouts: list[Rollout], step: int) -> tuple[list[Grade], Anchors | None]:
        """Grades, and anchors if they may be computed meanwhile. An environment that fails or hangs stops every rank together."""
        rows, texts = [row for row in batch for _ in range(self.group_size)], [rollout.text for rollout in rollouts]
        needed = self.overlap_grading and (self.beta_in_loss > 0 or self.updates_per_window > 1)

        def meanwhile() -> Anchors | None:
            lengths = [len(rollout.tokens.completion_ids) for rollout in rollouts]
            microbatches = cut([i for i, n in enumerate(lengths) if n], lengths, self._most_rows(), self.token_budget)
            with self.timed("scoring"):
                return self.anchor_log_probs(self._window(step, batch, rollouts, []), microbatches)

        with self.timed("grading"):
            outcome, anchors = beside(lambda: self.environment.grade(rows, texts), meanwhile if needed else None, self.grading_timeout_s)
        error = f"{type(outcome).__name__}: {outcome}" if isinstance(outcome, BaseException) else None
        errors = {rank: text for rank, text in enumerate(gather_objects(error)) if text}
        if errors:
            raise RuntimeError(
                f"Grading failed at step {step} on rank {min(errors)} ({errors[min(errors)]}); nothing was learnt from this window."
            ) from (outcome if isinstance(outcome, BaseException) else None)
        assert not isinstance(outcome, BaseException)
        return outcome, anchors

    def _refill(self, window: Window, grades: list[Grade]) -> tuple[list[Grade], bool]:
        """Give the slots of groups without signal to further prompts, a bounded number of times; every rank takes part in every round.

        Which prompts, and which slot each of them is for, follows from the dead slots of *all* ranks. A further prompt whose group has no
        signal either is dropped, a slot for which none was found keeps its first completions, and so do all where the data hold no other
        prompt. ``window.metrics`` counts slots refilled per prompt tried, and the reward of everything that was sampled, kept or not.
        """
        grades, size, won, tried = list(grades), self.group_size, 0, 0
        drawn = [grade.reward.value for grade in grades]
        reserve = self._further_rows(window)
        for attempt in range(1, self.refill_attempts + 1):
            dead_here = (~has_signal(self.trained_on(window.rewards), size)).nonzero().flatten().tolist()
            dead = {self.slot(g): g for g in dead_here}
            dead_anywhere = sorted(slot for slots in gather_objects(list(dead)) for slot in slots)
            rows = dict(zip(dead_anywhere, reserve, strict=False))
            if not rows:
                break
            mine = [slot for slot in dead if slot in rows]
            rollouts = self._draw([rows[slot] for slot in mine], window.step, "refill", attempt)
            fresh, _ = self._grade([rows[slot] for slot in mine], rollouts, window.step)
            drawn += [grade.reward.value for grade in fresh]
            alive = has_signal(self.trained_on([grade.reward for grade in fresh]), size).tolist()
            for k, slot in enumerate(mine):
                if alive[k]:
                    part = slice(k * size, (k + 1) * size)
                    _put_group(window, grades, dead[slot], slot, rows[slot], rollouts[part], fresh[part])
            won, tried = won + sum(alive), tried + len(mine)
        scored = [value for value in drawn if value == value]
        window.metrics["refill_accepted"] = (won, tried)
        window.metrics["reward_mean_before_refill"] = (sum(scored), len(scored))
        return grades, won > 0

    def _further_rows(self, window: Window) -> Iterator[Any]:
        """Training rows that no rank's window holds, each once, in an order that is the same on every rank."""
        loader = cast(Any, self.trainer).train_dataloader
        held = {row_id for ids in gather_objects([row.id for row in window.rows]) for row_id in ids}
        for index in cast(PromptReserve, loader.sampler).further(window.step):
            (row,) = loader.dataset[[index]]
            if row.id not in held:
                yield row

    def trained_on(self, rewards: Sequence[Reward]) -> torch.Tensor:
        """(n,) float64: what training makes of graded rewards, their components by ``reward_weights`` or the environment's own sum."""
        graded = torch.tensor([reward.value for reward in rewards], dtype=torch.float64)
        if not self.reward_weights:
            return graded
        columns = [[reward.parts.get(name, torch.nan) for reward in rewards] for name in self.reward_weights]
        weights = torch.tensor(list(self.reward_weights.values()), dtype=torch.float64)
        total = weighted_reward(torch.tensor(columns, dtype=torch.float64).T, weights)
        return torch.where(graded.isnan(), torch.nan, total)

    def shape_rewards(self, window: Window) -> None:
        """What the objective does to rewards before advantages: component weights, exclusion, overlong penalty, KL in the reward.

        Components are weighted by what they were when graded; what callbacks did to the values stays on top.
        """
        if self.reward_weights and self.reward_mix == "sum":
            graded = torch.tensor([reward.value for reward in window.rewards], dtype=torch.float64)
            window.values = window.values - graded + self.trained_on(window.rewards)
        if self.truncated == "exclude":
            cut_off = torch.tensor([rollout.finish == "length" for rollout in window.rollouts])
            window.values = torch.where(cut_off, torch.nan, window.values)
        if self.overlong_buffer:
            lengths = torch.tensor([len(rollout.tokens.completion_ids) for rollout in window.rollouts])
            window.values = window.values + overlong_penalty(lengths, self.sampling.max_new_tokens, self.overlong_buffer)
        if self.kl_estimator == "k1_reward" and self.beta > 0:
            window.values = window.values - self.beta * self._sampled_kl(window)

    @torch.no_grad()
    def _sampled_kl(self, window: Window) -> torch.Tensor:
        """(n,) ``sum_t log pi - log ref`` of every rollout, the k1 estimate of the sequence's divergence, at the sampling weights."""
        lengths = [len(rollout.tokens.completion_ids) for rollout in window.rollouts]
        found = torch.zeros(len(lengths), dtype=torch.float64)
        for indices in cut([i for i, n in enumerate(lengths) if n], lengths, self._most_rows(), self.token_budget):
            parts = self.in_fitting_parts(lambda part: self.reference_log_probs([window.rollouts[i].tokens for i in part]), indices)
            reference = torch.cat([rows.double().sum(dim=1).cpu() for rows in parts])
            own = torch.tensor([sum(window.rollouts[i].sampler_log_probs) for i in indices], dtype=torch.float64)
            found[indices] = own - reference
        total = float(found.sum())
        window.metrics["kl"] = (total, float(sum(lengths)))
        return found


def _put_group(
    window: Window, grades: list[Grade], g: int, slot: int, row: Any, rollouts: Sequence[Rollout], fresh: Sequence[Grade]
) -> None:
    """Group ``g`` of the window becomes another prompt's."""
    window.rows[g] = row
    for j, (rollout, grade) in enumerate(zip(rollouts, fresh, strict=True)):
        i, rollout.slot = g * window.group_size + j, slot
        window.rollouts[i], grades[i], window.rewards[i] = rollout, grade, grade.reward
        window.values[i] = grade.reward.value


def beside(work: Callable[[], T], meanwhile: Callable[[], Any] | None, timeout_s: float | None) -> tuple[T | BaseException, Any]:
    """Do ``work`` (in a thread, where something else is to be done or a deadline to be kept) and ``meanwhile`` beside it.

    Returns:
        What ``work`` returned, or the exception it ended with (``TimeoutError`` past the deadline), and what ``meanwhile`` returned.
    """
    if meanwhile is None and timeout_s is None:
        try:
            return work(), None
        except Exception as error:  # the caller stops all ranks with it
            return error, None
    future = in_background(work, "grading")
    other = meanwhile() if meanwhile is not None else None
    wait([future], timeout_s)
    if not future.done():
        return TimeoutError(f"no grades after {timeout_s} s"), other
    error = future.exception()
    return (future.result() if error is None else error), other
