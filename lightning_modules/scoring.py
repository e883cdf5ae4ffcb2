"""Log-probabilities and hidden states of given token sequences: the padded path.

Prompts are padded on the left and completions on the right, so that the boundary lies in one column and the language-model head runs on
completion positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from theodolite.protocols import TokenSequence


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Padded sequences.

    Attributes:
        input_ids: (B, P + T) token ids.
        attention_mask: (B, P + T), 1 on real tokens.
        position_ids: (B, P + T), counted from each row's first real token.
        completion_ids: (B, T) completion tokens.
        mask: (B, T), 1 on completion tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    completion_ids: Tensor
    mask: Tensor


def pad_sequences(sequences: Sequence[TokenSequence], pad_id: int, device: torch.device | str) -> PaddedBatch:
    """Pad prompts on the left and completions on the right.

    Args:
        sequences: B sequences; prompts must not be empty.
        pad_id: Id that fills the padding.
        device: Where the tensors go.

    Raises:
        ValueError: For an empty prompt: there is no position that predicts the first completion token.
    """
    if any(not sequence.prompt_ids for sequence in sequences):
        raise ValueError("A sequence with an empty prompt cannot be scored; give the prompt at least a start token.")
    prompt_length = max(len(s.prompt_ids) for s in sequences)
    length = max(1, *(len(s.completion_ids) for s in sequences))
    ids = torch.full((len(sequences), prompt_length + length), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start, end = prompt_length - len(sequence.prompt_ids), prompt_length + len(sequence.completion_ids)
        ids[row, start:end] = torch.tensor(sequence.prompt_ids + sequence.completion_ids)
        attention[row, start:end] = 1
    positions = (attention.cumsum(dim=1) - 1).clamp_min(0)
    ids, attention, positions = ids.to(device), attention.to(device), positions.to(device)
    return PaddedBatch(ids, attention, positions, ids[:, prompt_length:], attention[:, prompt_length:].to(torch.float32))


def selected_log_probs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)[ids]`` in float32, without building the whole log-softmax.

    Args:
        logits: (..., V).
        ids: (...) token ids.
        temperature: Divides the logits.

    Returns:
        (...) log-probabilities.
    """
    scaled = logits.float() / temperature
    return scaled.gather(-1, ids[..., None]).squeeze(-1) - scaled.logsumexp(dim=-1)


def completion_log_probs(model: nn.Module, batch: PaddedBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability of every completion token given everything before it.

    Args:
        model: A causal language model of ``transformers``.
        batch: B padded sequences.
        temperature: Divides the logits.

    Returns:
        (B, T), 0 on padding. Differentiable.
    """
    length = batch.completion_ids.shape[1]
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=length + 1,
        use_cache=False,
    ).logits
    log_probs = selected_log_probs(logits[:, :-1], batch.completion_ids, temperature)
    return torch.where(batch.mask.bool(), log_probs, 0.0)


@torch.no_grad()
def completion_states(model: nn.Module, batch: PaddedBatch, layer: int) -> Tensor:
    """Residual-stream states after decoder layer ``layer`` (1 = after the first) at completion tokens.

    Returns:
        (B, T, d) in float32; padding positions are whatever the model computed there and must be masked by the caller.

    Raises:
        ValueError: If the model has no such layer.
    """
    outputs = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=1,
        use_cache=False,
        output_hidden_states=True,
    )
    states = outputs.hidden_states
    if not 0 <= layer < len(states):
        raise ValueError(f"The model has {len(states) - 1} layers; there are no states after layer {layer}.")
    return states[layer][:, -batch.completion_ids.shape[1] :].float()
