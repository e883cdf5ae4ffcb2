"""KL divergence between two sets of logits in chunks, with its gradient computed on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def kl_sum(logits: Tensor, reference: Tensor, chunk_numbers: int, normalised: bool = False) -> Tensor:
    r""":math:`\sum_\text{rows} KL(\mathrm{softmax}(\text{reference})\,\|\,\mathrm{softmax}(\text{logits}))`, differentiable in ``logits``.

    Log-probabilities exist for one chunk of rows at a time. The gradient, ``softmax(logits) - softmax(reference)``, shares its exponentials
    with the value, so it is computed with it: nothing but the gradient itself, of the logits' size, waits for the backward pass.

    Args:
        logits: (N, V).
        reference: (N, V), a constant.
        chunk_numbers: Logits per chunk; at least one row is taken.
        normalised: The reference holds log-probabilities already, as :func:`log_probabilities` makes them.

    Returns:
        A scalar, in float32 or wider.
    """
    result = _KLSum.apply(logits, reference.detach(), max(1, chunk_numbers // logits.shape[-1]), normalised)
    assert isinstance(result, Tensor)
    return result


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities over the last axis, in float32 or wider: a reference that many divergences are taken from."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class _KLSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor, rows: int, normalised: bool) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        sums: list[Tensor] = []
        for start in range(0, logits.shape[0], rows):
            log_q, log_p = log_probabilities(logits[start : start + rows]), reference[start : start + rows].to(wide)
            log_p = log_p if normalised else log_probabilities(log_p)
            p = log_p.exp()
            sums.append(torch.dot((log_p - log_q).flatten(), p.flatten()))
            if gradient is not None:
                torch.sub(log_q.exp_(), p, out=gradient[start : start + rows])
        ctx.gradient = gradient
        return torch.stack(sums).sum() if sums else logits.new_zeros((), dtype=wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # an attack differentiates the sum itself, and a pass over all logits by a factor of 1 is one too many
        one = upstream.device.type == "cpu" and float(upstream) == 1.0
        return ctx.gradient if one else ctx.gradient * upstream.to(ctx.gradient.dtype), None, None, None
