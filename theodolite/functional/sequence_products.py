r"""Inner products of single sequences' gradients with given matrices, from one backward pass for all of them.

For a linear map ``y_t = W x_t`` and a loss that is a sum over sequences, the gradient of sequence ``i`` alone is ``G_i = sum_t delta_it
x_it^T`` with ``delta_it = dL/dy_it``. It is never built:

* ``<G_i, V> = sum_t delta_it^T V x_it``. For LoRA's ``B`` (d x r) the input is the bottleneck ``A x`` of r numbers, so this costs O(T d r);
* ``|G_i|^2 = sum_{t,t'} (delta_it . delta_it') (x_it . x_it')``, through two T x T Gram matrices; where the matrix is smaller than those,
  ``G_i`` is built after all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


def sequence_dots(delta: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """``<G_i, V_k>`` for every sequence and row.

    Args:
        delta: (B, T, d_out) gradients of the outputs.
        x: (B, T, d_in) inputs.
        rows: (k, d_out, d_in).

    Returns:
        (B, k) in float32.
    """
    delta, x, rows = delta.float(), x.float(), rows.float()
    return torch.stack([(delta * (x @ row.T)).sum((1, 2)) for row in rows], dim=1)


def sequence_square_norms(delta: Tensor, x: Tensor) -> Tensor:
    """``|G_i|^2`` for every sequence, by the cheaper of two ways.

    Args:
        delta: (B, T, d_out).
        x: (B, T, d_in).

    Returns:
        (B,) in float32.
    """
    delta, x = delta.float(), x.float()
    if delta.shape[1] ** 2 < delta.shape[2] * x.shape[2]:
        return ((delta @ delta.mT) * (x @ x.mT)).sum((1, 2)).clamp_min(0)
    return (delta.mT @ x).square().sum((1, 2))


@dataclass
class SequenceProducts:
    """What :func:`watch_sequences` has collected. All tensors are (B, ...) over the sequences of the watched passes.

    Attributes:
        dots: ``{weight name: (B, k)}``.
        square_norms: ``{weight name: (B,)}``.
    """

    dots: dict[str, Tensor] = field(default_factory=dict)
    square_norms: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def watch_sequences(module: nn.Module, rows: Mapping[str, Tensor], sequences: int) -> Iterator[SequenceProducts]:
    """Collect products while one forward and one backward pass run inside.

    Args:
        module: Holds ``nn.Linear`` modules called with (sequences, T, d_in), each once per pass.
        rows: ``{weight name: (k, d_out, d_in)}``.
        sequences: Size of the batch dimension.

    Raises:
        ValueError: A name is not the weight of an ``nn.Linear``.
        RuntimeError: (inside) a module is called with another batch size, or more than once.
    """
    owners = dict(module.named_modules())
    for name in rows:
        if not isinstance(owners.get(name.removesuffix(".weight")), nn.Linear) or not name.endswith(".weight"):
            raise ValueError(f"{name} is not the weight of a linear layer, so single sequences' gradients of it cannot be had this way.")
    products = SequenceProducts()
    called: set[str] = set()
    handles = [
        owners[name.removesuffix(".weight")].register_forward_hook(_forward_hook(name, row, sequences, products, called))
        for name, row in rows.items()
    ]
    try:
        yield products
    finally:
        for handle in handles:
            handle.remove()


def _forward_hook(name: str, rows: Tensor, sequences: int, products: SequenceProducts, called: set[str]) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: Sequence[Tensor], output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = arguments[0].detach()
        if x.ndim != 3 or len(x) != sequences or name in called:
            raise RuntimeError(
                f"{name} was called {'again ' if name in called else ''}with an input of shape {tuple(x.shape)}: sequences must stay apart "
                f"in one (sequences, tokens, features) call of {sequences} sequences; switch packing and shared prefixes off."
            )
        called.add(name)

        def gradient_hook(delta: Tensor) -> None:
            products.dots[name] = sequence_dots(delta, x, rows.to(delta.device))
            products.square_norms[name] = sequence_square_norms(delta, x)

        output.register_hook(gradient_hook)

    return hook


def sums_over_weights(products: SequenceProducts) -> tuple[Tensor, Tensor]:
    """``<g_i, V>`` summed over weights and rows (B,), and ``|g_i|`` over the watched weights (B,)."""
    dots = torch.stack([part.sum(1) for part in products.dots.values()]).sum(0)
    norms = torch.stack(list(products.square_norms.values())).sum(0).sqrt()
    return dots, norms
