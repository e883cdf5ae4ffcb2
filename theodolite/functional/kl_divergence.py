"""KL divergence between two sets of logits in chunks, with its gradient computed on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def kl_sum(logits: Tensor, reference: Tensor, chunk_numbers: int) -> Tensor:
    r""":math:`\sum_\text{rows} KL(\mathrm{softmax}(\text{reference})\,\|\,\mathrm{softmax}(\text{logits}))`, differentiable in ``logits``.

    Log-probabilities exist for one chunk of rows at a time. The gradient, ``softmax(logits) - softmax(reference)``, shares its exponentials
    with the value, so it is computed with it: nothing but the gradient itself, of the logits' size, waits for the backward pass.

    Args:
        logits: (N, V).
        reference: (N, V), a constant.
        chunk_numbers: Logits per chunk; at least one row is taken.

    Returns:
        A scalar, in float32 or wider.
    """
    result = _KLSum.apply(logits, reference.detach(), max(1, chunk_numbers // logits.shape[-1]))
    assert isinstance(result, Tensor)
    return result


class _KLSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor, rows: int) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        sums: list[Tensor] = []
        for start in range(0, logits.shape[0], rows):
            part, its_reference = logits[start : start + rows].to(wide), reference[start : start + rows].to(wide)
            log_q, log_p = torch.log_softmax(part, dim=-1), torch.log_softmax(its_reference, dim=-1)
            p = log_p.exp()
            # the reference's chunk is spent: p (log p - log q) takes its place
            sums.append(log_p.sub_(log_q).mul_(p).sum())
            if gradient is not None:
                gradient[start : start + rows] = log_q.exp_().sub_(p)
        ctx.gradient = gradient
        return torch.stack(sums).sum() if sums else logits.new_zeros((), dtype=wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.gradient * upstream.to(ctx.gradient.dtype), None, None
