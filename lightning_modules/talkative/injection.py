"""Puts an activation into a verbaliser: the residual stream at one position is overwritten, every other position is left bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from theodolite.sites import ActivationSite, replace_sites


class Standardise(nn.Module):
    """``(a - mean) / scale``; the identity until its statistics are set.

    Args:
        width: d.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def set(self, mean: Tensor, scale: Tensor) -> None:
        """Take statistics: ``mean`` (d,) and one number ``scale``."""
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, activations: Tensor) -> Tensor:
        """(B, d) in float32."""
        return (activations.float() - self.mean) / self.scale

    def invert(self, standardised: Tensor) -> Tensor:
        """Back to the producer's units."""
        return standardised.float() * self.scale + self.mean


class Projection(nn.Module):
    """An affine map per overwritten layer (or one for all), the identity with zero bias at initialisation.

    Args:
        width: d of the activations.
        model_width: d of the verbaliser; where it differs, the identity is padded with zeros or cut.
        layers: Number of overwritten layers.
        per_layer: A map of its own for each.
    """

    def __init__(self, width: int, model_width: int, layers: int, per_layer: bool) -> None:
        super().__init__()
        self.layers = layers
        self.maps = nn.ModuleList(identity_linear(width, model_width) for _ in range(layers if per_layer else 1))

    def forward(self, activations: Tensor) -> list[Tensor]:
        """(B, d) -> one (B, model width) per overwritten layer."""
        values = [linear(activations) for linear in self.maps]
        return values if len(values) == self.layers else values * self.layers


class FixedNorm(nn.Module):
    """The activation scaled to a fixed norm; no parameters.

    Args:
        width: d of the activations; must be the verbaliser's.
        model_width: d of the verbaliser.
        layers: Number of overwritten layers.
        norm: The norm.

    Raises:
        ValueError: If the widths differ: without a map the activation would not fit.
    """

    def __init__(self, width: int, model_width: int, layers: int, norm: float) -> None:
        super().__init__()
        if width != model_width:
            raise ValueError(
                f"model.verbaliser.injection=fixed_norm puts activations of width {width} into a model of width {model_width}; "
                f"use injection=projection, which maps them."
            )
        self.layers, self.norm = layers, norm

    def forward(self, activations: Tensor) -> list[Tensor]:
        """(B, d) -> the same (B, d) vectors of norm ``norm`` for every overwritten layer."""
        wide = activations.float()
        return [wide * (self.norm / wide.norm(dim=-1, keepdim=True).clamp_min(1e-30))] * self.layers


def identity_linear(width: int, out_width: int, bias: bool = True) -> nn.Linear:
    """A linear layer in float32 with the (padded or cut) identity as weight and zero bias; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        linear = nn.Linear(width, out_width, bias=bias)
    with torch.no_grad():
        nn.init.eye_(linear.weight)
        if linear.bias is not None:
            linear.bias.zero_()
    return linear


@contextmanager
def injected(model: nn.Module, values: list[Tensor], position: int) -> Iterator[None]:
    """Every forward pass inside overwrites the residual stream at ``position`` before layer ``i`` with ``values[i]``.

    Args:
        model: The language model.
        values: (B, d) per overwritten layer, for layers 0, 1, ...
        position: Token index in the sequences of these passes.
    """

    def overwrite(value: Tensor) -> Callable[[Tensor], Tensor]:
        def replace(stream: Tensor) -> Tensor:
            here = torch.arange(stream.shape[1], device=stream.device) == position
            return torch.where(here[None, :, None], value.to(stream)[:, None], stream)

        return replace

    with replace_sites(model, {ActivationSite(layer, "resid_pre"): overwrite(value) for layer, value in enumerate(values)}):
        yield
