"""Rollout engines: token ids in; token ids, sampler log-probabilities and finish reasons out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_new_tokens: Longest completion, end token included.
        temperature: Divides the logits; must be positive (greedy decoding is ``top_k=1``).
        top_p: Nucleus mass; 1 = off.
        top_k: Number of kept tokens; 0 = off.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        if self.max_new_tokens < 1 or self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"Cannot sample with max_new_tokens={self.max_new_tokens}, temperature={self.temperature}, top_p={self.top_p}, "
                f"top_k={self.top_k}; need max_new_tokens >= 1, temperature > 0, 0 < top_p <= 1, top_k >= 0."
            )


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled completion.

    Attributes:
        ids: Token ids, the end token included when one was sampled.
        log_probs: Log-probability of each under the temperature-scaled, untruncated distribution.
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

    def setup(self, model: nn.Module, end_ids: Sequence[int], pad_id: int) -> None:
        """Bind to the policy's weights."""
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


class HFRollout:
    """Decodes with the live ``transformers`` model.

    Each prompt is computed once and its key-value cache repeated over the group; rows that have ended leave the batch; the sampler's
    log-probabilities come from the same softmax that the token was drawn from. Randomness is one counter-based stream per sample, so a
    sample does not depend on which others share its batch (up to float noise in the logits).

    Args:
        max_rows: Most completions decoded at once; more are decoded in turns. Bounds memory, changes nothing else.
    """

    def __init__(self, max_rows: int = 4096) -> None:
        self.max_rows = max_rows
        self._model: nn.Module | None = None
        self._end_ids: frozenset[int] = frozenset()
        self._pad_id = 0
        self._version = 0

    def setup(self, model: nn.Module, end_ids: Sequence[int], pad_id: int) -> None:
        """See :class:`RolloutEngine`."""
        self._model, self._end_ids, self._pad_id = model, frozenset(end_ids), pad_id

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
            RuntimeError: Before ``setup``.
            ValueError: If the numbers of prompts and of seed lists differ.
        """
        if self._model is None:
            raise RuntimeError("The rollout engine was asked to generate before setup.")
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts came with {len(seeds)} lists of seeds; each prompt needs one.")
        samples: list[list[Sample]] = []
        for start, stop in _turns([len(s) for s in seeds], self.max_rows):
            samples += self._decode(prompts[start:stop], sampling, seeds[start:stop])
        return samples

    @torch.no_grad()
    def _decode(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[list[Sample]]:
        counts = [len(s) for s in seeds]
        if not sum(counts):
            return [[] for _ in seeds]
        assert self._model is not None
        device = next(self._model.parameters()).device
        with _evaluation_mode(self._model):
            ids, log_probs, lengths, stopped = self._loop(prompts, counts, sampling, _uniforms(seeds, sampling.max_new_tokens), device)
        flat = [
            Sample(
                tuple(ids[row, : lengths[row]].tolist()),
                tuple(log_probs[row, : lengths[row]].tolist()),
                "stop" if stopped[row] else "length",
                self._version,
            )
            for row in range(sum(counts))
        ]
        bounds = np.cumsum([0, *counts])
        return [flat[a:b] for a, b in itertools.pairwise(bounds)]

    def _loop(
        self, prompts: Sequence[Sequence[int]], counts: list[int], sampling: Sampling, uniforms: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self._model is not None
        repeats = torch.tensor(counts)
        cache, logits, attention, positions = self._prefill(prompts, repeats, device)
        rows, steps = int(repeats.sum()), sampling.max_new_tokens
        ids = torch.full((rows, steps), self._pad_id, dtype=torch.long)
        log_probs = torch.zeros(rows, steps)
        lengths = torch.full((rows,), steps)
        stopped = torch.zeros(rows, dtype=torch.bool)
        end_ids = torch.tensor(sorted(self._end_ids), dtype=torch.long)
        alive = torch.arange(rows)
        for step in range(steps):
            tokens, chosen = draw(logits, uniforms[alive, step].to(device), sampling)
            ids[alive, step], log_probs[alive, step] = tokens.cpu(), chosen.cpu()
            ended = torch.isin(tokens.cpu(), end_ids)
            lengths[alive[ended]], stopped[alive[ended]] = step + 1, True
            if bool(ended.all()) or step + 1 == steps:
                break
            if bool(ended.any()):
                keep = (~ended).nonzero().squeeze(1)
                alive, on_device = alive[keep], keep.to(device)
                cache.batch_select_indices(on_device)
                tokens, attention, positions = tokens[on_device], attention[on_device], positions[on_device]
            attention = torch.cat([attention, attention.new_ones(len(attention), 1)], dim=1)
            outputs = self._model(
                input_ids=tokens[:, None],
                attention_mask=attention,
                position_ids=positions[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            cache, logits, positions = outputs.past_key_values, outputs.logits[:, -1], positions + 1
        return ids, log_probs, lengths, stopped

    def _prefill(
        self, prompts: Sequence[Sequence[int]], repeats: Tensor, device: torch.device
    ) -> tuple[DynamicCache, Tensor, Tensor, Tensor]:
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
        cache = outputs.past_key_values
        cache.batch_select_indices(index)
        return cache, outputs.logits[index, -1], attention[index], attention.sum(dim=1)[index]


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row by inverse transform sampling: the first token whose cumulative probability exceeds the row's uniform number.

    Args:
        logits: (B, V).
        uniforms: (B,) numbers in [0, 1).
        sampling: Temperature and truncation.

    Returns:
        (B,) token ids and (B,) log-probabilities under the temperature-scaled, untruncated distribution.
    """
    log_probs = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    probs = log_probs.exp()
    if sampling.top_k or sampling.top_p < 1:
        probs = truncate(probs, sampling.top_p, sampling.top_k)
    cumulative = probs.double().cumsum(dim=-1)
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)
    return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(1)


def truncate(probs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Zero all but the ``top_k`` likeliest tokens, then all beyond the smallest set whose mass reaches ``top_p`` (not renormalised).

    Args:
        probs: (B, V) probabilities.
        top_p: Nucleus mass; 1 = off.
        top_k: Number of kept tokens; 0 = off.
    """
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = 0
    mass_before = ordered.cumsum(dim=-1) - ordered
    ordered = torch.where(mass_before < top_p * ordered.sum(dim=-1, keepdim=True), ordered, 0.0)
    return torch.zeros_like(probs).scatter(-1, order, ordered)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside; every submodule's own mode as before on the way out."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _uniforms(seeds: Sequence[Sequence[int]], steps: int) -> Tensor:
    streams = [np.random.Generator(np.random.Philox(key=seed)).random(steps) for group in seeds for seed in group]
    return torch.from_numpy(np.stack(streams))


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
