"""A frozen target model some of whose modules can be replaced by masked components."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from theodolite.config_layers import closest
from theodolite.functional.component_masks import ComponentMask

from .components import Components, IdentitySite, Known, Replacement, Site, TiedComponents, module_shape, target_weight

IDENTITY = "pre_identity"
"""Name of the identity in front of a module: ``lin2`` has it at ``lin2.pre_identity``."""


@dataclass(frozen=True, slots=True)
class Forward:
    """What one forward pass gave.

    Attributes:
        output: The target's output (logits, features).
        inputs: By module, what entered it; filled on request.
        outputs: By module, what left it, after its replacement; filled on request.
        acts: By replaced module, its component activations; filled on request.
    """

    output: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    acts: dict[str, Tensor]


@runtime_checkable
class OffersStates(Protocol):
    """A target whose logits are states times a matrix, so that an attack need not hold the logits of a whole batch."""

    def states(self, tokens: Tensor) -> Tensor:
        """(B, S, width) what the unembedding reads."""
        ...

    def unembedding(self) -> Tensor:
        """(width, V), the weight of its module ``lm_head`` transposed."""
        ...


class ComponentModel(nn.Module):
    """A target model and the components of some of its modules. Parameters of the target are frozen.

    Args:
        target: The model; takes a batch and gives a tensor, or something that holds one (``output_attr``).
        modules: Number of components by glob pattern of module paths. The order of the modules is that of the patterns, then the target's.
        identity_modules: The same for identities inserted in front of modules; they come last.
        tied: Pairs (source, tied): the tied module's weight is the source's transpose, so its components are the source's, transposed.
        output_attr: Attribute of the target's output that holds the tensor; ``idx_0`` = first item of a tuple; None = the output itself.

    Raises:
        ValueError: If a pattern matches no module, a module is matched twice, or cannot be decomposed.
    """

    def __init__(
        self,
        target: nn.Module,
        modules: Mapping[str, int],
        identity_modules: Mapping[str, int] | None = None,
        tied: Sequence[tuple[str, str]] = (),
        output_attr: str | None = None,
    ) -> None:
        super().__init__()
        target.requires_grad_(False)
        self.target = target
        self.output_attr = output_attr
        counts = match_modules(target, modules)
        behind = match_modules(target, identity_modules or {})
        for name, count in behind.items():
            counts[_add_identity(target, name)] = count
        sources = {tied_name: source for source, tied_name in tied}
        self.components = nn.ModuleDict()
        self.sites: dict[str, Site] = {}
        for name, count in counts.items():
            module = target.get_submodule(name)
            d_in, d_out, embedding = module_shape(name, module)
            if name in sources:
                components: Components = TiedComponents(self._tie_source(sources[name], name))
            else:
                components = Components(d_in, d_out, count, embedding)
            if components.count != count or components.V.shape[0] != d_in or components.U.shape[1] != d_out:
                raise ValueError(f"{name} is tied to {sources.get(name)}, so both need {count} components and transposed shapes.")
            self.components[dashed(name)] = components
            self.sites[name] = Site(name, module, components, module.forward)
            module.forward = self.sites[name]  # pyright: ignore[reportAttributeAccessIssue]
        for name in behind:
            module = target.get_submodule(name)
            module.forward = _Behind(module.get_submodule(IDENTITY), module.forward)  # pyright: ignore[reportAttributeAccessIssue]

    def _tie_source(self, source: str, tied: str) -> Components:
        if source not in self.sites:
            raise ValueError(f"{tied} is tied to {source!r}, which is not decomposed before it{closest(source, self.sites)}.")
        return self.sites[source].components

    @property
    def names(self) -> list[str]:
        """Decomposed modules in order."""
        return list(self.sites)

    @property
    def counts(self) -> dict[str, int]:
        """Number of components by module."""
        return {name: site.components.count for name, site in self.sites.items()}

    def initialise(self, seed: int) -> None:
        """Draw all components; each module's from a stream of its own name."""
        for name, site in self.sites.items():
            site.components.initialise("components", seed, name)

    def component_parameters(self) -> list[nn.Parameter]:
        """All trained matrices of components, tied ones once."""
        return list(self.components.parameters())

    def deltas(self) -> dict[str, Tensor]:
        """By module, what the components leave of the weight, ``W - V U`` (d_in, d_out), with gradient."""
        products = {name: site.components.product() for name, site in self.sites.items()}
        return {name: target_weight(self.sites[name].module).to(product) - product for name, product in products.items()}

    def train(self, mode: bool = True) -> ComponentModel:
        """As of any module, but the target never leaves evaluation mode: its dropout is no part of what is explained."""
        super().train(mode)
        self.target.eval()
        return self

    def forward(
        self,
        batch: Any,
        masks: Mapping[str, ComponentMask] | None = None,
        keep: Iterable[str] = (),
        frozen: bool = False,
        known: Known | None = None,
        states: bool = False,
    ) -> Forward:
        """One forward pass of the target with some modules replaced.

        Args:
            batch: The target's input.
            masks: By module to replace; None or absent = the module itself.
            keep: Which of ``inputs``, ``outputs`` and ``acts`` to keep.
            frozen: Leave the components out of the graph (for attacks, which differentiate masks alone).
            known: Shared by all steps of an attack on this batch: what is the same in each is computed once and kept here.
            states: Stop before the unembedding; only where :meth:`unembedding` gives one.

        Raises:
            ValueError: If a mask names a module that is not decomposed.
        """
        unknown = sorted(set(masks or {}) - set(self.sites))
        if unknown:
            raise ValueError(f"There is no decomposed module {unknown[0]!r}{closest(unknown[0], self.sites)}.")
        run = Replacement(dict(masks or {}), frozenset(keep), {}, {}, {}, frozen, Known() if known is None else known)
        with self._running(run):
            raw = self._states(batch) if states else self.target(batch)
        return Forward(output_tensor(raw, self.output_attr), run.inputs, run.outputs, run.acts)

    def _states(self, batch: Any) -> Tensor:
        if not isinstance(self.target, OffersStates):
            raise TypeError(f"A {type(self.target).__name__} has no states to stop at; ask for its output.")
        return self.target.states(batch)

    def unembedding(self) -> Tensor | None:
        """(width, V) what a target's states become logits by, where it offers them and this matrix is not decomposed."""
        if not isinstance(self.target, OffersStates) or self.output_attr is not None or "lm_head" in self.sites:
            return None
        return self.target.unembedding()

    @contextmanager
    def _running(self, run: Replacement) -> Iterator[None]:
        for site in self.sites.values():
            site.current = run
        try:
            yield
        finally:
            for site in self.sites.values():
                site.current = None


def match_modules(target: nn.Module, patterns: Mapping[str, int]) -> dict[str, int]:
    """Number of components by module path, in the order of the patterns and then of the target's modules.

    Raises:
        ValueError: If a pattern matches nothing, or a module is matched by two patterns.
    """
    paths = [name for name, _ in target.named_modules() if name]
    found: dict[str, int] = {}
    by: dict[str, str] = {}
    for pattern, count in patterns.items():
        matches = fnmatch.filter(paths, pattern)
        if not matches:
            raise ValueError(f"The pattern {pattern!r} matches no module of the target{closest(pattern, paths)}.")
        for name in matches:
            if name in found:
                raise ValueError(f"{name} is matched by {by[name]!r} and by {pattern!r}; make the patterns exclude one another.")
            found[name], by[name] = count, pattern
    return found


def dashed(name: str) -> str:
    """A module path as a key of a ``ModuleDict``, which allows no dots."""
    return name.replace(".", "-")


def output_tensor(raw: Any, attribute: str | None) -> Tensor:
    """The tensor in a model's output.

    Raises:
        TypeError: If there is none.
    """
    if attribute is None:
        found = raw
    elif attribute.startswith("idx_"):
        found = raw[int(attribute.removeprefix("idx_"))]
    else:
        found = getattr(raw, attribute, None)
    if not isinstance(found, Tensor):
        raise TypeError(f"The target gave a {type(raw).__name__}; say with output_attr which of its fields is the output (logits, idx_0).")
    return found


def _add_identity(target: nn.Module, name: str) -> str:
    """Give a module an identity that will stand in front of it; its path."""
    module = target.get_submodule(name)
    width, _, embedding = module_shape(name, module)
    if embedding:
        raise ValueError(f"{name} is an embedding, whose input is ids; there is no identity to put in front of it.")
    module.add_module(IDENTITY, IdentitySite(width))
    return f"{name}.{IDENTITY}"


@dataclass(frozen=True)
class _Behind:
    """Calls ``inner`` on what an identity lets through."""

    identity: nn.Module
    inner: Callable[[Tensor], Tensor]

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.inner(self.identity(inputs))


def ones(names: Iterable[str], delta: Tensor | None = None) -> dict[str, ComponentMask]:
    """Masks with every component on: the reconstruction by components alone, or the target itself with ``delta`` all ones."""
    return {name: ComponentMask(None, delta) for name in names}


def importances_as_masks(importances: Mapping[str, Tensor], routing: Mapping[str, Tensor] | None = None) -> dict[str, ComponentMask]:
    """The importances themselves as masks, without delta."""
    return {name: ComponentMask(g, None, None if routing is None else routing[name]) for name, g in importances.items()}


def no_components(names: Iterable[str], like: Tensor) -> dict[str, ComponentMask]:
    """Masks with every component off."""
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return {name: ComponentMask(zero) for name in names}
