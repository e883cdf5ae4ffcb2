"""Toy models with a known ground truth: superposition (TMS), compressed computation (ResidMLP), and an induction head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.functional.toy_features import FeatureKind, induction_answers, induction_tokens, sparse_features


class TMS(nn.Module):
    """Toy model of superposition: ``relu(W' W x + b)``, features (rows, n) to features, through ``n_hidden`` dimensions.

    ``linear2`` is the transpose of ``linear1`` plus a bias. ``hidden_layers`` are fixed identities between them.

    Args:
        n_features: Number of features.
        n_hidden: Dimensions of the bottleneck.
        n_identity: Identity layers between the two.
    """

    kind: FeatureKind = "unit"

    def __init__(self, n_features: int, n_hidden: int, n_identity: int = 0) -> None:
        super().__init__()
        self.n_features = n_features
        self.linear1 = nn.Linear(n_features, n_hidden, bias=False)
        self.hidden_layers = nn.ModuleList(nn.Linear(n_hidden, n_hidden, bias=False) for _ in range(n_identity))
        self.linear2 = nn.Linear(n_hidden, n_features)
        for layer in self.hidden_layers:
            assert isinstance(layer, nn.Linear)
            nn.init.eye_(layer.weight)

    def initialise(self, generator: torch.Generator) -> None:
        """Normal weights of variance 1/n_hidden, a zero bias."""
        with torch.no_grad():
            self.linear1.weight.copy_(torch.randn(self.linear1.weight.shape, generator=generator) / math.sqrt(len(self.linear1.weight)))
            self.linear2.bias.zero_()
            self.tie()

    def tie(self) -> None:
        """Make ``linear2`` the transpose of ``linear1``."""
        with torch.no_grad():
            self.linear2.weight.copy_(self.linear1.weight.T)

    def trained(self) -> list[nn.Parameter]:
        """Parameters of training."""
        return [p for name, p in self.named_parameters() if name in ("linear1.weight", "linear2.bias")]

    def forward(self, features: Tensor) -> Tensor:
        """Reconstructed features."""
        hidden = self.linear1(features)
        for layer in self.hidden_layers:
            hidden = layer(hidden)
        return F.relu(self.linear2(hidden))

    def loss(self, rows: int, probability: float, generator: torch.Generator) -> Tensor:
        """Mean squared error of reconstruction on fresh features."""
        features = sparse_features(rows, self.n_features, probability, generator, self.kind)
        output = F.relu(F.linear(F.linear(features, self.linear1.weight), self.linear1.weight.T, self.linear2.bias))
        return F.mse_loss(output, features)


class _MLPLayer(nn.Module):
    def __init__(self, d_embed: int, d_mlp: int) -> None:
        super().__init__()
        self.mlp_in = nn.Linear(d_embed, d_mlp, bias=False)
        self.mlp_out = nn.Linear(d_mlp, d_embed, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        return self.mlp_out(F.relu(self.mlp_in(stream)))


class ResidMLP(nn.Module):
    """Compressed computation: networks with fewer neurons than features on a residual stream learn ``y = x + relu(x)``.

    Args:
        n_features: Number of features.
        d_embed: Width of the stream; features enter and leave by one fixed random embedding of unit vectors.
        d_mlp: Neurons per layer.
        n_layers: Number of networks.
    """

    kind: FeatureKind = "signed"
    W_E: Tensor

    def __init__(self, n_features: int, d_embed: int, d_mlp: int, n_layers: int = 1) -> None:
        super().__init__()
        self.n_features = n_features
        self.register_buffer("W_E", torch.zeros(n_features, d_embed))
        self.layers = nn.ModuleList(_MLPLayer(d_embed, d_mlp) for _ in range(n_layers))

    def initialise(self, generator: torch.Generator) -> None:
        """A random embedding, and normal weights of variance 1/fan-in."""
        with torch.no_grad():
            self.W_E.copy_(F.normalize(torch.randn(self.W_E.shape, generator=generator), dim=1))
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1]))

    def tie(self) -> None:
        """Nothing is tied but the unembedding, which is the embedding itself."""

    def trained(self) -> list[nn.Parameter]:
        """Parameters of training."""
        return list(self.parameters())

    def forward(self, features: Tensor) -> Tensor:
        """Transformed features."""
        stream = features @ self.W_E
        for layer in self.layers:
            stream = stream + layer(stream)
        return stream @ self.W_E.T

    def loss(self, rows: int, probability: float, generator: torch.Generator) -> Tensor:
        """Mean squared error to ``x + relu(x)`` on fresh features."""
        features = sparse_features(rows, self.n_features, probability, generator, self.kind)
        return F.mse_loss(self(features), features + features.relu())


class _InductionAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, stream: Tensor, positions: Tensor) -> Tensor:
        query, key = self.q_proj(stream + positions), self.k_proj(stream + positions)
        return self.out_proj(F.scaled_dot_product_attention(query, key, self.v_proj(stream), is_causal=True))


class InductionHead(nn.Module):
    """A two-layer attention-only model that continues ``BOS T* S M T* S`` with M. Positions are added to queries and keys alone.

    Args:
        vocabulary: Tokens besides S and BOS.
        width: Of the stream.
        length: Of a sequence.
        n_layers: Number of attention layers, of one head each.
    """

    positions: Tensor

    def __init__(self, vocabulary: int = 128, width: int = 16, length: int = 64, n_layers: int = 2) -> None:
        super().__init__()
        self.vocabulary, self.length = vocabulary, length
        self.embed = nn.Embedding(vocabulary + 2, width)
        self.layers = nn.ModuleList(_InductionAttention(width) for _ in range(n_layers))
        self.unembed = nn.Linear(width, vocabulary + 2, bias=False)
        self.register_buffer("positions", _sinusoids(length, width))

    def initialise(self, generator: torch.Generator) -> None:
        """Normal weights of variance 1/width."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1]))

    def tie(self) -> None:
        """Nothing is tied."""

    def trained(self) -> list[nn.Parameter]:
        """Parameters of training."""
        return list(self.parameters())

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, S, vocabulary + 2)."""
        stream = self.embed(tokens)
        for layer in self.layers:
            stream = stream + layer(stream, self.positions[: tokens.shape[1]])
        return self.unembed(stream)

    def loss(self, rows: int, probability: float, generator: torch.Generator) -> Tensor:
        """Cross-entropy of M at the last position; ``probability`` is not used."""
        tokens = induction_tokens(rows, self.length, self.vocabulary, generator)
        return F.cross_entropy(self(tokens)[:, -1], induction_answers(tokens, self.vocabulary))


def _sinusoids(length: int, width: int) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width]


ToyModel = TMS | ResidMLP | InductionHead


def train_toy(model: ToyModel, seed: int, steps: int, batch_size: int, lr: float, probability: float) -> float:
    """Train a toy model from a fresh start with Adam on a cosine schedule; deterministic on one device.

    Args:
        model: Any of this module's.
        seed: Of initialisation and data.
        steps: Optimizer steps.
        batch_size: Rows per step.
        lr: Learning rate at the start.
        probability: Of an active feature.

    Returns:
        The mean loss of the last tenth of the steps.
    """
    generator = torch.Generator().manual_seed(seed)
    model.initialise(generator)
    optimizer = torch.optim.Adam(model.trained(), lr=lr)
    losses: list[Tensor] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss = model.loss(batch_size, probability, generator)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    optimizer.zero_grad()
    model.tie()
    last = losses[-max(1, steps // 10) :]
    return float(torch.stack(last).mean()) if last else float("nan")
