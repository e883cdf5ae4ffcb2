"""Log-probabilities and hidden states of given token sequences, by two paths that agree.

The padded path pads prompts on the left and completions on the right, so that the boundary lies in one column and the language-model head
runs on completion positions only. The shared-prefix path computes every distinct prompt once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

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
    """``log softmax(logits / temperature)[ids]`` in float32 (float64 for such logits), without building the whole log-softmax.

    Args:
        logits: (..., V).
        ids: (...) token ids.
        temperature: Divides the logits.

    Returns:
        (...) log-probabilities.
    """
    scaled = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
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


def supports_shared_prefix(model: nn.Module) -> bool:
    """Whether every layer's cache holds all keys and values, so that a prompt's cache can be shared without changing anything.

    Sliding windows, recurrent states and gradient checkpointing (which switches the cache off) need the padded path.
    """
    config = getattr(model, "config", None)
    if config is None or getattr(model, "_is_stateful", False):
        return False
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers) and not getattr(model, "is_gradient_checkpointing", False)


def shared_prefix_log_probs(
    model: nn.Module, sequences: Sequence[TokenSequence], pad_id: int, device: torch.device | str, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As :func:`completion_log_probs`, with every distinct prompt computed once.

    Prompts run first and leave their keys and values in a differentiable cache; completions attend to it. For groups of G rollouts with
    prompts of P and completions of T tokens that is P + G T tokens instead of G (P + T). Values and gradients are those of the padded
    path up to float noise.

    Args:
        model: A causal language model whose cache holds full keys and values in every layer; see :func:`supports_shared_prefix`.
        sequences: B sequences, in any order; equal prompts are found by their ids.
        pad_id: Id that fills the padding.
        device: Where the model is.
        temperature: Divides the logits.

    Returns:
        (B, T) log-probabilities, 0 on padding, and the (B, T) mask.
    """
    prompts = {sequence.prompt_ids: None for sequence in sequences}
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    index = torch.tensor([rows[sequence.prompt_ids] for sequence in sequences], device=device)
    prompt_batch = pad_sequences([TokenSequence(prompt, ()) for prompt in prompts], pad_id, device)
    length = prompt_batch.input_ids.shape[1] - 1  # pad_sequences leaves one column for an empty completion
    attention = prompt_batch.attention_mask[:, :length]
    prefix = model(
        input_ids=prompt_batch.input_ids[:, :length],
        attention_mask=attention,
        position_ids=prompt_batch.position_ids[:, :length],
        use_cache=True,
        logits_to_keep=1,
    )
    first = prefix.logits[index, -1:]
    batch = pad_sequences(sequences, pad_id, device)
    ids, mask = batch.completion_ids, batch.mask
    if ids.shape[1] == 1:
        logits = first
    else:
        cache = prefix.past_key_values
        cache.batch_select_indices(index)
        starts = attention.sum(dim=1)[index]
        # padding repeats its row's last position: a learned position table may not reach further
        steps = torch.arange(ids.shape[1] - 1, device=device).minimum((mask.sum(dim=1, keepdim=True).long() - 1).clamp_min(0))
        rest = model(
            input_ids=ids[:, :-1],
            attention_mask=torch.cat([attention[index], mask[:, :-1].to(attention)], dim=1),
            position_ids=starts[:, None] + steps,
            past_key_values=cache,
            use_cache=True,
        ).logits
        logits = torch.cat([first, rest], dim=1)
    return torch.where(mask.bool(), selected_log_probs(logits, ids, temperature), 0.0), mask
