"""Scoring a window with every prompt computed once, however many microbatches its completions are cut into.

The prompts run once and leave keys, values and last states behind. Those are cut from the graph and become leaves: microbatches of
completions attend to them and back-propagate into them. When all microbatches are done, one backward pass carries the collected gradients
through the prompts. Memory is that of the prompts plus one microbatch of completions, and the gradient is the padded path's.

The head is applied to loss positions only, in chunks: see :func:`theodolite.functional.head_log_probs.head_log_probs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from theodolite.functional.head_log_probs import head_log_probs
from theodolite.protocols import TokenSequence

from .decoding import evaluation_mode
from .folded_linear import folded, folded_layers
from .scoring import pad_sequences, supports_shared_prefix

SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale", "lm_head_multiplier")
"""Config fields of architectures that do something to the logits after the head."""


@dataclass(slots=True)
class Backbone:
    """A causal language model taken apart.

    Attributes:
        decoder: Maps ids to last hidden states, after the final norm.
        head: The output embedding.
    """

    decoder: nn.Module
    head: nn.Linear


def take_apart(model: nn.Module) -> Backbone | None:
    """Decoder and head of a model whose logits are ``head(decoder(ids))`` and nothing else; None where that is not so.

    It is tried out on two tokens and must agree to the last bit, so an unknown architecture cannot slip through.
    """
    causal: Any = model
    while hasattr(causal, "get_base_model"):
        causal = causal.get_base_model()
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    decoder = getattr(causal, getattr(causal, "base_model_prefix", "") or "model", None)
    if type(head) is not nn.Linear or head.bias is not None or not isinstance(decoder, nn.Module) or decoder is causal:
        return None
    if any(getattr(causal.config, name, None) not in (None, 1, 1.0) for name in SCALED_LOGITS):
        return None
    with torch.no_grad(), evaluation_mode(model):
        ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
        logits = model(input_ids=ids, use_cache=False).logits  # the whole model first: where weights lie in shards it becomes their root
        states = decoder(input_ids=ids, use_cache=False).last_hidden_state
        if not torch.equal(logits, head(states)):
            return None
    return Backbone(decoder, head)


def supports_split_prefix(model: nn.Module) -> bool:
    """Whether :class:`SplitPrefix` computes exactly what the padded path does for this model."""
    return supports_shared_prefix(model) and take_apart(model) is not None


class SplitPrefix:
    """Prompts computed once, with a cut in the graph after them.

    Args:
        backbone: See :func:`take_apart`.
        prompts: Distinct prompts in token ids, none empty.
        pad_id: Fills the padding.
        device: Where the model is.
        temperature: Divides the logits.
        fold: Compute with LoRA adapters folded into copies of their bases; see :mod:`~.folded_linear`.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[tuple[int, ...]],
        pad_id: int,
        device: torch.device,
        temperature: float = 1.0,
        fold: bool = False,
    ) -> None:
        self.backbone, self.pad_id, self.device, self.temperature = backbone, pad_id, device, temperature
        self._layers = folded_layers(backbone.decoder) if fold and not torch.is_autocast_enabled(device.type) else []
        self.rows = {prompt: row for row, prompt in enumerate(prompts)}
        batch = pad_sequences([TokenSequence(prompt, ()) for prompt in prompts], pad_id, device)
        length = batch.input_ids.shape[1] - 1  # one column is left for an empty completion
        self.attention = batch.attention_mask[:, :length]
        outputs = self._decode(
            input_ids=batch.input_ids[:, :length],
            attention_mask=self.attention,
            position_ids=batch.position_ids[:, :length],
        )
        layers = outputs.past_key_values.layers
        self._roots: list[Tensor] = [
            outputs.last_hidden_state[:, -1],
            *(tensor for layer in layers for tensor in (layer.keys, layer.values)),
        ]
        self._leaves = [root.detach().requires_grad_(root.requires_grad) for root in self._roots]

    def score(self, sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities (differentiable up to the cut), entropies and mask, all (B, T) and 0 on padding."""
        index = torch.tensor([self.rows[sequence.prompt_ids] for sequence in sequences], device=self.device)
        length = max(1, *(len(s.completion_ids) for s in sequences))
        ids = torch.full((len(sequences), length), self.pad_id)
        mask = torch.zeros(len(sequences), length, dtype=torch.float32)  # whatever dtype a precision plugin makes the default
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence.completion_ids)] = torch.tensor(sequence.completion_ids, dtype=torch.long)
            mask[row, : len(sequence.completion_ids)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        states = self._leaves[0].index_select(0, index)[:, None]
        if length > 1:
            states = torch.cat([states, self._completion_states(index, ids[:, :-1], mask)], dim=1)
        wanted = mask.bool()
        log_probs, entropies = head_log_probs(states[wanted], self.backbone.head.weight, ids[wanted], self.temperature)
        empty = torch.zeros(mask.shape, dtype=log_probs.dtype, device=self.device)
        return empty.masked_scatter(wanted, log_probs), empty.masked_scatter(wanted, entropies), mask

    def _completion_states(self, index: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self._leaves[1::2], self._leaves[2::2], strict=True)):
            cache.update(keys.index_select(0, index), values.index_select(0, index), layer)
        attention = self.attention[index]
        starts = attention.sum(dim=1, keepdim=True)
        # padding repeats its row's last position: a learned position table may not reach further
        steps = torch.arange(ids.shape[1], device=self.device).minimum((mask.sum(dim=1, keepdim=True).long() - 1).clamp_min(0))
        outputs = self._decode(
            input_ids=ids,
            attention_mask=torch.cat([attention, mask[:, :-1].to(attention)], dim=1),
            position_ids=starts + steps,
            past_key_values=cache,
        )
        return outputs.last_hidden_state

    def _decode(self, **inputs: Any) -> Any:
        with folded(self._layers):
            return self.backbone.decoder(**inputs, use_cache=True)

    def finish(self, backward: Callable[[Tensor], Any]) -> None:
        """Carry what the microbatches left at the cut through the prompts.

        Args:
            backward: Called once with a scalar whose gradient is that of the prompts' share; not at all where nothing arrived.
        """
        pairs = [(root, leaf.grad) for root, leaf in zip(self._roots, self._leaves, strict=True) if leaf.grad is not None]
        if pairs:
            backward(torch.stack([(root * gradient).sum() for root, gradient in pairs]).sum())
        self._roots, self._leaves = [], []
