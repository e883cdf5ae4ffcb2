"""Whether a fit has the memory it needs, asked before the language model is loaded."""

from __future__ import annotations

from typing import Any

import torch

from theodolite.memory_estimate import CoderSize, available_memory, check_memory, coder_memory, language_model_memory

from .transcoder import Transcoder


def fitting_memory(coder: Transcoder, tokens: int, datamodule: Any, device: torch.device) -> str:
    """One line that says what a fit needs on this rank.

    Args:
        coder: The coder that is trained.
        tokens: Rows of a training batch on this rank.
        datamodule: Counted if it offers ``buffer_bytes`` and a ``model`` with ``config`` and ``dtype`` that is not loaded yet.
        device: Where it all has to fit.

    Raises:
        ValueError: It does not fit; the message says what would.
    """
    dense = coder.activation == "jumprelu"
    size = CoderSize(coder.d_in, coder.d_out, coder.latents, tokens, len(coder.prefixes), dense, coder.W_skip is not None)
    parts = coder_memory(size)
    parts["coder weights"] = 0  # they are there already
    model: Any = getattr(datamodule, "model", None)
    if hasattr(datamodule, "buffer_bytes") and not getattr(datamodule, "buffer_on_cpu", False):
        parts["activation buffer"] = int(datamodule.buffer_bytes)
    if hasattr(model, "config") and not getattr(model, "loaded", True):
        rows = int(datamodule.model_batch_rows) * int(datamodule.packing.length)
        parts |= language_model_memory(model.config, getattr(torch, model.dtype), rows)
    return check_memory(parts, available_memory(device), size)
