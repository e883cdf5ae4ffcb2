"""The module hooks under :mod:`theodolite.sites`: one function sees, and may replace, what passes one end of one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from theodolite.site_tables import End

Visitor: TypeAlias = Callable[[Tensor], "Tensor | None"]
"""Gets the tensor that passes; what it returns goes on instead, None leaves it."""


def hook_point(module: nn.Module, end: End, unit_offset: bool, visitor: Visitor) -> RemovableHandle:
    """Let a visitor see what passes.

    Args:
        module: A block, or a part of one.
        end: Its ``input``, its ``output``, or (of a norm) ``normalised``: its input after normalisation and before the weight.
        unit_offset: The norm multiplies by ``1 + weight``.
        visitor: Called in every forward pass.
    """
    if end == "input":
        return module.register_forward_pre_hook(_on_input(visitor), with_kwargs=True)
    if end == "output":
        return module.register_forward_hook(_on_output(visitor))
    return module.register_forward_hook(_on_normalised(visitor, unit_offset))


def norm_affine(norm: nn.Module, unit_offset: bool) -> tuple[Tensor, Tensor | None]:
    """(d,) scale and shift of a norm in float32; no shift for RMSNorm."""
    weight, bias = cast(Tensor, norm.weight).float(), cast("Tensor | None", getattr(norm, "bias", None))
    return (1.0 + weight if unit_offset else weight), None if bias is None else bias.float()


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """``x`` (..., d) normalised in float32 as the norm does it, without weight and bias, in the dtype of ``x``."""
    wide = x.float()
    if isinstance(norm, nn.LayerNorm):
        return torch.nn.functional.layer_norm(wide, norm.normalized_shape, eps=norm.eps).to(x.dtype)
    # RMSNorm modules of transformers name the same number in two ways
    epsilon = cast(float, norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def _on_input(visitor: Visitor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        new = visitor(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    return hook


def _on_output(visitor: Visitor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # attention returns a tuple, as did whole blocks before transformers 5
        new = visitor(output[0] if isinstance(output, tuple) else output)
        return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

    return hook


def _on_normalised(visitor: Visitor, unit_offset: bool) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        new = visitor(normalised(module, args[0]))
        if new is None:
            return None
        scale, shift = norm_affine(module, unit_offset)
        scaled = new.float() * scale
        return (scaled if shift is None else scaled + shift).to(output.dtype)

    return hook
