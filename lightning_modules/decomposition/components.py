"""The components of one module: rank-one parts of its weight, and how they compute its output under a mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from theodolite.functional.attacked_product import AttackedSite, attacked_output, can_attack, constant_product
from theodolite.functional.component_masks import ComponentMask, SourceMask, rows_at, scaled_acts
from theodolite.seeds import derive_seed


class Components(nn.Module):
    """Components of a module with weight W: ``V`` (d_in, C) reads, ``U`` (C, d_out) writes, and ``V U`` approximates W (d_in, d_out).

    An embedding's d_in is its vocabulary, and its inputs are ids. Both matrices start as normal numbers of variance 1/fan-in.

    Args:
        d_in: Width of the input, or the vocabulary.
        d_out: Width of the output.
        count: Number of components C.
        embedding: The input is ids.
    """

    def __init__(self, d_in: int, d_out: int, count: int, embedding: bool = False) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"A module needs at least 1 component, got {count}.")
        self.embedding = embedding
        self.V = nn.Parameter(torch.zeros(d_in, count))
        self.U = nn.Parameter(torch.zeros(count, d_out))

    @property
    def count(self) -> int:
        """Number of components."""
        return self.U.shape[0]

    def initialise(self, *seed: int | str) -> None:
        """Draw both matrices from a stream named by ``seed``."""
        with torch.no_grad():
            for name, matrix in (("V", self.V), ("U", self.U)):
                generator = torch.Generator().manual_seed(derive_seed(*seed, name))
                scale = 1 / math.sqrt(matrix.shape[0])
                matrix.copy_(torch.randn(matrix.shape, generator=generator) * scale)

    def acts(self, inputs: Tensor) -> Tensor:
        """Component activations (..., C): ``x V``, or the rows ``V[ids]``."""
        return F.embedding(inputs, self.V) if self.embedding else inputs.to(self.V.dtype) @ self.V

    def product(self) -> Tensor:
        """``V U`` (d_in, d_out), what the components say the weight is."""
        return self.V @ self.U


class TiedComponents(Components):
    """The transpose of another module's components: the same two parameters, read from the other side.

    Args:
        source: Components of a weight whose transpose this module's is.
    """

    def __init__(self, source: Components) -> None:
        nn.Module.__init__(self)
        self.embedding = False
        self._source = (source,)  # in a tuple: its parameters belong to the source alone

    @property
    def V(self) -> Tensor:  # type: ignore[override]
        """(d_in, C): the source's ``U`` transposed."""
        return self._source[0].U.T

    @property
    def U(self) -> Tensor:  # type: ignore[override]
        """(C, d_out): the source's ``V`` transposed."""
        return self._source[0].V.T

    def initialise(self, *seed: int | str) -> None:
        """Nothing of its own to draw."""


Acts: TypeAlias = tuple[Tensor, Tensor | None]
"""Component activations, and the module's own output where a delta needs it."""


@dataclass(slots=True)
class Known:
    """What all steps of an attack on one batch share.

    Attributes:
        steps: There will be enough of them that packing weights pays.
        acts: Of modules whose input no source reaches. By replaced modules, because they decide which inputs those are, then by module.
        sites: Constants by module.
    """

    steps: bool = False
    acts: dict[tuple[str, ...], dict[str, Acts]] = field(default_factory=dict)
    sites: dict[str, AttackedSite] = field(default_factory=dict)


@dataclass
class Replacement:
    """What a site does in the current forward pass, and what it saw."""

    masks: dict[str, ComponentMask]
    keep: frozenset[str]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    acts: dict[str, Tensor]
    frozen: bool
    known: Known

    @cached_property
    def differentiated(self) -> bool:
        """Every source is being differentiated."""
        masks = self.masks.values()
        return torch.is_grad_enabled() and all(isinstance(mask, SourceMask) and mask.source.requires_grad for mask in masks)


class Site:
    """One module of the target: calls it, or its components, as the current forward pass says.

    It takes the place of the module's ``forward`` once, so that a forward pass adds and removes no hooks, and so that the module's own
    product is computed only where something needs it: without a pass in progress, at positions that are not routed, for the delta.

    Args:
        name: Path in the target.
        module: ``nn.Linear``, ``Conv1D`` or ``nn.Embedding`` of the target.
        components: Its components.
        original: The module's own forward.
    """

    def __init__(self, name: str, module: nn.Module, components: Components, original: Callable[[Tensor], Tensor]) -> None:
        self.name, self.module, self.components, self.original = name, module, components, original
        self.current: Replacement | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """The module's forward."""
        run = self.current
        if run is None:
            return self.original(inputs)
        if "inputs" in run.keep:
            run.inputs[self.name] = inputs
        mask = run.masks.get(self.name)
        output = self.original(inputs) if mask is None else self._replaced(inputs, mask, run)
        if "outputs" in run.keep:
            run.outputs[self.name] = output
        return output

    def _replaced(self, inputs: Tensor, mask: ComponentMask, run: Replacement) -> Tensor:
        if mask.routing is None:
            if isinstance(mask, SourceMask) and self._can_attack(inputs, mask, run):
                return self._attacked(inputs, mask, run)
            return self._written(*self._everywhere(inputs, mask, run), mask, run)
        target = self.original(inputs)
        # components are computed at routed positions alone
        places, leading = mask.routing.flatten().nonzero()[:, 0], mask.routing.shape
        if "acts" in run.keep:
            acts = rows_at(self._acts(inputs, run), places, leading)
        else:
            acts = self._acts(inputs.flatten()[places] if self.components.embedding else rows_at(inputs, places, leading), run)
        rows = self._written(acts, rows_at(target, places, leading), mask.at(places, leading), run)
        wide = torch.promote_types(target.dtype, rows.dtype)
        return target.to(wide).flatten(0, -2).index_copy(0, places, rows.to(wide)).view(target.shape)

    def _can_attack(self, inputs: Tensor, mask: SourceMask, run: Replacement) -> bool:
        if not run.frozen or "acts" in run.keep:
            return False
        read, write = self.components.V, self.components.U
        entering = [] if self.components.embedding else [inputs]
        return can_attack(mask, read, write, getattr(self.module, "weight", read), *entering)

    def _attacked(self, inputs: Tensor, mask: SourceMask, run: Replacement) -> Tensor:
        assert mask.whole is not None
        site = run.known.sites.get(self.name)
        if site is None:
            read, write, weight = self.components.V, self.components.U, target_weight(self.module)
            site = AttackedSite(mask, read, write, weight.to(read), getattr(self.module, "bias", None), run.known.steps)
            run.known.sites[self.name] = site
        known = None if inputs.requires_grad else self._everywhere(inputs, mask, run)
        return attacked_output(inputs, mask.whole, site, self.original, known)

    def _everywhere(self, inputs: Tensor, mask: ComponentMask, run: Replacement) -> Acts:
        known = run.known.acts.setdefault(tuple(run.masks), {})
        if self.name in known:
            return known[self.name]
        acts, target = self._acts(inputs, run), None if mask.delta is None else self.original(inputs)
        # where all sources have gradients, and nothing else, an input without one is the clean input in every step
        if run.frozen and run.differentiated and not inputs.requires_grad:
            known[self.name] = acts, target
        return acts, target

    def _acts(self, inputs: Tensor, run: Replacement) -> Tensor:
        read = self.components.V
        if self.components.embedding:
            acts = F.embedding(inputs, read.detach() if run.frozen else read)
        else:
            acts = constant_product(inputs.to(read.dtype), read) if run.frozen else inputs.to(read.dtype) @ read
        if "acts" in run.keep:
            run.acts[self.name] = acts
        return acts

    def _written(self, acts: Tensor, target: Tensor | None, mask: ComponentMask, run: Replacement) -> Tensor:
        """What the components write, and of the target's own output what the delta's mask lets through."""
        write = self.components.U.detach() if run.frozen else self.components.U
        bias = getattr(self.module, "bias", None)
        if mask.delta is not None:
            assert target is not None
            return self._with_delta(acts, write, target, bias, mask)
        masked = scaled_acts(acts, mask) @ write
        return masked if bias is None else masked + bias

    def _with_delta(self, acts: Tensor, write: Tensor, target: Tensor, bias: Tensor | None, mask: ComponentMask) -> Tensor:
        """``(a * m) U + d (x W - a U)`` written as ``d (x W) + (a * (m - d)) U``: no delta matrix, and exactly the target at m = d = 1."""
        assert mask.delta is not None
        delta = mask.delta[..., None]
        rest = scaled_acts(acts, mask) @ write
        if bias is None:
            return delta * target + rest
        return target + (delta - 1) * (target - bias) + rest


class IdentitySite(nn.Module):
    """An identity map in front of a module, so that what enters it can be decomposed like a weight I.

    Args:
        width: d_in of the module.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, inputs: Tensor) -> Tensor:
        """The input itself."""
        return inputs


def module_shape(name: str, module: nn.Module) -> tuple[int, int, bool]:
    """(d_in, d_out, is an embedding) of a module that can be decomposed.

    Raises:
        ValueError: If it cannot.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, False
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1], False
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise ValueError(f"The embedding {name} renormalises its rows, so its weight is not what it computes; unset max_norm.")
        return module.num_embeddings, module.embedding_dim, True
    if isinstance(module, IdentitySite):
        return module.width, module.width, False
    raise ValueError(f"{name} is a {type(module).__name__}; Linear, Conv1D and Embedding modules can be decomposed.")


def target_weight(module: nn.Module) -> Tensor:
    """A module's weight as (d_in, d_out)."""
    if isinstance(module, IdentitySite):
        return torch.eye(module.width)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, nn.Linear) else weight
