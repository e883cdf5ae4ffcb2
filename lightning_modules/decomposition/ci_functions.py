"""Causal-importance functions: from a clean forward pass to one logit per component and position.

Configurations are dictionaries with ``mode`` (``layerwise`` or ``global``) and ``fn_type``:

* ``layerwise``: ``mlp`` (one scalar network per component, on its activation), ``vector_mlp`` (one network per component, on the module's
  whole input), ``shared_mlp`` (one network per module); key ``hidden_dims``.
* ``global``: ``global_shared_mlp`` (``hidden_dims``), ``global_reverse_residual`` (``d_resid_ci_fn``, ``reader_hidden_dims``,
  ``block_groups``, ``transition_hidden_dim``, ``transition_attn_config``), ``global_shared_transformer`` (``simple_transformer_ci_cfg``).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.config_layers import closest
from theodolite.functional.decomposition_losses import split_positions

from .ci_layers import Affine, BidirectionalAttention, initialise_layers, mlp_layers
from .component_model import ComponentModel, dashed
from .components import Components

ATTENTION_KEYS = ("n_heads", "max_len", "rope_base")


class LayerFunction(nn.Module):
    """The causal-importance function of one module.

    Args:
        kind: ``mlp``, ``vector_mlp`` or ``shared_mlp``.
        components: The module's components; ``mlp`` reads their activations.
        hidden_dims: Hidden widths.
    """

    def __init__(self, kind: str, components: Components, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self.kind = kind
        count, d_in = components.count, components.V.shape[0]
        self.count = count
        if kind != "mlp" and components.embedding:
            raise ValueError(f"{kind} reads vectors, but an embedding is given ids; use the layerwise fn_type mlp for it.")
        widths = {"mlp": [1, *hidden_dims, 1], "vector_mlp": [d_in, *hidden_dims, 1], "shared_mlp": [d_in, *hidden_dims, count]}[kind]
        self.layers = nn.Sequential(*mlp_layers(widths, None if kind == "shared_mlp" else count))

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., C) logits from component activations (..., C) (``mlp``) or from the module's input (..., d_in)."""
        if self.kind == "shared_mlp":
            return self.layers(inputs)
        rows = inputs.flatten(0, -2)
        maps = rows.T[..., None] if self.kind == "mlp" else rows.expand(self.count, -1, -1)
        return self.layers(maps)[..., 0].T.unflatten(0, inputs.shape[:-1])


class GlobalSharedMLP(nn.Module):
    """One network from all modules' inputs, in alphabetical order, to all their components.

    Args:
        widths: Width of each module's input.
        counts: Number of components by module.
        hidden_dims: Hidden widths.
    """

    def __init__(self, widths: Mapping[str, int], counts: Mapping[str, int], hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self.order = sorted(widths)
        self.sizes = [counts[name] for name in self.order]
        self.layers = nn.Sequential(*mlp_layers([sum(widths.values()), *hidden_dims, sum(self.sizes)]))

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits by module."""
        return split_positions(self.order, self.layers(torch.cat([inputs[name] for name in self.order], dim=-1)), self.sizes)


class ReverseResidual(nn.Module):
    """A residual stream that visits blocks of modules from the output to the input of the target, and reads importances on its way.

    In each block the stream takes in the block's inputs; then, in all but the last block, optional attention and a transition change it;
    then the block's importances are read from it.

    Args:
        widths: Width of each module's input.
        counts: Number of components by module.
        width: Of the stream.
        blocks: Modules by name of block, in the order of the visit.
        reader_hidden_dims: Hidden widths of the readers.
        transition_hidden_dim: Hidden width of the transitions; None = linear ones.
        attention: ``n_heads`` and optionally ``max_len`` and ``rope_base``; None = no attention.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        counts: Mapping[str, int],
        width: int,
        blocks: Mapping[str, Sequence[str]],
        reader_hidden_dims: Sequence[int] = (),
        transition_hidden_dim: int | None = None,
        attention: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.blocks = {name: list(members) for name, members in blocks.items()}
        self.counts = dict(counts)
        moving = list(self.blocks)[:-1]
        sums = {name: (sum(widths[m] for m in members), sum(counts[m] for m in members)) for name, members in self.blocks.items()}
        self.inp_projectors = nn.ModuleDict({name: Affine(sums[name][0], width, hidden=False) for name in self.blocks})
        self.readers = nn.ModuleDict({n: nn.Sequential(*mlp_layers([width, *reader_hidden_dims, sums[n][1]])) for n in self.blocks})
        self.reader_norms = nn.ModuleDict({name: nn.RMSNorm(width) for name in self.blocks})
        self.transitions = nn.ModuleDict({name: _transition(width, transition_hidden_dim) for name in moving})
        self.transition_norms = nn.ModuleDict({name: nn.RMSNorm(width) for name in moving})
        with_attention = moving if attention is not None else []
        self.attn_transitions = nn.ModuleDict({name: BidirectionalAttention(width, **(attention or {})) for name in with_attention})
        self.attn_norms = nn.ModuleDict({name: nn.RMSNorm(width) for name in with_attention})

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits by module."""
        logits: dict[str, Tensor] = {}
        stream: Tensor | float = 0.0
        for name, members in self.blocks.items():
            stream = stream + self.inp_projectors[name](torch.cat([inputs[member] for member in members], dim=-1))
            if name in self.attn_transitions:
                stream = stream + self.attn_transitions[name](self.attn_norms[name](stream))
            if name in self.transitions:
                stream = stream + self.transitions[name](self.transition_norms[name](stream))
            read = self.readers[name](self.reader_norms[name](stream))
            logits |= split_positions(members, read, [self.counts[member] for member in members])
        return logits


class SharedTransformer(nn.Module):
    """A bidirectional transformer over positions, from all modules' normalised inputs to all their components.

    Args:
        widths: Width of each module's input.
        counts: Number of components by module.
        d_model: Width of the stream.
        n_blocks: Number of blocks, each attention and a network, both on a normalised stream.
        mlp_hidden_dim: Hidden widths of the networks.
        attn_config: ``n_heads`` and optionally ``max_len`` and ``rope_base``.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        counts: Mapping[str, int],
        d_model: int,
        n_blocks: int,
        mlp_hidden_dim: Sequence[int],
        attn_config: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.order = sorted(widths)
        self.sizes = [counts[name] for name in self.order]
        self.input_projector = Affine(sum(widths.values()), d_model, hidden=False)
        self.blocks = nn.ModuleList(_Block(d_model, mlp_hidden_dim, attn_config) for _ in range(n_blocks))
        self.output_head = Affine(d_model, sum(self.sizes), hidden=False)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits by module."""
        stream = self.input_projector(torch.cat([_normalised(inputs[name]) for name in self.order], dim=-1))
        for block in self.blocks:
            stream = block(stream)
        return split_positions(self.order, self.output_head(stream), self.sizes)


class _Block(nn.Module):
    def __init__(self, width: int, hidden_dims: Sequence[int], attention: Mapping[str, Any]) -> None:
        super().__init__()
        self.attn = BidirectionalAttention(width, **attention)
        self.mlp = nn.Sequential(*mlp_layers([width, *hidden_dims, width]))

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.attn(_normalised(stream))
        return stream + self.mlp(_normalised(stream))


class ImportanceFunction(nn.Module):
    """All causal-importance logits of a component model.

    Args:
        model: The component model.
        config: See the module's docstring.

    Raises:
        ValueError: If the configuration does not fit the model.
    """

    def __init__(self, model: ComponentModel, config: Mapping[str, Any]) -> None:
        super().__init__()
        kind = _checked_kind(config)
        self.layerwise = config["mode"] == "layerwise"
        self._components = {name: site.components for name, site in model.sites.items()}
        self.reads_acts = {name: kind == "mlp" or part.embedding for name, part in self._components.items()}
        if self.layerwise:
            functions = {dashed(name): LayerFunction(kind, part, config["hidden_dims"]) for name, part in self._components.items()}
            self.ci_fns = nn.ModuleDict(functions)
        else:
            widths = {name: part.count if part.embedding else part.V.shape[0] for name, part in self._components.items()}
            self.global_ci_fn = _global_function(kind, widths, model.counts, config)

    def initialise(self, seed: int) -> None:
        """Draw all weights."""
        initialise_layers(self, "causal importance function", seed)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits (..., C) by module, in the model's order, from the modules' clean inputs."""
        read = {name: part.acts(inputs[name]) if self.reads_acts[name] else inputs[name] for name, part in self._components.items()}
        if self.layerwise:
            return {name: self.ci_fns[dashed(name)](value) for name, value in read.items()}
        logits = self.global_ci_fn(read)
        return {name: logits[name] for name in self._components}


KEYS = {
    ("layerwise", "mlp"): ({"hidden_dims"}, set()),
    ("layerwise", "vector_mlp"): ({"hidden_dims"}, set()),
    ("layerwise", "shared_mlp"): ({"hidden_dims"}, set()),
    ("global", "global_shared_mlp"): ({"hidden_dims"}, set()),
    ("global", "global_reverse_residual"): (
        {"d_resid_ci_fn", "block_groups", "reader_hidden_dims"},
        {"transition_hidden_dim", "transition_attn_config"},
    ),
    ("global", "global_shared_transformer"): ({"simple_transformer_ci_cfg"}, set()),
}
"""Required and optional keys by mode and fn_type."""


def _checked_kind(config: Mapping[str, Any]) -> str:
    kind = (str(config.get("mode")), str(config.get("fn_type")))
    if kind not in KEYS:
        listing = ", ".join(f"{mode} {name}" for mode, name in KEYS)
        raise ValueError(f"ci_fn has mode {kind[0]!r} and fn_type {kind[1]!r}; choose among {listing}.")
    required, optional = KEYS[kind]
    missing = sorted(required - set(config))
    unknown = sorted(set(config) - required - optional - {"mode", "fn_type"})
    if missing:
        raise ValueError(f"ci_fn {kind[1]} needs the key {missing[0]!r}.")
    if unknown:
        raise ValueError(f"ci_fn {kind[1]} has no key {unknown[0]!r}{closest(unknown[0], required | optional)}.")
    return kind[1]


def _global_function(kind: str, widths: Mapping[str, int], counts: Mapping[str, int], config: Mapping[str, Any]) -> nn.Module:
    if kind == "global_shared_mlp":
        return GlobalSharedMLP(widths, counts, config["hidden_dims"])
    if kind == "global_shared_transformer":
        return SharedTransformer(widths, counts, **config["simple_transformer_ci_cfg"])
    return ReverseResidual(
        widths,
        counts,
        config["d_resid_ci_fn"],
        _block_members(list(widths), config["block_groups"]),
        config["reader_hidden_dims"],
        config.get("transition_hidden_dim"),
        config.get("transition_attn_config"),
    )


def _block_members(names: Sequence[str], groups: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Modules by block: pattern order, then the model's. Every module is in exactly one block."""
    blocks: dict[str, list[str]] = {}
    for group in groups:
        members = [name for pattern in group["patterns"] for name in fnmatch.filter(names, pattern)]
        if not members:
            raise ValueError(f"The block {group['name']!r} of ci_fn matches no decomposed module; its patterns are {group['patterns']}.")
        blocks[group["name"]] = members
    placed = [name for members in blocks.values() for name in members]
    for name in names:
        if placed.count(name) != 1:
            raise ValueError(f"{name} is in {placed.count(name)} blocks of ci_fn; every decomposed module must be in exactly one.")
    return blocks


def _transition(width: int, hidden: int | None) -> nn.Module:
    return Affine(width, width, hidden=True) if hidden is None else nn.Sequential(*mlp_layers([width, hidden, width]))


def _normalised(states: Tensor) -> Tensor:
    return F.rms_norm(states, states.shape[-1:])
