"""Content hashes of modules, to key what was computed with them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from theodolite.provenance import content_hash


def weights_hash(module: nn.Module, facts: Any) -> str:
    """SHA-256 (hex) over every tensor of a module's state and over plain data.

    Args:
        module: Whose ``state_dict`` is hashed: names, shapes, dtypes and bytes.
        facts: Plain data that decides results beside the weights.
    """
    digest = hashlib.sha256(content_hash(facts).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
