"""A module that offers ``MaskedReconstruction`` and knows nothing of decompositions. Without Lightning: ranks start faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn


class TinyNet(nn.Module):
    """Two gated linear layers. A gate is ``g + (1 - g) source`` with g a function of the row; the second site has one channel more,
    which scales what the gates leave out.

    Args:
        width: Features, and channels of each site.
        kind: ``mse`` over elements or ``kl`` over positions.
        dtype: Of everything.
        dropout: Something that draws random numbers in training mode.
    """

    def __init__(
        self, width: int = 6, kind: Literal["mse", "kl"] = "mse", dtype: Literal["float32", "float64"] = "float64", dropout: float = 0.0
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        real = torch.float64 if dtype == "float64" else torch.float32
        matrices = {
            name: torch.randn(width, width, generator=generator, dtype=torch.float64).to(real) for name in ("first", "second", "gate")
        }
        self.matrices = nn.ParameterDict({name: nn.Parameter(matrix) for name, matrix in matrices.items()})
        self.dropout = nn.Dropout(dropout)
        self.width, self.kind = width, kind
        self.prepared = 0

    def leading_shape(self, batch: Tensor) -> tuple[int, ...]:
        return tuple(batch.shape[:-1])

    def source_channels(self) -> dict[str, int]:
        return {"first": self.width, "second": self.width + 1}

    def prepare(self, batch: Tensor) -> dict[str, Tensor]:
        self.prepared += 1
        with torch.no_grad():
            target = torch.tanh(batch @ self.matrices["first"]) @ self.matrices["second"]
            return {"batch": batch, "target": target, "importance": torch.sigmoid(batch @ self.matrices["gate"] - 1)}

    def loss_sum(self, prepared: Any, sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        g, target = prepared["importance"], prepared["target"]
        hidden = torch.tanh(prepared["batch"] @ self.matrices["first"] * (g + (1 - g) * sources["first"]))
        hidden = self.dropout(hidden)
        gate = g + (1 - g) * sources["second"][..., :-1]
        output = (hidden * gate) @ self.matrices["second"] + sources["second"][..., -1:] * (hidden * (1 - gate)) @ self.matrices["second"]
        if self.kind == "mse":
            return (output - target).square().sum(), target.numel()
        log_p, log_q = target.log_softmax(-1), output.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(), target.numel() // target.shape[-1]
