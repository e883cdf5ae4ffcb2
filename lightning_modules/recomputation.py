"""Gradient checkpointing for the gradient's passes alone: a decoder layer keeps its input and is computed once more going backwards.

The layers' own switch of ``transformers`` works in training mode only, where dropout is on, and it takes the cache from whoever samples.
Here only the layers' outermost modules are told that they train, and only while a gradient's forward pass runs: sampling, scoring and
evaluation keep their caches, and what layers compute is what they compute in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def recomputable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers of a ``transformers`` model that can be computed once more, in order.

    Raises:
        ValueError: It has none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(f"model.gradient_checkpointing: the layers of {kind} models cannot be computed once more; set it to false.")
    return layers


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Forward passes inside keep the layers' inputs only; their backward passes, inside or later, compute the layers once more.

    Args:
        model: Of ``transformers``, with or without an adapter; it ends as it was.

    Raises:
        ValueError: No layer of it can be computed once more.
    """
    layers = [cast(Any, layer) for layer in recomputable_layers(model)]
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training, layer.gradient_checkpointing = True, True  # not .train(): its parts stay as they are
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training
            del layer.gradient_checkpointing, layer._gradient_checkpointing_func  # the class says False
