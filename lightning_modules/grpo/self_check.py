"""The gradient path in use against the padded one, on a few rollouts of the run itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from theodolite.distributed import gather_objects
from theodolite.out_of_memory import FittingParts
from theodolite.protocols import TokenSequence, Window

from ..scoring import completion_log_probs, pad_sequences
from .limits import REMEDY

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Relative deviation of a gradient that summation order may cause; a wrong path is off by about 1.

Models in float64 still compute norms in float32."""


def tolerance_of(module: Any) -> float:
    """What the coarsest dtype on the gradient's way allows: that of a parameter, or the one that autocast computes in."""
    dtypes, kind = {parameter.dtype for parameter in module.causal_lm.parameters()}, module.device.type
    with module.trainer.precision_plugin.forward_context():
        if torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
    return max(TOLERANCES[dtype] for dtype in dtypes)


def check_gradient_path(module: Any, window: Window, indices: Sequence[int]) -> float:
    """Relative difference between the module's gradient path and the padded path; ``p.grad`` is left as it was.

    All ranks must call it; a rank without rollouts of its own brings none. Rollouts that do not fit into memory together are compared in
    parts: this is not to be what a run needs most memory for.

    Args:
        module: A policy-gradient module, before its first backward pass of a window.
        window: Where the rollouts are.
        indices: A few of them.

    Returns:
        ``|g - g_padded| / |g_padded|`` of a weighted sum of log-probabilities in which every token counts differently, the largest of
        all ranks and parts.

    Raises:
        RuntimeError: The deviation is more than float noise of the policy's dtype or autocast's. It is raised on every rank.
    """
    sequences = [window.rollouts[i].tokens for i in indices]
    parts = FittingParts(max(1, len(sequences)), REMEDY).map(lambda part: _deviation(module, sequences[part]), len(sequences))
    found = [deviation for own in gather_objects(parts) for deviation in own]
    deviation = max(found, default=0.0, key=lambda value: (value != value, value))  # NaN is the largest of all
    tolerance = tolerance_of(module)
    if not deviation <= tolerance:
        raise RuntimeError(
            f"The fast gradient path deviates from the padded one by {deviation:.1e} (float noise would be below {tolerance:.0e}) for this "
            "model; set model.split_backward and model.shared_prefix to false."
        )
    return deviation


def _deviation(module: Any, sequences: Sequence[TokenSequence]) -> float:
    parameters = module.trainable_parameters()
    before = [parameter.grad for parameter in parameters]
    try:
        ours, padded = (_gradient(module, parameters, sequences, path) for path in ("used", "padded"))
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
    off, size = _norm(a.double() - b.double() for a, b in zip(ours, padded, strict=True)), _norm(padded)
    return off / size if size else off


def _norm(tensors: Iterable[Tensor]) -> float:
    """Of all of them together, in float64, one after the other: a flat copy of a gradient would take twice its memory."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _gradient(module: Any, parameters: Sequence[torch.nn.Parameter], sequences: Sequence[TokenSequence], path: str) -> list[Tensor]:
    for parameter in parameters:
        parameter.grad = None
    device, temperature = module.device, module.sampling.temperature
    with module.trainer.precision_plugin.forward_context():
        if path == "padded":
            log_probs = completion_log_probs(module.causal_lm, pad_sequences(sequences, module.pad_id, device), temperature)
            _backward(module, _weighted(log_probs))
        elif module.backbone is not None:
            split = module.split_prefix(module.backbone, list(dict.fromkeys(s.prompt_ids for s in sequences)))
            _backward(module, _weighted(split.score(sequences)[0]))
            split.finish(lambda scalar: _backward(module, scalar))
        else:
            _backward(module, _weighted(module.completion_log_probs(sequences)[0]))
    return [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]


def _backward(module: Any, scalar: Tensor) -> None:
    with module._without_gradient_sync():
        module.manual_backward(scalar)


def _weighted(log_probs: Tensor) -> Tensor:
    rows, columns = log_probs.shape
    weights = torch.linspace(-1, 2, rows, device=log_probs.device)[:, None] + torch.linspace(0, 0.5, columns, device=log_probs.device)
    return (weights * log_probs).sum()
