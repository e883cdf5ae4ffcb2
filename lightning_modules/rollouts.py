"""Rollout engines: token ids in; token ids, sampler log-probabilities and finish reasons out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from theodolite.out_of_memory import FittingParts
from theodolite.protocols import PromptRow
from theodolite.seeds import derive_seed

from .continuations import Prefix
from .decoding import Sampling, decode, evaluation_mode, uniform_streams
from .merged_adapter import merged_adapter
from .prompt_attention import supports_prompt_attention


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled completion.

    Attributes:
        ids: Token ids, the end token included when one was sampled.
        log_probs: Log-probability of each under the temperature-scaled distribution: the untruncated one, or with an engine of
            ``own_numerics`` that over the tokens which top_p and top_k keep.
        finish: ``stop`` or ``length``.
        weight_version: As given to the last ``sync``.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: Literal["stop", "length"]
    weight_version: int


@runtime_checkable
class RolloutEngine(Protocol):
    """What a policy module needs of a sampler. Nothing is constructed before ``setup``."""

    own_numerics: bool
    """Whether the sampler computes with kernels, or weights, other than the trainer's."""

    def setup(self, model: nn.Module, end_ids: Sequence[int], pad_id: int, folder: Path | None = None) -> None:
        """Bind to the policy's weights; ``folder`` is the run's."""
        ...

    def sync(self, version: int) -> None:
        """Make the sampler's weights those of the policy after ``version`` optimizer steps."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[list[Sample]]:
        """``len(seeds[i])`` completions of ``prompts[i]``, one per seed; a sample is a function of its prompt, seed and the weights."""
        ...

    def offload(self) -> None:
        """Give memory back for the training phase."""
        ...

    def onload(self) -> None:
        """Be ready to generate again."""
        ...

    def teardown(self) -> None:
        """Release everything; idempotent."""
        ...


@runtime_checkable
class SamplesAhead(Protocol):
    """A rollout engine with weights of its own, which can sample while the policy is trained."""

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> Future[list[list[Sample]]]:
        """As ``generate``, in the background, with the weights of the last ``sync``; a later ``sync`` sends others only after its end."""
        ...


def sample_seeds(run_seed: int, rows: Sequence[PromptRow], n: int, *purpose: int | str) -> list[list[int]]:
    """Seeds of ``n`` completions per row: each a function of (run seed, purpose, problem, sample), whatever the rank or batch."""
    return [[derive_seed(run_seed, *purpose, row.id, i) for i in range(n)] for row in rows]


REMEDY = "lower model.max_new_tokens, train an adapter or a smaller policy, or sample elsewhere (model.rollout)"


class HFRollout:
    """Decodes with the live ``transformers`` model.

    Each prompt is computed once, and its keys and values are read once per step for its whole group (where an architecture wants more than
    plain attention they are repeated over the group); rows that have ended leave the batch; the sampler's log-probabilities come from the
    same softmax that the token was drawn from. Randomness is one counter-based stream per sample, so a sample does not depend on which
    others share its batch (up to float noise in the logits).

    Args:
        max_rows: Most completions decoded at once; more are decoded in turns, groups whole where they fit. Bounds memory, changes nothing
            else. Where memory runs out nevertheless, half as many are decoded at once from then on.
        merge_adapter: Fold a LoRA adapter into its base meanwhile; see :func:`~.merged_adapter.merged_adapter`.
    """

    own_numerics = False

    def __init__(self, max_rows: int = 4096, merge_adapter: bool = False) -> None:
        self.max_rows, self.merge_adapter, self._fitting = max_rows, merge_adapter, FittingParts(max_rows, REMEDY)
        self._model: nn.Module | None = None
        self._end_ids: frozenset[int] = frozenset()
        self._pad_id = 0
        self._version = 0
        self._shares_prompts: bool | None = None  # not tried out yet

    def setup(self, model: nn.Module, end_ids: Sequence[int], pad_id: int, folder: Path | None = None) -> None:
        """See :class:`RolloutEngine`."""
        self._model, self._end_ids, self._pad_id = model, frozenset(end_ids), pad_id
        self._shares_prompts = None

    @property
    def row_limit(self) -> int | None:
        """Completions that have fitted at once after memory ran out; None = it never did. A resumed run begins with it."""
        return self._fitting.rows_per_part if self._fitting.rows_per_part < self.max_rows else None

    @row_limit.setter
    def row_limit(self, limit: int | None) -> None:
        self._fitting = FittingParts(self.max_rows if limit is None else min(limit, self.max_rows), REMEDY)

    def sync(self, version: int) -> None:
        """The live model is the policy: only the version is noted."""
        self._version = version

    def offload(self) -> None:
        """Nothing is held beside the policy."""

    def onload(self) -> None:
        """Nothing is held beside the policy."""

    def teardown(self) -> None:
        """Forget the model."""
        self._model = None

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[list[Sample]]:
        """See :class:`RolloutEngine`.

        Raises:
            RuntimeError: Before ``setup``; or one completion alone does not fit into memory, and what to change.
            ValueError: If the numbers of prompts and of seed lists differ.
        """
        if self._model is None:
            raise RuntimeError("The rollout engine was asked to generate before setup.")
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts came with {len(seeds)} lists of seeds; each prompt needs one.")
        samples: list[list[Sample]] = []
        with merged_adapter(self._model) if self.merge_adapter else nullcontext():
            for start, stop in _turns([len(s) for s in seeds], self._fitting.rows_per_part):
                samples += self._in_parts(prompts[start:stop], sampling, seeds[start:stop])
        return samples

    def _in_parts(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[list[Sample]]:
        """One turn, at once if that fits: a sample's randomness is its own, so smaller parts draw the same."""
        flat = [(g, seed) for g, group in enumerate(seeds) for seed in group]

        def decoded(part: slice) -> list[Sample]:
            groups = {g: [seed for _, seed in own] for g, own in itertools.groupby(flat[part], key=itemgetter(0))}
            found = self._decode([prompts[g] for g in groups], sampling, list(groups.values()))
            return list(itertools.chain.from_iterable(found))

        samples = itertools.chain.from_iterable(self._fitting.map(decoded, len(flat)))
        return [list(itertools.islice(samples, len(group))) for group in seeds]

    @torch.no_grad()
    def _decode(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[list[Sample]]:
        counts = [len(s) for s in seeds]
        assert self._model is not None
        device = next(self._model.parameters()).device
        with evaluation_mode(self._model):
            uniforms = uniform_streams([seed for group in seeds for seed in group], sampling.max_new_tokens)
            prefix = self._prefill(prompts, torch.tensor(counts), device)
            done = decode(self._model, prefix, uniforms, sampling, sorted(self._end_ids), self._pad_id)
        flat = [
            Sample(
                tuple(done.ids[row, :length].tolist()),
                tuple(done.log_probs[row, :length].tolist()),
                "stop" if done.stopped[row] else "length",
                self._version,
            )
            for row, length in enumerate(done.lengths.tolist())
        ]
        bounds = np.cumsum([0, *counts])
        return [flat[a:b] for a, b in itertools.pairwise(bounds)]

    def _prefill(self, prompts: Sequence[Sequence[int]], repeats: Tensor, device: torch.device) -> Prefix:
        assert self._model is not None
        length = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), length), self._pad_id, dtype=torch.long)
        attention = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            attention[row, length - len(prompt) :] = 1
        ids, attention = ids.to(device), attention.to(device)
        outputs = self._model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=(attention.cumsum(dim=1) - 1).clamp_min(0),
            use_cache=True,
            logits_to_keep=1,
        )
        index = torch.repeat_interleave(torch.arange(len(prompts)), repeats).to(device)
        return Prefix.repeated(outputs.past_key_values, outputs.logits[:, -1], attention, index, self._sharing())

    def _sharing(self) -> bool:
        """Whether this call reads each prompt's cache once: tried out once per model, never under autocast, which comes and goes."""
        assert self._model is not None
        if torch.is_autocast_enabled(next(self._model.parameters()).device.type):
            return False  # it would round scores that the model's own kernels accumulate in float32
        if self._shares_prompts is None:
            self._shares_prompts = supports_prompt_attention(self._model)
        return self._shares_prompts


def _turns(counts: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Cut a list of group sizes into consecutive runs of at most ``most`` rows (a larger group goes alone)."""
    turns: list[tuple[int, int]] = []
    start = rows = 0
    for index, count in enumerate(counts):
        if index > start and rows + count > most:
            turns.append((start, index))
            start, rows = index, 0
        rows += count
    return [*turns, (start, len(counts))] if counts else []
