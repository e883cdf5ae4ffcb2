"""Gradients of sequence log-likelihoods that leave no trace on the module: what the gradient-space direction sources share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from theodolite.functional.directions import match_names
from theodolite.protocols import ContrastPair, PairSource, SequenceScorer, TokenSequence

TokenPair: TypeAlias = tuple[TokenSequence, TokenSequence]
"""(concept side, clean side) in token ids."""


@contextmanager
def without_trace(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; train/eval flags of every submodule and the random generators as before on the way out."""
    flags = [(part, part.training) for part in module.modules()]
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        module.eval()
        try:
            yield
        finally:
            for part, training in flags:
                part.training = training


def matrix_names(module: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Names of the trainable 2-dimensional parameters that match the glob patterns (all for ``None``).

    Raises:
        ValueError: There are none, or a pattern matches none.
    """
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad and parameter.ndim == 2]
    if not names:
        raise ValueError(f"{type(module).__name__} has no trainable weight matrix, so there is nothing to take a direction of.")
    return match_names(names, patterns)


def require_scorer(module: Any) -> SequenceScorer:
    """The module as a :class:`SequenceScorer`, or ``TypeError`` in one sentence."""
    if not isinstance(module, SequenceScorer):
        raise TypeError(
            f"{type(module).__name__} cannot score sequences: this needs a module with encode, completion_log_probs, completion_states."
        )
    return module


def contrast_pairs(trainer: Any, path: str | None, n: int, seed: int) -> list[ContrastPair]:
    """``n`` pairs from a JSONL file (``{"prompt", "concept", "clean"}`` per line) or, without one, from the trainer's datamodule.

    Raises:
        ValueError: The file is malformed or has fewer than ``n`` lines.
        TypeError: There is no file and the datamodule offers no ``contrast_pairs(n, seed)``.
    """
    if path is not None:
        pairs = _read_pairs(Path(path))
    else:
        source = require_pair_source(trainer)
        pairs = list(source.contrast_pairs(n, seed))
    if len(pairs) < n:
        raise ValueError(
            f"{path or 'The datamodule'} gives {len(pairs)} contrastive pairs and {n} are asked for: lower the number or add pairs."
        )
    return pairs[:n]


def require_pair_source(trainer: Any) -> PairSource:
    """The trainer's datamodule as a :class:`PairSource`, or ``TypeError`` in one sentence."""
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, PairSource):
        raise TypeError(
            f"{type(datamodule).__name__} offers no contrast_pairs(n, seed): give a JSONL file of pairs or a datamodule that does."
        )
    return datamodule


def encode_pairs(module: SequenceScorer, pairs: Sequence[ContrastPair]) -> list[TokenPair]:
    """Both sides of every pair in token ids."""
    return [(module.encode(pair.prompt, pair.concept), module.encode(pair.prompt, pair.clean)) for pair in pairs]


def pair_set_hash(pairs: Sequence[TokenPair]) -> str:
    """SHA-256 of the token ids of a list of pairs, in order."""
    ids = [[side.prompt_ids, side.completion_ids] for pair in pairs for side in pair]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def pair_gradient(
    trainer: Any, module: nn.Module, pairs: Sequence[TokenPair], names: Sequence[str], chunk_size: int, per_token: bool = False
) -> dict[str, Tensor]:
    """``sum over pairs of grad [NLL(concept) - NLL(clean)]``, token sums, per parameter; no ``p.grad``, RNG state or mode is touched.

    Args:
        trainer: Gives the precision context of the forward pass.
        module: A :class:`SequenceScorer`.
        pairs: (concept, clean) in token ids.
        names: Parameters to differentiate.
        chunk_size: Sequences per backward pass, after sorting by length so that little is padded.
        per_token: Divide each sequence's NLL by its number of tokens, for a live loss that does.

    Returns:
        ``{name: gradient in float32}``; zeros for a parameter that the log-probabilities do not depend on.
    """
    weights: dict[TokenSequence, float] = {}
    for concept, clean in pairs:
        weights[concept] = weights.get(concept, 0.0) + 1.0
        weights[clean] = weights.get(clean, 0.0) - 1.0
    return weighted_gradient(trainer, module, weights, names, chunk_size, per_token)


def weighted_gradient(
    trainer: Any,
    module: nn.Module,
    weights: Mapping[TokenSequence, float],
    names: Sequence[str],
    chunk_size: int,
    per_token: bool = False,
) -> dict[str, Tensor]:
    """``sum over sequences of w_s grad NLL(s)``, with the arguments of :func:`pair_gradient`."""
    ordered = sorted((s for s, w in weights.items() if w != 0.0), key=lambda s: len(s.prompt_ids) + len(s.completion_ids))
    parameters = dict(module.named_parameters())
    total = {name: torch.zeros_like(parameters[name], dtype=torch.float32) for name in names}
    with without_trace(module), torch.enable_grad():
        for start in range(0, len(ordered), chunk_size):
            _add_chunk(trainer, module, ordered[start : start + chunk_size], weights, parameters, total, per_token)
    return total


def _add_chunk(
    trainer: Any,
    module: nn.Module,
    chunk: Sequence[TokenSequence],
    weights: Mapping[TokenSequence, float],
    parameters: Mapping[str, nn.Parameter],
    total: dict[str, Tensor],
    per_token: bool,
) -> None:
    """Add the gradient of ``sum_s w_s NLL(s)`` over one chunk to ``total``."""
    with trainer.precision_plugin.forward_context():
        log_probs, mask = require_scorer(module).completion_log_probs(chunk)
    signs = torch.tensor([weights[sequence] for sequence in chunk], device=log_probs.device)
    if per_token:
        signs = signs / mask.sum(1).clamp_min(1)
    loss = -(signs[:, None] * log_probs.float() * mask).sum()
    gradients = torch.autograd.grad(loss, [parameters[name] for name in total], allow_unused=True)
    for name, gradient in zip(total, gradients, strict=True):
        if gradient is not None:
            total[name] += gradient.float()


def _read_pairs(path: Path) -> list[ContrastPair]:
    """Contrastive pairs of a JSONL file."""
    if not path.is_file():
        raise ValueError(f"There is no file of contrastive pairs at {path}.")
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            pairs.append(ContrastPair(record["prompt"], record["concept"], record["clean"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'Line {number} of {path} is not {{"prompt", "concept", "clean"}}: {error!r}.') from error
    return pairs
