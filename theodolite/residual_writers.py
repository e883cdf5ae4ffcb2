"""Which weight matrices write to the residual stream, by family: the one table of their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

WRITERS = (
    "self_attn.o_proj",  # llama, mistral, qwen2, qwen3, gemma, phi3, olmo and their relatives
    "mlp.down_proj",
    "attention.dense",  # gpt-neox, pythia
    "mlp.dense_4h_to_h",
    "self_attn.out_proj",  # opt
    "fc2",
)
"""Ends of the module names of attention's and the feed-forward block's last linear map, which stores its weight as (d_out, d_in). GPT-2
is not
here: its ``Conv1D`` stores (d_in, d_out)."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def residual_writers(names: Iterable[str]) -> dict[str, int]:
    """Writing matrices among parameter names, and the decoder layer of each.

    A LoRA adapter on such a matrix writes through its ``B`` (d_out, r), so that is what is named for it; the adapter's ``A`` reads.

    Args:
        names: Parameter names.

    Returns:
        ``{parameter name: layer}``.
    """
    found = {}
    for name in names:
        layer = _LAYER.search(name)
        if layer and is_writer(name):
            found[name] = int(layer.group(1))
    return found


def is_writer(name: str) -> bool:
    """Whether a parameter is a residual-writing weight, or the ``B`` of an adapter on one."""
    module = re.sub(r"(\.base_layer)?\.weight$|\.lora_B\.[^.]+\.weight$|\.lora_B\.weight$", "", name)
    return module != name and any(module.endswith(f".{end}") or module == end for end in WRITERS)


def base_weight_name(name: str, names: Iterable[str]) -> str | None:
    """The full weight behind a parameter name: for a LoRA matrix its base layer's weight, otherwise the parameter itself."""
    known = set(names)
    base = re.sub(r"\.lora_[AB](\.[^.]+)?\.weight$", ".base_layer.weight", name)
    return base if base in known else None
