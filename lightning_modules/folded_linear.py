r"""Linear layers with a LoRA adapter as one product, in the forward pass and towards the input.

With the adapter folded in, :math:`y = x (W + s B A)^\top`. Its gradients need no product of the layer's size beyond the one towards the
input: with :math:`g` the output's gradient, :math:`dA = s (g B)^\top x` and :math:`dB = s\, g^\top (x A^\top)`, all of rank r. Beside the
adapter's own three products and two additions per layer this also keeps one tensor less per layer for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from .merged_adapter import adapted_layers


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, folded: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, folded, a, b)
        ctx.scale = scale
        return linear(x, folded, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, folded, a, b = ctx.saved_tensors
        towards_input = gradients[0] @ folded if ctx.needs_input_grad[0] else None
        out, inputs = gradients[0].flatten(0, -2), x.flatten(0, -2)
        for_a = ((out @ b).T @ inputs).mul_(ctx.scale)
        for_b = (out.T @ (inputs @ a.T)).mul_(ctx.scale)
        return towards_input, None, None, for_a, for_b, None


class FoldedLinear(nn.Module):
    """Stands in for a LoRA layer; differentiable in the adapter and in the input.

    Args:
        layer: A layer that :func:`foldable` accepts.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        name = layer.active_adapters[0]
        base = layer.get_base_layer()
        self._bias, self._scale = base.bias, float(layer.scaling[name])
        self._factors: tuple[Tensor, Tensor] = (layer.lora_A[name].weight, layer.lora_B[name].weight)  # in a tuple: no parameters of ours
        with torch.no_grad():
            a, b = self._factors
            self._folded = torch.addmm(base.weight, b, a, alpha=self._scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return _Folded.apply(x, self._folded, self._bias, *self._factors, self._scale)  # pyright: ignore[reportReturnType]


def foldable(layer: Any) -> bool:
    """Whether a layer is a frozen linear layer with one plain trained adapter in full precision, and nobody watches its parts."""
    if type(layer) is not LoraLinear or type(layer.get_base_layer()) is not nn.Linear or layer.disable_adapters or layer.merged:
        return False
    base, name = layer.get_base_layer(), layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    if name is None or name not in layer.lora_A or name in layer.lora_variant or base.weight.requires_grad:
        return False
    parts: list[Any] = [layer, base, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]]
    watched = any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks for part in parts)
    weights: list[Any] = [base.weight, parts[2].weight, parts[3].weight]
    one_dtype = len({weight.dtype for weight in weights}) == 1 and weights[0].dtype in (torch.float32, torch.float64)
    silent = isinstance(parts[4], nn.Identity) or not layer.training or parts[4].p == 0
    trained = all(weight.requires_grad for weight in weights[1:]) and parts[3].bias is None
    return bool(one_dtype and silent and trained and not watched and (base.bias is None or not base.bias.requires_grad))


def folded_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and stand-in of every layer that can be folded, with the adapter's weights of now.

    Memory for one copy of the adapted weights is needed as long as these are held.
    """
    return [(parent, name, FoldedLinear(layer)) for parent, name, layer in adapted_layers(model) if foldable(layer)]


@contextmanager
def folded(layers: Sequence[tuple[nn.Module, str, nn.Module]]) -> Iterator[None]:
    """Inside, forward passes go through the stand-ins; what they leave in the graph stays valid afterwards."""
    originals = [getattr(parent, name) for parent, name, _ in layers]
    try:
        for parent, name, layer in layers:
            setattr(parent, name, layer)
        yield
    finally:
        for (parent, name, _), original in zip(layers, originals, strict=True):
            setattr(parent, name, original)
