"""KL divergence between two sets of logits in chunks, with its gradient computed on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Reference(NamedTuple):
    """Log-probabilities (N, V) and probabilities that many divergences are taken from."""

    log_probabilities: Tensor
    probabilities: Tensor

    @staticmethod
    def of(logits: Tensor) -> Reference:
        """Of logits (..., V), which are flattened to (N, V); in float32 or wider."""
        found = log_probabilities(logits.detach().flatten(0, -2))
        return Reference(found, found.exp())


def kl_sum(logits: Tensor, reference: Tensor | Reference, chunk_numbers: int) -> Tensor:
    r""":math:`\sum_\text{rows} KL(\mathrm{softmax}(\text{reference})\,\|\,\mathrm{softmax}(\text{logits}))`, differentiable in ``logits``.

    Log-probabilities exist for one chunk of rows at a time. The gradient, ``softmax(logits) - softmax(reference)``, shares its exponentials
    with the value, so it is computed with it: nothing but the gradient itself, of the logits' size, waits for the backward pass.

    Args:
        logits: (N, V).
        reference: (N, V) logits, a constant; or what they say, where it is needed more than once.
        chunk_numbers: Logits per chunk; at least one row is taken.

    Returns:
        A scalar, in float32 or wider.
    """
    log_p, p = reference if isinstance(reference, Reference) else (reference.detach(), None)
    result = _KLSum.apply(logits, log_p, p, max(1, chunk_numbers // logits.shape[-1]))
    assert isinstance(result, Tensor)
    return result


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities over the last axis, in float32 or wider."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class _KLSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor, probabilities: Tensor | None, rows: int) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        sums: list[Tensor] = []
        for start in range(0, logits.shape[0], rows):
            chunk = slice(start, start + rows)
            log_q, log_p = log_probabilities(logits[chunk]), reference[chunk]
            log_p = log_p if probabilities is not None else log_probabilities(log_p.to(wide))
            p = log_p.exp() if probabilities is None else probabilities[chunk]
            sums.append(torch.dot((log_p - log_q).flatten(), p.flatten()))
            if gradient is not None:
                torch.sub(log_q.exp_(), p, out=gradient[chunk])
        ctx.gradient = gradient
        return torch.stack(sums).sum() if sums else logits.new_zeros((), dtype=wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # an attack differentiates the sum itself, and a pass over all logits by a factor of 1 is one too many
        one = upstream.device.type == "cpu" and float(upstream) == 1.0
        return ctx.gradient if one else ctx.gradient * upstream.to(ctx.gradient.dtype), None, None, None
