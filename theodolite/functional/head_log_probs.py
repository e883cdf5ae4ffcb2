"""Log-probabilities of chosen tokens straight from hidden states: the logits exist for one chunk of tokens at a time.

For a frozen head everything the backward pass needs is known in the forward pass: the gradient of one token's log-probability with
respect to its hidden state, scaled later by a single number per token. So nothing is recomputed and no weight gradient is formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 22
"""Logits alive at once (16 MiB in float32): large enough for a full-speed product, small beside any model."""


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, track: bool) -> tuple[Tensor, Tensor]:
        log_probs = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
        entropies = torch.empty_like(log_probs)
        slopes = torch.empty_like(hidden) if track else None
        chunk = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, temperature)
            picked = logits.gather(1, ids[part, None]).squeeze(1)
            highest = logits.amax(dim=1, keepdim=True)
            probs = logits.sub_(highest).exp_()
            total = probs.sum(dim=1, keepdim=True)
            log_total = (total.log() + highest).squeeze(1)
            log_probs[part] = picked - log_total
            # E[w] under the softmax: with it the entropy is log Z - h E[w] / T and the slope of log p is (w_y - E[w]) / T
            mean = (probs.div_(total).to(weight) @ weight).to(log_probs)
            entropies[part] = log_total - (hidden[part].to(mean) * mean).sum(dim=1) / temperature
            if slopes is not None:
                slopes[part] = ((weight[ids[part]].to(mean) - mean) / temperature).to(slopes)
        ctx.mark_non_differentiable(entropies)
        ctx.temperature = temperature
        trained_head = track and weight.requires_grad
        ctx.save_for_backward(slopes, *((hidden, weight, ids) if trained_head else (None, None, None)))
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        slopes, hidden, weight, ids = ctx.saved_tensors
        scale = gradients[0]
        hidden_gradient = slopes * scale[:, None].to(slopes)
        weight_gradient = _weight_gradient(hidden, weight, ids, scale, ctx.temperature) if weight is not None else None
        return hidden_gradient, weight_gradient, None, None, None


def head_log_probs(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    r""":math:`\log\operatorname{softmax}(W h / T)_y` per token, and the entropy of that softmax.

    Memory is O(tokens x width + chunk x vocabulary). A head that needs no gradient costs two products per token in all (logits, and the
    expected row of W); a trained one recomputes its logits once in the backward pass.

    Args:
        hidden: (N, d) hidden states of the positions that predict.
        weight: (V, d) output embedding.
        ids: (N,) the tokens that came.
        temperature: T, divides the logits.

    Returns:
        (N,) log-probabilities, differentiable in ``hidden`` and ``weight``, and (N,) entropies in nats without gradient; float32, or
        float64 for such states.
    """
    track = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    log_probs, entropies = _HeadLogProbs.apply(hidden, weight, ids, temperature, track)  # pyright: ignore[reportGeneralTypeIssues]
    return log_probs, entropies


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.T).to(_wide(hidden))
    return logits if temperature == 1.0 else logits / temperature


def _weight_gradient(hidden: Tensor, weight: Tensor, ids: Tensor, scale: Tensor, temperature: float) -> Tensor:
    """``sum_n scale_n (onehot(y_n) - p_n) h_n / T``, logits recomputed by chunk."""
    found = torch.zeros(weight.shape, dtype=_wide(weight), device=weight.device)
    chunk = max(1, CHUNK_LOGITS // weight.shape[0])
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        share = _logits(hidden[part], weight, temperature).softmax(dim=1).neg_()
        share.scatter_add_(1, ids[part, None], torch.ones_like(share[:, :1]))
        share *= scale[part, None] / temperature
        found += share.T @ hidden[part].to(share)
    return found.to(weight)
