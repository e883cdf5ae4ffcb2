"""How much memory a transcoder run needs on one rank, from real sizes, before anything is loaded.

Tables of models and "gigabytes needed" go out of date and leave out what decides: the width of the dictionary and of the batch. This
counts bytes: parameters from the model's own config (built on the meta device, so nothing is allocated), Adam's moments, pre-activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
SCORE_COPIES = 2.5
"""(N, M) float32 arrays alive at once: the pre-activations, the maxima of their groups, and what selection gathers from them."""
DENSE_COPIES = 6.0
"""The same for JumpReLU, whose forward and backward keep all latents: scores, activations, masks and their gradients."""
BLOCK_STATES = 12
"""(tokens, width) arrays alive in one decoder layer of the producer, besides its MLP's hidden states."""


@dataclass(frozen=True, slots=True)
class CoderSize:
    """Sizes of a coder and its step on one rank.

    Attributes:
        d_in: Width of the input.
        d_out: Width of the target.
        latents: M.
        tokens: Rows of a training batch on this rank.
        prefixes: G.
        dense: All latents take part (JumpReLU).
        skip: There is a linear map of the input.
    """

    d_in: int
    d_out: int
    latents: int
    tokens: int
    prefixes: int = 1
    dense: bool = False
    skip: bool = False

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        matrices = self.latents * (self.d_in + self.d_out) + (self.d_in * self.d_out if self.skip else 0)
        return matrices + self.latents * (2 if self.dense else 1) + self.d_out


def coder_memory(size: CoderSize) -> dict[str, int]:
    """Bytes by what they are for: float32 weights, gradients, Adam's two moments, and a step's activations."""
    weights = 4 * size.parameters
    scores = int((DENSE_COPIES if size.dense else SCORE_COPIES) * 4 * size.tokens * size.latents)
    reconstructions = 4 * 4 * size.tokens * size.prefixes * size.d_out
    return {
        "coder weights": weights,
        "coder gradients": weights,
        "optimizer": 2 * weights,
        "pre-activations": scores,
        "reconstructions": reconstructions + 8 * size.tokens * (size.d_in + size.d_out),
    }


def language_model_memory(config: Any, dtype: torch.dtype, tokens: int) -> dict[str, int]:
    """Bytes of a producer: its parameters, and one layer's activations of ``tokens`` tokens without gradient.

    Args:
        config: A ``transformers`` config.
        dtype: Of the weights.
        tokens: Tokens per forward pass.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    item = torch.empty(0, dtype=dtype).element_size()
    text = config.get_text_config()
    hidden = int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size)
    states = item * tokens * (BLOCK_STATES * int(text.hidden_size) + 3 * hidden)
    unique = {id(p): p for p in model.parameters()}.values()
    return {"language model": item * sum(p.numel() for p in unique), "its activations": states}


def available_memory(device: torch.device) -> int:
    """Free bytes on a device: of the GPU, or of the machine as far as its container may use them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def check_memory(parts: Mapping[str, int], available: int, size: CoderSize) -> str:
    """One line that says what is needed, if it fits.

    Args:
        parts: Bytes by purpose.
        available: Bytes there are.
        size: What could be made smaller.

    Raises:
        ValueError: It does not fit; the message names the largest parts and a global batch or dictionary that would.
    """
    needed = sum(parts.values())
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    listed = ", ".join(f"{name} {parts[name] / GIB:.2f}" for name in largest)
    line = f"memory: about {needed / GIB:.2f} GiB of {available / GIB:.2f} GiB available on this rank ({listed})"
    if needed <= available:
        return line
    raise ValueError(f"{line}: it does not fit. {_suggestion(parts, available, size)}")


def _suggestion(parts: Mapping[str, int], available: int, size: CoderSize) -> str:
    """The largest batch, else the largest dictionary, that fits beside the rest."""
    steps = ("pre-activations", "reconstructions")
    fixed = sum(value for name, value in parts.items() if name not in steps)
    per_token = sum(parts[name] for name in steps) / size.tokens
    tokens = int((available - fixed) // per_token)
    if tokens >= 64:
        return f"Batches of {2 ** (tokens.bit_length() - 1)} tokens per rank would (data.global_batch_size)."
    growing = sum(value for name, value in parts.items() if name in ("coder weights", "coder gradients", "optimizer", "pre-activations"))
    latents = int(size.latents * (available - (sum(parts.values()) - growing)) / growing)
    if latents >= max(256, size.d_in):
        return f"A dictionary of {latents // 256 * 256} latents would (model.latents)."
    return "The language model and its buffer alone leave too little: use a smaller data.buffer_rows or data.dtype, or a larger machine."
