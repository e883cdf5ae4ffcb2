"""Losses of parameter decompositions, each as a sum and a count so that batches and ranks add up exactly.

Stochastic parameter decomposition: arXiv 2506.20790.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from theodolite.functional.kl_divergence import kl_sum

ReconKind: TypeAlias = Literal["mse", "kl"]

KL_CHUNK_NUMBERS = 1 << 17
"""Logits that one chunk of a KL divergence looks at: a chunk's temporaries stay in a processor's cache, and few launches fill a GPU's."""


def recon_count(target: Tensor, kind: ReconKind) -> int:
    """What a reconstruction loss is divided by: positions for ``kl``, elements for ``mse``."""
    return target.numel() // target.shape[-1] if kind == "kl" else target.numel()


def recon_sum(prediction: Tensor, target: Tensor, kind: ReconKind, chunk_numbers: int = KL_CHUNK_NUMBERS) -> Tensor:
    r"""Summed reconstruction loss.

    ``kl``: :math:`\sum_{\text{positions}} KL(\text{softmax}(t)\,\|\,\text{softmax}(p))`; ``mse``: :math:`\sum (p - t)^2`.

    Args:
        prediction: (..., V) logits or outputs under masks.
        target: The same of the target model.
        kind: ``kl`` or ``mse``.
        chunk_numbers: Logits per chunk of a KL divergence. A chunk's log-probabilities are not kept for the backward pass, so that memory
            is one chunk's and not the batch's.

    Raises:
        ValueError: If shapes differ or the kind is unknown.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"A prediction of shape {tuple(prediction.shape)} cannot be compared with a target of {tuple(target.shape)}.")
    if kind == "mse":
        wide = torch.promote_types(prediction.dtype, torch.float32)
        return (prediction.to(wide) - target.to(wide)).square().sum()
    if kind != "kl":
        raise ValueError(f"There is no reconstruction loss {kind!r}; choose mse or kl.")
    vocabulary = target.shape[-1]
    return kl_sum(prediction.reshape(-1, vocabulary), target.reshape(-1, vocabulary), chunk_numbers)


def faithfulness(deltas: Iterable[Tensor]) -> Tensor:
    r"""Mean squared entry of what the components leave of the weights, :math:`\sum_l \|\Delta_l\|_F^2 / \sum_l |\Delta_l|`."""
    deltas = list(deltas)
    total = torch.stack([delta.square().sum() for delta in deltas]).sum()
    return total / sum(delta.numel() for delta in deltas)


def importance_sums(importances: Mapping[str, Tensor], power: float, eps: float = 1e-12) -> dict[str, Tensor]:
    r""":math:`S_c = \sum_\text{positions} (u_c + \epsilon)^p` by module, each (C,). ``importances`` are upper ones, (..., C)."""
    return {name: (u + eps).pow(power).flatten(0, -2).sum(dim=0) for name, u in importances.items()}


def importance_minimality(sums: Mapping[str, Tensor], positions: int, beta: float = 0.0) -> Tensor:
    r"""Penalty on causal importances, :math:`\sum_c \frac{S_c}{N} (1 + \beta \log_2(1 + S_c))`, over all modules' components.

    Args:
        sums: From :func:`importance_sums`, over the *global* batch; the logarithm makes the loss depend on how large that is.
        positions: N, the number of positions in the sums.
        beta: Weight of the logarithm, which prefers components that are used rarely over ones used a little everywhere.
    """
    return torch.stack([(s / positions * (1 + beta * torch.log2(1 + s))).sum() for s in sums.values()]).sum()


def importance_weights(sums: Mapping[str, Tensor], positions: int, beta: float = 0.0) -> dict[str, Tensor]:
    """Derivative of :func:`importance_minimality` by each sum, so that parts of a batch can be differentiated one after the other."""
    leaves = {name: s.detach().requires_grad_() for name, s in sums.items()}
    with torch.enable_grad():
        gradients = torch.autograd.grad(importance_minimality(leaves, positions, beta), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


def annealed_power(fraction: float, power: float, final: float | None = None, start: float = 1.0, end: float = 1.0) -> float:
    """The exponent at ``fraction`` of training: linear from ``power`` to ``final`` between ``start`` and ``end``, ``final`` afterwards.

    ``final=None`` or ``start >= 1`` keeps ``power``.
    """
    if final is None or start >= 1.0 or fraction < start:
        return power
    if fraction >= end:
        return final
    return power + (final - power) * (fraction - start) / (end - start)


def hidden_acts_sums(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
    """Summed squared error of each module's output against its output in a clean forward pass, and the number of entries."""
    return {name: ((output - targets[name]).square().sum(), output.numel()) for name, output in outputs.items()}


def next_token_cross_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, int]:
    """Summed cross-entropy of each token given those before it, and the number of tokens predicted: (B, S, V) and (B, S)."""
    flat = logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(flat, tokens[:, 1:].flatten(), reduction="sum"), flat.shape[0]


def alive_count(importance: Tensor, threshold: float) -> int:
    """Number of (position, component) pairs whose importance is above ``threshold``; divided by positions it is the L0."""
    return int((importance > threshold).sum())


def column_sums(values: Tensor) -> Tensor:
    """(..., C) to (C,), summed over positions in float64."""
    return values.to(torch.float64).flatten(0, -2).sum(dim=0)


def split_positions(names: Sequence[str], flat: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Cut the last axis of ``flat`` into named parts."""
    return dict(zip(names, flat.split(list(sizes), dim=-1), strict=True))
