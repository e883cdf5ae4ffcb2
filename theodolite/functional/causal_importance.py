"""From the logits of causal-importance functions to importances: the sigmoids, and the noise of binomial sampling.

A causal importance g lies in [0, 1] and says how far a component may be ablated: its mask may be anything in [g, 1]. Two functions of the
same logit are used: a *lower* one, which becomes the mask, and an *upper* one, which is penalised (arXiv 2506.20790, section 2.3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

SigmoidName: TypeAlias = Literal["leaky_hard", "normal", "hard", "upper_leaky_hard", "lower_leaky_hard", "swish_hard"]
"""``leaky_hard`` is the pair of two different functions; the others use one function for both."""

LEAK = 0.01
"""Slope outside of [0, 1]."""

SWISH_BETA = 10.0
"""Sharpness of the two swishes in ``swish_hard``."""


class _LowerLeakyHard(torch.autograd.Function):
    """Clamp to [0, 1] whose gradient leaks below 0, but only where the loss asks for a larger logit."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        (gradient,) = gradients
        inside = (logits > 0) & (logits <= 1)
        leak = (logits <= 0) & (gradient < 0)
        return gradient * (inside.to(gradient.dtype) + LEAK * leak.to(gradient.dtype))


def lower_leaky_hard(logits: Tensor) -> Tensor:
    """``clamp(z, 0, 1)``, with a gradient that lets an inactive component come back.

    Backward of an upstream gradient u: u on (0, 1]; ``0.01 u`` at z <= 0 where u < 0 (the loss falls as z grows), else 0; 0 above 1.
    """
    return _LowerLeakyHard.apply(logits)  # type: ignore[return-value]


def upper_leaky_hard(logits: Tensor) -> Tensor:
    """0 below 0, z on [0, 1], ``1 + 0.01 (z - 1)`` above 1, so that the penalty can pull a saturated logit back."""
    return torch.where(logits > 1, 1 + LEAK * (logits - 1), logits.clamp(0.0, 1.0))


def swish_hard(logits: Tensor) -> Tensor:
    """``s(z) - s(z - 1)`` with the swish ``s(z) = z sigmoid(10 z)``: a smooth clamp that leaves [0, 1] by up to 0.03."""
    shifted = logits - 1
    return logits * torch.sigmoid(SWISH_BETA * logits) - shifted * torch.sigmoid(SWISH_BETA * shifted)


def _hard(logits: Tensor) -> Tensor:
    return logits.clamp(0.0, 1.0)


_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": torch.sigmoid,
    "hard": _hard,
    "upper_leaky_hard": upper_leaky_hard,
    "lower_leaky_hard": lower_leaky_hard,
    "swish_hard": swish_hard,
}


def sigmoid_pair(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The lower and the upper function of a sigmoid type.

    Raises:
        ValueError: If there is no such type.
    """
    if name not in get_args(SigmoidName):
        raise ValueError(f"There is no sigmoid {name!r}; choose among {', '.join(get_args(SigmoidName))}.")
    return (lower_leaky_hard, upper_leaky_hard) if name == "leaky_hard" else (_ONE[name], _ONE[name])


def jittered_logits(logits: Tensor, noise: Tensor) -> Tensor:
    """The lower function's input under binomial sampling, ``1.05 z - 0.05 u`` with u ~ U(0, 1) in ``noise``."""
    return 1.05 * logits - 0.05 * noise
