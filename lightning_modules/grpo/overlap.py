"""Sampling of the next window while the current one trains: one window ahead, and never more.

At the start of window t the sampler is sent version t of the weights and begins with the prompts of window t + 1, which the data's sampler
names beforehand. Those completions are learnt from one window later, at version t + 1, and every ratio is taken against what the sampler
itself assigned to them, at version t. Only the first window of a run is sampled by the weights that learn from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, cast

from theodolite.distributed import gather_objects, on_every_rank
from theodolite.protocols import PromptPreview

from ..rollouts import Sample, SamplesAhead, sample_seeds
from .gradients import PolicyGradientModule

CHECKPOINT_KEY = "theodolite_window_ahead"


@dataclass(frozen=True, slots=True)
class Ahead:
    """This rank's groups of a window that is yet to come.

    Attributes:
        step: Optimizer steps that will have been taken when it is learnt from.
        problems: Id of each group's row.
        groups: Their completions, when they are there.
    """

    step: int
    problems: list[str]
    groups: Future[list[list[Sample]]]


class AheadModule(PolicyGradientModule):
    """Samples one window ahead, where ``overlap_sampling`` says so."""

    group_size: int
    _ahead: Ahead | None = None

    def sample_ahead(self, step: int) -> None:
        """Begin with the next window's prompts, by the weights as they are before window ``step``; not during the last one."""
        if not self.overlap_sampling or self._nothing_follows(step):
            return
        loader = cast(Any, self.trainer).train_dataloader
        rows = list(loader.dataset[cast(PromptPreview, loader.sampler).upcoming()])
        coming, engine = step + self.updates_per_window, self.engine
        with self.timed("rollouts"):
            engine.onload()
            engine.sync(step)
            prompts = [self.encode_prompt(row.prompt) for row in rows]
            seeds = sample_seeds(self.run_seed, rows, self.group_size, "rollouts", coming)
            groups = on_every_rank(lambda: cast(SamplesAhead, engine).begin(prompts, self.sampling, seeds))
        self._ahead = Ahead(coming, [row.id for row in rows], groups)

    def _nothing_follows(self, step: int) -> bool:
        trainer = self.trainer
        if 0 <= trainer.max_steps <= step + self.updates_per_window:
            return True
        epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        return trainer.is_last_batch and 0 <= epochs <= trainer.current_epoch + 1

    def sampled_ahead(self, batch: Sequence[Any], step: int) -> tuple[list[tuple[int, ...]], list[list[Sample]]] | None:
        """The batch's prompts and groups, where they were begun while the last window trained. All ranks must call it.

        Returns:
            None where nothing was begun: in the first window of a run.

        Raises:
            RuntimeError: They are not those that this window asks for; or another rank's failed, and the message says of what.
            Exception: Whatever the sampler failed with on this rank.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        with self.timed("rollouts"):
            groups = on_every_rank(lambda: self._fitting(ahead, batch, step))
            return [self.encode_prompt(row.prompt) for row in batch], groups

    def _fitting(self, ahead: Ahead, batch: Sequence[Any], step: int) -> list[list[Sample]]:
        groups = ahead.groups.result()
        sizes = {len(group) for group in groups}
        if (ahead.step, ahead.problems, sizes) != (step, [row.id for row in batch], {self.group_size}):
            raise RuntimeError(
                f"What was sampled ahead belongs to other prompts, another step or groups of another size than window {step} asks for; "
                "continue with the data and model.group_size of the run that wrote the checkpoint, or with model.overlap_sampling=false."
            )
        return groups

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the window that is being sampled: the weights that sample it are gone afterwards.

        One that failed is left out: the run is about to stop of it, and one that goes on from here samples that window anew.
        """
        super().on_save_checkpoint(checkpoint)
        if not self.overlap_sampling:
            return
        own = None if self._ahead is None else self._plain(self._ahead)
        found = gather_objects(own)
        if self._ahead is not None and None not in found:
            groups = sorted((group for part in found for group in part or []), key=lambda group: group["slot"])
            checkpoint[CHECKPOINT_KEY] = {"step": self._ahead.step, "groups": groups}

    def _plain(self, ahead: Ahead) -> list[dict[str, Any]] | None:
        wait([ahead.groups])
        if ahead.groups.exception() is not None:
            return None
        named = zip(ahead.problems, ahead.groups.result(), strict=True)
        return [
            {"slot": self.slot(g), "problem": problem, "samples": [[s.ids, s.log_probs, s.finish, s.weight_version] for s in group]}
            for g, (problem, group) in enumerate(named)
        ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take this rank's groups of the window that was sampled ahead; they are dealt out like prompts, on any number of ranks."""
        super().on_load_checkpoint(checkpoint)
        found = checkpoint.get(CHECKPOINT_KEY)
        if found is None or not self.overlap_sampling or self._trainer is None:
            return
        own = found["groups"][self.trainer.global_rank :: self.trainer.world_size]
        groups: Future[list[list[Sample]]] = Future()
        groups.set_result([[Sample(*sample) for sample in group["samples"]] for group in own])
        self._ahead = Ahead(found["step"], [group["problem"] for group in own], groups)
