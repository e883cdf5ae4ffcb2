"""KL divergence between two sets of logits in chunks, with its gradient computed on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from theodolite.functional.attacked_product import ConstantWeight


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
        if self._gradient is None or self._gradient.dtype != logits.dtype or self._gradient.shape != logits.shape:
            self._gradient = torch.empty_like(logits)
        return self._gradient


class Unembedding:
    """A constant matrix that turns states into logits, a chunk of rows at a time, so that those of all rows need not be held.

    Args:
        weight: (width, V).
        rows: Rows per chunk.
    """

    def __init__(self, weight: Tensor, rows: int = 64) -> None:
        self.rows = rows
        self._forth, self._back = ConstantWeight(weight.detach(), rows), ConstantWeight(weight.detach().T, rows)

    def logits(self, states: Tensor) -> Tensor:
        """(rows, V) of one chunk of states (rows, width)."""
        return self._forth.times(states)

    def all_logits(self, states: Tensor) -> Tensor:
        """(..., V) of states (..., width), chunk by chunk, so that they are those of :meth:`logits` bit for bit."""
        return torch.cat([self.logits(chunk) for chunk in states.flatten(0, -2).split(self.rows)]).unflatten(0, states.shape[:-1])

    def back(self, gradient: Tensor) -> Tensor:
        """(rows, width) gradient by states, of a gradient by logits."""
        return self._back.times(gradient)


def kl_sum(
    logits: Tensor,
    reference: Tensor | KLReference,
    chunk_numbers: int,
    valued: bool = True,
    unembedding: Unembedding | None = None,
) -> Tensor:
    r""":math:`\sum_\text{rows} KL(\mathrm{softmax}(\text{reference})\,\|\,\mathrm{softmax}(\text{logits}))`, differentiable in ``logits``.

    Log-probabilities exist for one chunk of rows at a time. The gradient, ``softmax(logits) - softmax(reference)``, is computed with the
    value, while a chunk is at hand: nothing but the gradient itself, of the logits' size, waits for the backward pass. Where the logits are
    the reference it is exactly 0.

    Args:
        logits: (N, V), or with ``unembedding`` the states (N, width) that it turns into them.
        reference: (N, V), a constant.
        chunk_numbers: Logits per chunk; at least one row is taken.
        valued: The value is wanted. Without it, the gradient is the same bit for bit, at a third of the time.
        unembedding: Decides the chunks in the place of ``chunk_numbers``; None = there are logits.

    Returns:
        A scalar, in float32 or wider; NaN if it is not ``valued`` and there is a gradient to take.
    """
    constant = reference.detach() if isinstance(reference, Tensor) else reference
    rows = max(1, chunk_numbers // logits.shape[-1]) if unembedding is None else unembedding.rows
    result = _KLSum.apply(logits, constant, rows, valued, unembedding)
    assert isinstance(result, Tensor)
    return result


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class _KLSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, reference: Tensor | KLReference, rows: int, valued: bool, unembedding: Unembedding | None
    ) -> Tensor:
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = reference.gradient(inputs) if isinstance(reference, KLReference) else torch.empty_like(inputs)
        wide = torch.promote_types(inputs.dtype, torch.float32)
        sums: list[Tensor] = [] if valued or gradient is None else [inputs.new_full((), torch.nan, dtype=wide)]
        for start in range(0, inputs.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = inputs[chunk] if unembedding is None else unembedding.logits(inputs[chunk])
            p = reference.probabilities[chunk] if isinstance(reference, KLReference) else _softmax(reference[chunk].to(wide))
            if valued or gradient is None:
                log_p = (
                    reference.log_probabilities[chunk] if isinstance(reference, KLReference) else _log_softmax(reference[chunk].to(wide))
                )
                sums.append(torch.linalg.vecdot(log_p - _log_softmax(logits), p).sum())
            if gradient is None:
                continue
            if unembedding is None:
                torch.sub(_softmax(logits), p, out=gradient[chunk])
            else:
                gradient[chunk] = unembedding.back(_softmax(logits).sub_(p).to(logits.dtype))
        ctx.save_for_backward(gradient)
        return torch.stack(sums).sum() if sums else inputs.new_zeros((), dtype=wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        # an attack differentiates the sum itself, and a pass over all logits by a factor of 1 is one too many
        one = upstream.device.type == "cpu" and float(upstream) == 1.0
        return gradient if one else gradient * upstream.to(gradient.dtype), None, None, None, None
