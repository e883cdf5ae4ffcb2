"""Layers of a frozen transformer: functions of their input alone, whose backward passes are written out for speed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def frozen_rms_norm(states: Tensor, gain: Tensor, eps: float) -> Tensor:
    r"""``gain * x / sqrt(mean(x^2) + eps)`` over the last axis, computed in at least float32; differentiable in the states alone.

    With ``s = 1 / sqrt(mean(x^2) + eps)`` and an upstream gradient u, the gradient is ``s (gain u) - x s^3 mean(x gain u)``.

    Args:
        states: (..., width) x.
        gain: (width,), a constant.
        eps: Added to the mean square.
    """
    result = _FrozenRMSNorm.apply(states, gain.detach(), eps)
    assert isinstance(result, Tensor)
    return result


class _FrozenRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, gain: Tensor, eps: float) -> Tensor:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(states, gain, scale)
        return gain * (wide * scale).to(states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        states, gain, scale = ctx.saved_tensors
        wide, through = states.to(scale.dtype), (upstream * gain).to(scale.dtype)
        along = (through * wide).mean(-1, keepdim=True).mul_(scale**3)
        return torch.addcmul(through.mul_(scale), wide, along, value=-1).to(states.dtype), None, None


def tanh_gelu(states: Tensor) -> Tensor:
    r""":math:`\frac{x}{2} (1 + \tanh u)` with :math:`u = \sqrt{2/\pi}\,(x + 0.044715 x^3)`: GELU by its tanh formula.

    On a processor as :math:`x\,\sigma(2u)`, which is the same number: a sigmoid takes a third of the time of a tanh there (one thread of an
    AMD EPYC), and it is kept for the backward pass.
    """
    if states.device.type != "cpu" or states.dtype not in (torch.float32, torch.float64):
        return F.gelu(states, approximate="tanh")
    result = _TanhGELU.apply(states)
    assert isinstance(result, Tensor)
    return result


_SLOPE, _CUBE = 2 * math.sqrt(2 / math.pi), 0.044715


class _TanhGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        gate = states.square().mul_(_SLOPE * _CUBE).add_(_SLOPE).mul_(states).sigmoid_()
        ctx.save_for_backward(states, gate)
        return states * gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        states, gate = ctx.saved_tensors
        # gate (1 + x (1 - gate) 2u')
        slope = states.square().mul_(3 * _SLOPE * _CUBE).add_(_SLOPE).mul_(states)
        return slope.mul_(1 - gate).add_(1).mul_(gate).mul_(upstream)
