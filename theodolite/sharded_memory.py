"""Which part of a model one rank holds when the model lies in shards over ranks (FSDP2), and what it gathers for a while.

Shards are cut along a parameter's first dimension, rounded up. Every decoder layer is a group that is gathered at once, and everything
else (embeddings, norms, the head) is one more, which stays gathered during a whole pass.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that ``transformers`` declares not to be split: a decoder's layers, in order; empty where it declares none."""
    causal = model
    while hasattr(causal, "get_base_model"):
        causal = causal.get_base_model()  # pyright: ignore[reportCallIssue]
    names = set(getattr(causal, "_no_split_modules", None) or ())
    return [module for module in causal.modules() if type(module).__name__ in names]


def shards_memory(model: nn.Module, trained: Sequence[nn.Parameter], ranks: int, copies: int, merged: bool, whole: bool) -> dict[str, int]:
    """Bytes of weights, gradients and Adam's moments on one rank, in place of those of whole weights.

    Args:
        model: The trained one.
        trained: Its parameters that are optimised.
        ranks: Over which it is sharded.
        copies: Frozen copies in shards beside it.
        merged: A copy with the adapter folded in is made of the whole weights, for sampling and for a gradient that gathers all of them.
        whole: The gradient gathers all weights (``split_backward``); otherwise it goes layer by layer, with the next one on its way.

    Returns:
        Held all the time: weights, the optimizer's moments, and (layer by layer) gradients. Held for a while: whatever is gathered, and
        gradients of it until they are summed, when a layer's are there twice.
    """
    rest, *layers = _groups(model)
    wanted = {id(parameter) for parameter in trained}

    def size(group: Collection[nn.Parameter], *, only_trained: bool = False) -> int:
        return sum(p.numel() * p.element_size() for p in group if not only_trained or id(p) in wanted)

    everything = [parameter for group in (rest, *layers) for parameter in group]
    own, own_trained = sum(_share(p, ranks) for p in everything), sum(_share(p, ranks) for p in trained)
    held = {"weights": own * (1 + copies), "optimizer": 2 * own_trained}
    gathered = {"weights gathered to sample": size(everything) * (1 + copies + merged)}
    if whole:
        total = size(trained)
        gathered |= {"weights gathered for the gradient": size(everything) * (1 + merged), "shards of gradients": own_trained}
        return held | gathered | {"whole gradients": total, "their sum over ranks": total}
    largest = max((size(layer) for layer in layers), default=0)
    in_flight = size(rest, only_trained=True) + 2 * max((size(layer, only_trained=True) for layer in layers), default=0)
    gathered |= {"weights gathered for the gradient": size(rest) + 2 * largest, "whole gradients": in_flight}
    return held | {"gradients": own_trained} | gathered


def _groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """What belongs to no layer, and every layer's parameters; each parameter once."""
    layers = [list(layer.parameters()) for layer in decoder_layers(model)]
    inside = {id(parameter) for layer in layers for parameter in layer}
    return [[parameter for parameter in model.parameters() if id(parameter) not in inside], *layers]


def _share(parameter: nn.Parameter, ranks: int) -> int:
    rows = parameter.shape[0] if parameter.ndim else 1
    return -(-rows // ranks) * (parameter.numel() // max(rows, 1)) * parameter.element_size()
