"""A direction that follows the policy: contrastive pairs are taken from its own rollouts, told apart by a weak detector.

A static direction is an average over completions that somebody wrote; the policy drifts away from them and is then free to learn the
concept in its own words. Here the pairs are the policy's latest. The detector sees what a monitor would see: never the oracle's verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from theodolite.callbacks.detectors import RolloutDetector, TextDetector
from theodolite.callbacks.direction_sources import DirectionSource, pair_differences
from theodolite.callbacks.sequence_gradients import (
    TokenPair,
    contrast_pairs,
    encode_pairs,
    matrix_names,
    pair_set_hash,
    require_pair_source,
    require_scorer,
)
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.extraction import check_method, gradient_difference
from theodolite.protocols import OracleWindow, TokenSequence, Window
from theodolite.seeds import derive_seed, run_seed


@dataclass(frozen=True, slots=True)
class LivePair:
    """One same-prompt pair in token ids.

    Attributes:
        step: Window it was taken from; -1 for a start pair.
        slot: Global position of the prompt (the index of a start pair).
        samples: Sample index of the concept and the clean side; -1 for a reference solution.
        concept: The flagged side (after shuffling, if any).
        clean: The other side.
    """

    step: int
    slot: int
    samples: tuple[int, int]
    concept: TokenSequence
    clean: TokenSequence


class LiveGradientDifference(DirectionSource):
    """Gradient difference over a queue of the latest (flagged, rewarded and not flagged) rollouts of the same prompt.

    A window's ``features`` get ``flagged`` (0 or 1 per rollout) and its metrics ``direction/flagged``, the share of flagged rollouts.

    Args:
        capacity: Pairs in the queue, which starts full of the datamodule's pairs (or those of ``pairs``) and forgets the oldest.
        refresh_every: Optimizer steps between extractions (each one batched backward over at most ``2 * capacity`` sequences).
        detector: Regular expression searched in the completion, the dotted path of a callable on text, or a :class:`RolloutDetector` such
            as an activation probe.
        clean_side: ``rollout``: a rewarded rollout that is not flagged, so that a hack which the detector misses is taken for clean.
            ``reference``: the row's own ``reference`` solution, which somebody must have written and which a step beyond removal then also
            teaches.
        only_rewarded: Take a flagged rollout only if it was rewarded: what training is about to reinforce. A detector that generalises
            flags many failed attempts as well.
        pairs_per_group: At most so many new pairs per group and window, so that one prompt cannot fill the queue.
        method: ``mean`` or ``svd``.
        k: Rows per matrix; 1 for ``mean``.
        shuffle_labels: Control: swap each pair's sides with probability 1/2, start pairs included.
        placebo: Control: two random rollouts of the same prompt instead, at the rate at which real pairs would enter; the queue starts with
            such pairs of the first window.
        pairs: JSONL file of start pairs; None asks the datamodule.
        seed: Seed of start pairs, shuffling and placebo draws; None = the run's ``seed_everything``.
        parameters: Glob patterns of parameter names; None takes every trainable 2-dimensional parameter.
        chunk_size: Sequences per backward pass.

    Raises:
        ValueError: Contradictory settings or an unusable detector.
    """

    def __init__(
        self,
        capacity: int = 32,
        refresh_every: int = 2,
        detector: str | RolloutDetector = r"def run_tests",
        clean_side: Literal["rollout", "reference"] = "rollout",
        only_rewarded: bool = False,
        pairs_per_group: int = 2,
        method: Literal["mean", "svd"] = "mean",
        k: int = 1,
        shuffle_labels: bool = False,
        placebo: bool = False,
        pairs: str | None = None,
        seed: int | None = None,
        parameters: list[str] | None = None,
        chunk_size: int = 32,
    ) -> None:
        check_method(method, k)
        if min(refresh_every, pairs_per_group, chunk_size) < 1 or capacity < k:
            raise ValueError(
                f"capacity={capacity} (at least k={k}), refresh_every={refresh_every}, pairs_per_group={pairs_per_group} and "
                f"chunk_size={chunk_size} must be positive."
            )
        if shuffle_labels and placebo:
            raise ValueError("shuffle_labels and placebo are two different controls: choose one.")
        if clean_side not in ("rollout", "reference") or (placebo and clean_side == "reference"):
            raise ValueError(f"clean_side={clean_side!r} must be 'rollout' or 'reference', and 'rollout' for placebo pairs.")
        self.clean_side, self.only_rewarded = clean_side, only_rewarded
        self.capacity, self.refresh_every, self.pairs_per_group = capacity, refresh_every, pairs_per_group
        self.method: Literal["mean", "svd"] = method
        self.k, self.shuffle_labels, self.placebo = k, shuffle_labels, placebo
        self.pairs, self.seed, self.parameters, self.chunk_size = pairs, run_seed(seed), parameters, chunk_size
        self.queue: list[LivePair] = []
        self.detector = TextDetector(detector) if isinstance(detector, str) else detector
        self._windows = 0
        self._new = 0

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module scores sequences, the patterns match, and there are start pairs."""
        require_scorer(pl_module)
        matrix_names(pl_module, self.parameters)
        self.detector.check(trainer, pl_module)
        if self.placebo:
            return
        if self.pairs is None:
            require_pair_source(trainer)
        else:
            contrast_pairs(trainer, self.pairs, self.capacity, self.seed)

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the detector and fill the queue; the first refresh, before the first step, brings the direction."""
        self.detector.fit(trainer, pl_module)
        if self.placebo:
            return
        start = encode_pairs(require_scorer(pl_module), contrast_pairs(trainer, self.pairs, self.capacity, self.seed))
        self.queue = [self._labelled(LivePair(-1, index, (0, 0), concept, clean)) for index, (concept, clean) in enumerate(start)]

    def on_rollouts(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        """Queue the window's new pairs, ordered by global slot so that every rank holds the same queue.

        Raises:
            TypeError: The window shows verdicts: labels of the oracle must never reach a direction.
        """
        if isinstance(window, OracleWindow):
            raise TypeError("LiveGradientDifference was handed the oracle's verdicts: do not declare uses_oracle on its callback.")
        flags = self.detector.flags(trainer, pl_module, window.rollouts)
        window.features["flagged"] = torch.tensor(flags, dtype=torch.float64)
        window.metrics["direction/flagged"] = (float(sum(flags)), float(len(flags)))
        local = [pair for group in range(len(window.rows)) for pair in self._pairs_of_group(pl_module, window, group, flags)]
        new = sorted(_gathered(trainer, local), key=lambda pair: (pair.slot, pair.samples))
        self._windows, self._new = self._windows + 1, len(new)
        self.queue = [*self.queue, *(self._labelled(pair) for pair in new)][-self.capacity :]

    def refresh(self, trainer: Trainer, pl_module: LightningModule, step: int) -> ConceptDirection | None:
        """Extract from the queue every ``refresh_every`` steps, step 0 included.

        Raises:
            RuntimeError: No rollouts have been seen, or there is no pair.
        """
        if step % self.refresh_every:
            return None
        if self._windows == 0:
            raise RuntimeError(f"{type(pl_module).__name__} has shown no rollouts: a live direction needs a module that calls on_rollouts.")
        if not self.queue:
            raise RuntimeError("The first window has no two rollouts of one prompt, so there are no placebo pairs: raise the group size.")
        pairs: list[TokenPair] = [(pair.concept, pair.clean) for pair in self.queue]
        names = matrix_names(pl_module, self.parameters)
        metadata = {"source": "live_gradient_difference", "step": step, "n_pairs": len(pairs), "pair_set_sha256": pair_set_hash(pairs)}
        differences = pair_differences(trainer, pl_module, pairs, names, self.method, self.chunk_size)
        return gradient_difference(differences, self.method, self.k, metadata)

    def metrics(self) -> dict[str, float]:
        """``pairs`` in the queue, those of them that are live, and those that the last window brought."""
        live = sum(pair.step >= 0 for pair in self.queue)
        counts = {"pairs": float(len(self.queue)), "live_pairs": float(live), "new_pairs": float(self._new)}
        return counts | self.detector.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The queue as lists of integers, and the detector's state."""
        queue = [_to_lists(pair) for pair in self.queue]
        return {"queue": queue, "windows": self._windows, "new": self._new, "detector": self.detector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`."""
        self.queue = [_from_lists(lists) for lists in state["queue"]]
        self._windows, self._new = state["windows"], state["new"]
        self.detector.load_state_dict(state["detector"])

    def _pairs_of_group(self, pl_module: LightningModule, window: Window, group: int, flags: list[bool]) -> list[LivePair]:
        """New pairs of one prompt, matched in order of sample index."""
        indices = range(group * window.group_size, (group + 1) * window.group_size)
        indices = sorted(indices, key=lambda index: window.rollouts[index].sample)
        flagged = [index for index in indices if flags[index] and (window.rewards[index].passed or not self.only_rewarded)]
        if self.clean_side == "reference":
            return [_against_reference(pl_module, window, group, index) for index in flagged[: self.pairs_per_group]]
        clean = [index for index in indices if not flags[index] and window.rewards[index].passed]
        count = min(len(flagged), len(clean), self.pairs_per_group)
        if self.placebo:
            return self._placebo_pairs(window, list(indices), self.pairs_per_group if self._windows == 0 else count)
        return [_pair(window, one, other) for one, other in zip(flagged[:count], clean[:count], strict=True)]

    def _placebo_pairs(self, window: Window, indices: list[int], count: int) -> list[LivePair]:
        """``count`` disjoint random pairs of a group (as many as it has)."""
        slot = window.rollouts[indices[0]].slot
        generator = torch.Generator().manual_seed(derive_seed("placebo", self.seed, window.step, slot))
        order = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
        return [_pair(window, order[2 * i], order[2 * i + 1]) for i in range(min(count, len(order) // 2))]

    def _labelled(self, pair: LivePair) -> LivePair:
        """The pair, with its sides swapped by a coin that depends on the pair alone where labels are shuffled."""
        if not self.shuffle_labels or derive_seed("shuffle", self.seed, pair.step, pair.slot, *pair.samples) % 2:
            return pair
        return LivePair(pair.step, pair.slot, pair.samples, pair.clean, pair.concept)


def _pair(window: Window, concept: int, clean: int) -> LivePair:
    """The pair of two rollouts of a window."""
    one, other = window.rollouts[concept], window.rollouts[clean]
    return LivePair(window.step, one.slot, (one.sample, other.sample), one.tokens, other.tokens)


def _against_reference(pl_module: LightningModule, window: Window, group: int, concept: int) -> LivePair:
    """The pair of a rollout and its row's reference solution.

    Raises:
        TypeError: The row has none.
    """
    row, one = window.rows[group], window.rollouts[concept]
    reference = getattr(row, "reference", None)
    if not isinstance(reference, str):
        raise TypeError(f"Row {row.id!r} has no reference solution, which clean_side=reference needs: use clean_side=rollout.")
    clean = require_scorer(pl_module).encode(row.prompt, reference)
    return LivePair(window.step, one.slot, (one.sample, -1), one.tokens, clean)


def _gathered(trainer: Trainer, pairs: list[LivePair]) -> list[LivePair]:
    """All ranks' pairs, in no particular order."""
    if trainer.world_size == 1:
        return pairs
    received: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(received, [_to_lists(pair) for pair in pairs])
    return [_from_lists(lists) for part in received for lists in part]


def _to_lists(pair: LivePair) -> list[list[int]]:
    """Token ids and keys as plain lists."""
    sides = [list(ids) for side in (pair.concept, pair.clean) for ids in (side.prompt_ids, side.completion_ids)]
    return [[pair.step, pair.slot, *pair.samples], *sides]


def _from_lists(lists: list[list[int]]) -> LivePair:
    """Inverse of :func:`_to_lists`."""
    (step, slot, one, other), *sides = lists
    ids = [tuple(side) for side in sides]
    return LivePair(step, slot, (one, other), TokenSequence(ids[0], ids[1]), TokenSequence(ids[2], ids[3]))
