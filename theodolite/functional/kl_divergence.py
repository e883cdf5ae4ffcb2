"""KL divergence between two sets of logits in chunks, with its gradient computed on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class KLReference:
    """Logits that many divergences are taken from, one after the other, as in the steps of an attack.

    All gradients share one piece of memory: the graph of a divergence must have been used before the next is computed, and using it later
    is an error of autograd's.

    Args:
        logits: (..., V).
    """

    def __init__(self, logits: Tensor) -> None:
        self.log_probabilities, self.probabilities = (normalise(logits.flatten(0, -2)) for normalise in (_log_softmax, _softmax))
        self._gradient: Tensor | None = None

    def gradient(self, logits: Tensor) -> Tensor:
        """Memory for a gradient of the shape and dtype of ``logits``."""
        if self._gradient is None or self._gradient.dtype != logits.dtype:
            self._gradient = torch.empty_like(logits)
        return self._gradient


def kl_sum(logits: Tensor, reference: Tensor | KLReference, chunk_numbers: int, valued: bool = True) -> Tensor:
    r""":math:`\sum_\text{rows} KL(\mathrm{softmax}(\text{reference})\,\|\,\mathrm{softmax}(\text{logits}))`, differentiable in ``logits``.

    Log-probabilities exist for one chunk of rows at a time. The gradient, ``softmax(logits) - softmax(reference)``, is computed with the
    value, while a chunk is at hand: nothing but the gradient itself, of the logits' size, waits for the backward pass. Where the logits are
    the reference it is exactly 0.

    Args:
        logits: (N, V).
        reference: (N, V), a constant.
        chunk_numbers: Logits per chunk; at least one row is taken.
        valued: The value is wanted. Without it, the gradient is the same bit for bit, at a third of the time.

    Returns:
        A scalar, in float32 or wider; NaN if it is not ``valued`` and there is a gradient to take.
    """
    constant = reference.detach() if isinstance(reference, Tensor) else reference
    result = _KLSum.apply(logits, constant, max(1, chunk_numbers // logits.shape[-1]), valued)
    assert isinstance(result, Tensor)
    return result


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class _KLSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor | KLReference, rows: int, valued: bool) -> Tensor:
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = reference.gradient(logits) if isinstance(reference, KLReference) else torch.empty_like(logits)
        wide = torch.promote_types(logits.dtype, torch.float32)
        sums: list[Tensor] = [] if valued or gradient is None else [logits.new_full((), torch.nan, dtype=wide)]
        for start in range(0, logits.shape[0], rows):
            chunk = slice(start, start + rows)
            p = reference.probabilities[chunk] if isinstance(reference, KLReference) else _softmax(reference[chunk].to(wide))
            if valued or gradient is None:
                log_p = (
                    reference.log_probabilities[chunk] if isinstance(reference, KLReference) else _log_softmax(reference[chunk].to(wide))
                )
                sums.append(torch.linalg.vecdot(log_p - _log_softmax(logits[chunk]), p).sum())
            if gradient is not None:
                torch.sub(_softmax(logits[chunk]), p, out=gradient[chunk])
        ctx.save_for_backward(gradient)
        return torch.stack(sums).sum() if sums else logits.new_zeros((), dtype=wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        # an attack differentiates the sum itself, and a pass over all logits by a factor of 1 is one too many
        one = upstream.device.type == "cpu" and float(upstream) == 1.0
        return gradient if one else gradient * upstream.to(gradient.dtype), None, None, None
