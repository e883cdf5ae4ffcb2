"""Activation sites: points of a language model, named alike in every family, captured and replaced by plain module hooks.

::

    mlp_in, mlp_out = parse_site("mlp_in.8"), parse_site("blocks.8.hook_mlp_out")
    found = collect_sites(model, [mlp_in, mlp_out], input_ids=tokens)      # one pass that stops after layer 8's MLP
    with replace_sites(model, {mlp_out: lambda y: transcoder(...)}):       # splice something in
        model(tokens)

Works on GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma-2 and Gemma-3 (text, and the language model inside a multimodal one), bare or
inside a larger module such as a PEFT or Lightning one. What each name means: :data:`theodolite.site_tables.SITES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Lock, RLock
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from theodolite.site_hooks import hook_point, norm_affine
from theodolite.site_tables import LAYOUTS, SITES, TRANSFORMER_LENS, BlockLayout, End, SiteName, site_module

_TRANSFORMER_LENS_NAME = re.compile(r"blocks\.(\d+)\.(.+)")
_OWN_NAME = re.compile(r"(\w+)\.(\d+)")


@dataclass(frozen=True, slots=True, order=True)
class ActivationSite:
    """A named point of one decoder layer.

    Attributes:
        layer: Decoder layer, counted from 0.
        name: One of :data:`theodolite.site_tables.SITES`.
    """

    layer: int
    name: SiteName

    def __str__(self) -> str:
        """The form that configs and manifests hold, for example ``mlp_in.8``."""
        return f"{self.name}.{self.layer}"


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a transcoder must know of a model: width of the residual stream, and number of decoder layers."""

    width: int
    layers: int


def parse_site(name: str | ActivationSite) -> ActivationSite:
    """A site from ``mlp_in.8``, or from TransformerLens' and SAELens' ``blocks.8.ln2.hook_normalized`` and its kind.

    Raises:
        ValueError: The name is neither.
    """
    if isinstance(name, ActivationSite):
        return name
    own = _OWN_NAME.fullmatch(name)
    if own and own[1] in SITES:
        return ActivationSite(int(own[2]), cast(SiteName, own[1]))
    foreign = _TRANSFORMER_LENS_NAME.fullmatch(name.replace(" ", ""))
    if foreign and foreign[2] in TRANSFORMER_LENS:
        return ActivationSite(int(foreign[1]), TRANSFORMER_LENS[foreign[2]])
    raise ValueError(
        f"{name!r} is no activation site: write <site>.<layer> with a site of {', '.join(SITES)}, "
        f"or blocks.<layer>.<hook> with a hook of {', '.join(TRANSFORMER_LENS)}."
    )


def sparsify_sites(hookpoint: str, transcode: bool) -> tuple[ActivationSite, ActivationSite]:
    """Input and target site of a ``sparsify`` hookpoint such as ``layers.8.mlp``, ``h.8`` or ``model.layers.8.mlp``.

    An autoencoder there reads the module's output; a transcoder reads its input and predicts its output.

    Raises:
        ValueError: The hookpoint is neither a block nor its MLP.
    """
    found = re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.(\d+)(\.mlp)?", hookpoint)
    if found is None:
        raise ValueError(f"The hookpoint {hookpoint!r} is neither a decoder block (layers.8) nor its MLP (layers.8.mlp).")
    ends: tuple[SiteName, SiteName] = ("mlp_in", "mlp_out_raw") if found[2] else ("resid_pre", "resid_post")
    target = ActivationSite(int(found[1]), ends[1])
    return (ActivationSite(int(found[1]), ends[0]) if transcode else target), target


def model_size(config: Any) -> ModelSize:
    """Width and depth from a ``transformers`` config, of the text model where there are several.

    Raises:
        ValueError: The architecture has no table of sites.
    """
    text = config.get_text_config()
    if text.model_type not in LAYOUTS:
        raise ValueError(
            f"There is no table of activation sites for model_type {text.model_type!r}; there is one for {', '.join(LAYOUTS)}."
        )
    return ModelSize(int(text.hidden_size), int(text.num_hidden_layers))


@dataclass(frozen=True, slots=True)
class Blocks:
    """The decoder blocks of a model and their layout."""

    prefix: str
    modules: tuple[nn.Module, ...]
    layout: BlockLayout

    def point(self, site: ActivationSite) -> tuple[nn.Module, End]:
        """The module and end of a site.

        Raises:
            ValueError: The model is not so deep.
        """
        if not 0 <= site.layer < len(self.modules):
            raise ValueError(f"Site {site} lies in layer {site.layer}, but the model has layers 0 to {len(self.modules) - 1}.")
        name, end = site_module(self.layout, site.name)
        return (self.modules[site.layer].get_submodule(name) if name else self.modules[site.layer]), end

    def module_name(self, site: ActivationSite) -> str:
        """Full module name and end, for example ``model.layers.8.mlp input``."""
        name, end = site_module(self.layout, site.name)
        return f"{self.prefix}.{site.layer}{'.' if name else ''}{name} {end}"


def find_blocks(model: nn.Module) -> Blocks:
    """The decoder blocks of the one language model inside ``model``.

    Raises:
        ValueError: There is none, several, or one of an unknown family.
    """
    config = next((part.config for part in model.modules() if hasattr(getattr(part, "config", None), "get_text_config")), None)
    if config is None:
        raise ValueError(f"{type(model).__name__} holds no transformers model, so it has no activation sites.")
    size, layout = model_size(config), LAYOUTS[config.get_text_config().model_type]  # type: ignore[union-attr]
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and _are_blocks(part, size, layout)]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ValueError(
            f"{type(model).__name__} should hold one stack of {size.layers} decoder blocks, found: {names}; pass the model itself."
        )
    return Blocks(found[0][0], tuple(found[0][1]), layout)


def mlp_input_affine(model: nn.Module, layer: int) -> tuple[Tensor, Tensor | None]:
    """Scale and shift of the norm before the MLP: ``mlp_in = mlp_in_unscaled * scale + shift``, the shift None for RMSNorm.

    Returns:
        (d,) tensors in float32; Gemma's scale is ``1 + weight``.
    """
    blocks = find_blocks(model)
    norm, _ = blocks.point(ActivationSite(layer, "mlp_in_unscaled"))
    return norm_affine(norm, blocks.layout.unit_offset)


@contextmanager
def capture_sites(model: nn.Module, sites: Sequence[ActivationSite]) -> Iterator[dict[ActivationSite, Tensor]]:
    """Collect what passes the sites in every forward pass inside the context; a later pass overwrites an earlier one.

    Tensors are as the model made them, (batch, tokens, d), with their graph if there is one. The hooks are gone afterwards.

    Raises:
        ValueError: A site that the model does not have.
    """
    captured: dict[ActivationSite, Tensor] = {}
    with _hooks(model, {site: _recorder(captured, site) for site in sites}):
        yield captured


@contextmanager
def replace_sites(model: nn.Module, replacements: Mapping[ActivationSite, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Let functions change what passes the sites: each gets the (batch, tokens, d) tensor and returns what the model goes on with.

    Raises:
        ValueError: A site that the model does not have, or ``resid_mid``: the block has no module through which all of it passes.
    """
    for site in replacements:
        if site.name == "resid_mid":
            raise ValueError(
                f"{site} can be read but not replaced, because the residual stream by-passes the norm; replace attn_out instead."
            )
    with _hooks(model, replacements):
        yield


def collect_sites(model: nn.Module, sites: Sequence[ActivationSite], **inputs: Any) -> dict[ActivationSite, Tensor]:
    """Activations of one forward pass without gradient, which ends as soon as the last site is reached.

    Args:
        model: The language model, in the mode (train or eval) in which it is wanted.
        sites: Which points.
        inputs: Keyword arguments of its forward, for example ``input_ids`` and ``attention_mask``.

    Returns:
        ``{site: (batch, tokens, d)}`` in the model's dtype.
    """
    captured: dict[ActivationSite, Tensor] = {}
    reached = {site: _recorder(captured, site, stop_at=len(set(sites))) for site in sites}
    with torch.no_grad(), _hooks(model, reached), suppress(_AllReachedError):
        model(**inputs)
    return {site: captured[site] for site in sites}


class _AllReachedError(Exception):
    """Ends a forward pass whose remaining layers nobody needs."""


def _recorder(captured: dict[ActivationSite, Tensor], site: ActivationSite, stop_at: int | None = None) -> Callable[[Tensor], None]:
    def record(value: Tensor) -> None:
        captured[site] = value
        if len(captured) == stop_at:
            raise _AllReachedError

    return record


_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_LOCKS_LOCK = Lock()


def _lock(block: nn.Module) -> Any:
    """One re-entrant lock for each model: hooks see every pass through a module, also that of another thread."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(block, RLock())


@contextmanager
def _hooks(model: nn.Module, functions: Mapping[ActivationSite, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Hooks for the time of the context, during which no other thread may have hooks on the model."""
    blocks, handles = find_blocks(model), []
    lock = _lock(blocks.modules[0])
    lock.acquire()
    try:
        for site, function in functions.items():
            handles.append(hook_point(*blocks.point(site), blocks.layout.unit_offset, function))
        yield
    finally:
        for handle in handles:
            handle.remove()
        lock.release()


def _are_blocks(modules: nn.ModuleList, size: ModelSize, layout: BlockLayout) -> bool:
    """Capability, not names: a vision tower of equal depth has other modules in its layers."""
    return len(modules) == size.layers and all(hasattr(block, name) for block in modules for name in layout.modules())
