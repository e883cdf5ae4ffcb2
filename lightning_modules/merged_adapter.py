"""Decoding with an adapter folded into its base: two small products fewer per linear layer and token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@contextmanager
def merged_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers compute with ``W + B A`` and adapters are passed over; afterwards the very tensors of before are back.

    The base is put back, never un-merged by subtraction, so nothing drifts however often this is used. Memory for one copy of the adapted
    weights is needed inside. Use it in float32: in bfloat16 the sum is rounded, and the sampler would be another policy than the trainer's.

    Args:
        model: Any model; one without a LoRA adapter is left as it is.
    """
    adapted = adapted_layers(model)
    originals: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for parent, name, layer in adapted:
                weight = layer.get_base_layer().weight
                originals.append((weight, weight.data))
                merged = weight.data
                for adapter in layer.active_adapters if not layer.disable_adapters else ():
                    if adapter in layer.lora_A:
                        merged = merged + layer.get_delta_weight(adapter).to(merged)
                weight.data = merged
                setattr(parent, name, layer.get_base_layer())  # so that the adapter's own bookkeeping is not paid for either
        yield
    finally:
        for weight, original in originals:
            weight.data = original
        for parent, name, layer in adapted:
            setattr(parent, name, layer)


def check_merging(engine: object, precision: str) -> None:
    """Refuse to fold adapters in where the trainer computes in less than float32: the sampler would be another policy than is trained.

    Args:
        engine: A sampler, with ``merge_adapter`` where it can fold.
        precision: Of the trainer.

    Raises:
        ValueError: It folds, and the precision is neither ``32-true`` nor ``64-true``.
    """
    if getattr(engine, "merge_adapter", False) and precision not in ("32-true", "64-true"):
        raise ValueError(
            f"model.merge_adapter rounds the merged weights under trainer.precision={precision}; use 32-true, or set "
            "merge_adapter to false."
        )


def adapted_layers(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Every layer that carries a LoRA adapter: its parent, its name there, and itself."""
    return [(parent, name, layer) for parent in model.modules() for name, layer in parent.named_children() if _is_adapted(layer)]


def _is_adapted(layer: Any) -> bool:
    return isinstance(layer, LoraLayer) and hasattr(layer, "get_delta_weight") and isinstance(layer.get_base_layer(), nn.Module)
