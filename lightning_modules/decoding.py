"""The decode loop that every sampler shares: from a computed prefix, one token per row and step, ended rows leave the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .continuations import Prefix, continuing


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
class Decoded:
    """Completions as tensors on the CPU.

    Attributes:
        ids: (B, T) token ids, the padding id after the end.
        log_probs: (B, T) log-probability of each token when it was drawn, after temperature.
        lengths: (B,) number of tokens, the end token included.
        stopped: (B,) whether an end token was drawn.
    """

    ids: Tensor
    log_probs: Tensor
    lengths: Tensor
    stopped: Tensor


CLEAR_OUT = 0.9
"""Ended rows leave when no more than this share goes on: moving the others' caches costs about as much as a tenth of a step."""


@torch.no_grad()
def decode(
    model: nn.Module,
    prefix: Prefix,
    uniforms: Tensor,
    sampling: Sampling,
    end_ids: Sequence[int],
    pad_id: int,
    forbidden: Sequence[int] = (),
) -> Decoded:
    """Draw up to ``sampling.max_new_tokens`` tokens for every row of a prefix.

    Args:
        model: A causal language model of ``transformers``, in evaluation mode.
        prefix: Its state after the prompts; used up.
        uniforms: (B, T) float64 numbers in [0, 1), one per token: all the randomness there is.
        sampling: Length, temperature and truncation.
        end_ids: Ids that end a completion.
        pad_id: Id that fills what follows the end.
        forbidden: Ids that are never drawn; log-probabilities are those of the distribution without them.
    """
    rows, steps, logits = len(prefix.logits), sampling.max_new_tokens, prefix.logits
    ids = torch.full((rows, steps), pad_id, dtype=torch.long)
    log_probs = torch.zeros(rows, steps, dtype=torch.float32)  # whatever dtype a precision plugin makes the default
    lengths = torch.full((rows,), steps)
    stopped = torch.zeros(rows, dtype=torch.bool)
    ends = torch.tensor(sorted(end_ids), dtype=torch.long)
    batch = torch.arange(rows)  # what is computed: every row that is going on, and some that have ended since the last clearing out
    going = torch.ones(rows, dtype=torch.bool)
    with continuing(model, prefix, steps - 1) as rest:
        for step in range(steps):
            tokens, chosen = draw(forbid(logits, forbidden), uniforms[batch, step].to(logits.device), sampling)
            drawn = tokens.cpu()
            ids[batch, step], log_probs[batch, step] = torch.where(going, drawn, pad_id), torch.where(going, chosen.cpu().float(), 0.0)
            ended = going & torch.isin(drawn, ends)
            lengths[batch[ended]], stopped[batch[ended]] = step + 1, True
            going &= ~ended
            left = int(going.sum())
            if not left or step + 1 == steps:
                break
            if left <= CLEAR_OUT * len(batch):
                kept = going.nonzero().squeeze(1)
                batch, going, on_device = batch[kept], going[kept], kept.to(logits.device)
                tokens = tokens[on_device]
                rest.keep(on_device)
            logits = rest.advance(tokens, going.to(logits.device))
    return Decoded(ids, log_probs, lengths, stopped)


def forbid(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Logits (..., V) with those of ``ids`` at minus infinity; the same tensor where ``ids`` is empty."""
    if not ids:
        return logits
    banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    banned[list(ids)] = True
    return logits.masked_fill(banned, -torch.inf)


LARGE_VOCABULARY, BLOCK = 4096, 256
"""From this size on a token is looked up in two steps, by block and within it: one pass over the probabilities instead of five."""


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row by inverse transform sampling: the first token whose cumulative probability exceeds the row's uniform number.

    Args:
        logits: (B, V).
        uniforms: (B,) numbers in [0, 1).
        sampling: Temperature and truncation.

    Returns:
        (B,) token ids and (B,) log-probabilities under the temperature-scaled, untruncated distribution.
    """
    if logits.shape[-1] >= LARGE_VOCABULARY and not sampling.top_k and sampling.top_p == 1:
        return _draw_by_block(logits, uniforms, sampling.temperature)
    log_probs = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    probs = log_probs.exp()
    if sampling.top_k or sampling.top_p < 1:
        probs = truncate(probs, sampling.top_p, sampling.top_k)
    cumulative = probs.double().cumsum(dim=-1)
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)
    return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(1)


def _draw_by_block(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As :func:`draw` without truncation. Block masses are float32 sums of 256 terms, so a boundary may be off by 1e-7 of the mass."""
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    highest = scaled.amax(dim=-1, keepdim=True)
    masses = (scaled - highest).exp_()
    whole = masses.shape[-1] // BLOCK
    blocks = masses[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).sum(dim=-1)
    if whole * BLOCK < masses.shape[-1]:
        blocks = torch.cat([blocks, masses[:, whole * BLOCK :].sum(dim=-1, keepdim=True)], dim=1)
    cumulative = blocks.double().cumsum(dim=-1)
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, threshold, right=True).clamp_max(blocks.shape[1] - 1)
    left = threshold - torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_min(0)), 0.0)
    columns = block * BLOCK + torch.arange(BLOCK, device=logits.device)
    inside = masses.gather(1, columns.clamp_max(masses.shape[-1] - 1)).double()
    within = torch.where(columns < masses.shape[-1], inside, 0.0).cumsum(dim=-1)
    # rounding must not carry the threshold past the block's own mass, onto a token of probability 0
    left = left.minimum(within[:, -1:] * (1 - 1e-12))
    tokens = block.squeeze(1) * BLOCK + torch.searchsorted(within, left, right=True).squeeze(1).clamp_max(BLOCK - 1)
    chosen = scaled.gather(-1, tokens[:, None]) - highest - cumulative[:, -1:].log().float()
    return tokens, chosen.squeeze(1)


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
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside; every submodule's own mode as before on the way out."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def uniform_streams(seeds: Sequence[int], steps: int) -> Tensor:
    """(len(seeds), steps) float64 uniform numbers in [0, 1): one counter-based stream per seed, the same in any company."""
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=seed)).random(steps) for seed in seeds]))
