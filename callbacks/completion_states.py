"""Pooled hidden states of completions from no-grad passes: what activation directions, probes and scores share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from theodolite.callbacks.sequence_gradients import require_scorer, without_trace
from theodolite.protocols import SequenceScorer, TokenSequence


def pool_states(states: Tensor, mask: Tensor, position: Literal["last", "mean"]) -> Tensor:
    """One state per completion.

    Args:
        states: (B, T, d); values outside the mask are ignored, whatever they are.
        mask: (B, T) bool.
        position: ``mean`` over masked tokens, or the ``last`` of them.

    Returns:
        (B, d); zeros for an empty completion.
    """
    if position == "last":
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask
        mask = mask & (places == places.max(1, keepdim=True).values)
    kept = torch.where(mask[..., None], states, 0.0)
    return kept.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def pooled_states(
    trainer: Any, module: nn.Module, sequences: Sequence[TokenSequence], layer: int, position: Literal["last", "mean"], chunk_size: int
) -> Tensor:
    """(n, d) pooled completion states after decoder layer ``layer``, in float64 on the CPU, in the order given; leaves no trace."""
    scorer = require_scorer(module)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].prompt_ids) + len(sequences[i].completion_ids))
    pooled: dict[int, Tensor] = {}
    with without_trace(module), trainer.precision_plugin.forward_context():
        for start in range(0, len(order), chunk_size):
            chunk = order[start : start + chunk_size]
            pooled |= dict(zip(chunk, _pool(scorer, [sequences[i] for i in chunk], layer, position), strict=True))
    return torch.stack([pooled[i] for i in range(len(sequences))])


def shared_over_ranks(trainer: Any, module: Any, states: Tensor) -> Tensor:
    """Rank 0's numbers on every rank (in float32 if there are several): kernels that are not deterministic cannot pull ranks apart."""
    if trainer.world_size == 1:
        return states
    shared = states.to(module.device, torch.float32)
    torch.distributed.broadcast(shared, src=0)
    return shared.cpu().double()


def decoder_layers(module: nn.Module) -> int:
    """Number of decoder layers, from the ``transformers`` config of a submodule.

    Raises:
        TypeError: No submodule has one.
    """
    for part in module.modules():
        layers = getattr(getattr(part, "config", None), "num_hidden_layers", None)
        if isinstance(layers, int):
            return layers
    raise TypeError(
        f"{type(module).__name__} holds no transformers model with config.num_hidden_layers, so a layer cannot be chosen by depth."
    )


def layer_band(layers: int, band: tuple[float, float]) -> list[int]:
    """Decoder layers (counted from 1) whose depth lies in a band: ``floor(low L)`` to ``floor(high L)``, at least one layer.

    Raises:
        ValueError: Not ``0 < low <= high <= 1``.
    """
    low, high = band
    if not 0 < low <= high <= 1:
        raise ValueError(f"band={list(band)} must be two fractions of the depth, 0 < low <= high <= 1.")
    first = max(1, math.floor(low * layers))
    return list(range(first, max(first, math.floor(high * layers)) + 1))


def layer_modules(module: nn.Module) -> list[nn.Module]:
    """The decoder layers themselves: the longest ``ModuleList`` whose length is ``config.num_hidden_layers``.

    Raises:
        TypeError: There is none.
    """
    wanted = decoder_layers(module)
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == wanted and name.rpartition(".")[2] in ("layers", "h", "blocks"):
            return list(part)
    raise TypeError(f"{type(module).__name__} holds no list of {wanted} decoder layers, so nothing can be added to their outputs.")


def _pool(scorer: SequenceScorer, sequences: Sequence[TokenSequence], layer: int, position: Literal["last", "mean"]) -> Tensor:
    """(n, d) mean or last-token states of one chunk."""
    states, mask = scorer.completion_states(sequences, layer)
    return pool_states(states.cpu().double(), mask.cpu().bool(), position)
