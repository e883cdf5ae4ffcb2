"""The verbaliser: a causal language model that continues a prompt in which one position holds an activation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..decoding import Decoded, Prefix, Sampling, decode, evaluation_mode, forbid, uniform_streams
from ..scoring import supports_shared_prefix
from .injection import Standardise, injected


class ActivationVerbaliser(nn.Module):
    """Writes texts about activations, and says how likely given texts are.

    Args:
        lm: A causal language model of ``transformers``, possibly with an adapter.
        standardise: Applied to activations first.
        injection: Maps (B, d) activations to one (B, model width) per overwritten layer.
        prompt_ids: The prompt's token ids.
        position: Index of the marker in them.
        end_ids: Ids that end a text.
        pad_id: Id that fills padding.
        forbidden: Ids that are never written.
    """

    def __init__(
        self,
        lm: nn.Module,
        standardise: Standardise,
        injection: nn.Module,
        prompt_ids: Sequence[int],
        position: int,
        end_ids: Sequence[int],
        pad_id: int,
        forbidden: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.lm, self.standardise, self.injection = lm, standardise, injection
        self.prompt_ids, self.position = tuple(prompt_ids), position
        self.end_ids, self.pad_id, self.forbidden = tuple(end_ids), pad_id, tuple(forbidden)
        self.shared_prefix = supports_shared_prefix(lm)

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return next(self.lm.parameters()).device

    def _prompt(self, rows: int, ids: Sequence[int] | None = None) -> Tensor:
        return torch.tensor(ids or self.prompt_ids, device=self.device).expand(rows, -1)

    def prefix(self, activations: Tensor, index: Tensor | None = None, prompt: Sequence[int] | None = None) -> Prefix:
        """The state after the prompt, computed once per activation and repeated.

        Args:
            activations: (R, d) in the producer's units.
            index: (B,) which activation each row of the result continues; None = each once.
            prompt: Another prompt, without activation; None = the verbaliser's own.

        Returns:
            B states. Differentiable outside of ``torch.no_grad``.
        """
        ids = self._prompt(len(activations), prompt)
        with nullcontext() if prompt else injected(self.lm, self.injection(self.standardise(activations)), self.position):
            outputs = self.lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
        cache, logits = outputs.past_key_values, outputs.logits[:, -1]
        if index is not None:
            cache.batch_select_indices(index)
            logits = logits[index]
        attention = torch.ones(len(logits), ids.shape[1], dtype=torch.long, device=self.device)
        return Prefix(cache, logits, attention, attention.sum(dim=1))

    def forward(self, activations: Tensor, index: Tensor, ids: Tensor, mask: Tensor, prompt: Sequence[int] | None = None) -> Tensor:
        """Logits of given texts, every token conditioned on the activation and the tokens before it.

        Where the model's cache allows it every activation's prompt is computed once, whatever the number of its texts.

        Args:
            activations: (R, d) in the producer's units.
            index: (B,) the activation of each text.
            ids: (B, T) token ids, padded on the right.
            mask: (B, T), 1 on tokens.
            prompt: Another prompt, without activation.

        Returns:
            (B, T, V) logits, minus infinity on forbidden ids. Differentiable.
        """
        length = len(prompt or self.prompt_ids)
        if self.shared_prefix:
            prefix = self.prefix(activations, index, prompt)
            logits = prefix.logits[:, None]
            if ids.shape[1] > 1:
                steps = torch.arange(ids.shape[1] - 1, device=ids.device) + length
                rest = self.lm(
                    input_ids=ids[:, :-1],
                    attention_mask=torch.cat([prefix.attention, mask[:, :-1].to(prefix.attention)], dim=1),
                    position_ids=steps.expand(len(ids), -1),
                    past_key_values=prefix.cache,
                    use_cache=True,
                ).logits
                logits = torch.cat([logits, rest], dim=1)
            return forbid(logits, self.forbidden)
        whole = torch.cat([self._prompt(len(ids), prompt), ids[:, :-1]], dim=1)
        attention = torch.cat([torch.ones(len(ids), length).to(mask), mask[:, :-1]], dim=1).long()
        with nullcontext() if prompt else injected(self.lm, self.injection(self.standardise(activations[index])), self.position):
            logits = self.lm(input_ids=whole, attention_mask=attention, use_cache=False, logits_to_keep=ids.shape[1]).logits
        return forbid(logits, self.forbidden)

    @torch.no_grad()
    def write(self, activations: Tensor, seeds: Sequence[Sequence[int]], sampling: Sampling) -> Decoded:
        """Draw ``len(seeds[r])`` texts for activation r, group after group; a text is a function of activation, seed and weights."""
        index = torch.repeat_interleave(torch.arange(len(seeds)), torch.tensor([len(group) for group in seeds])).to(self.device)
        uniforms = uniform_streams([seed for group in seeds for seed in group], sampling.max_new_tokens)
        with evaluation_mode(self):
            prefix = self.prefix(activations.to(self.device), index)
            return decode(self.lm, prefix, uniforms, sampling, self.end_ids, self.pad_id, self.forbidden)


@contextmanager
def soft_embeddings(embedding: nn.Module, one_hot: Tensor, start: int) -> Iterator[None]:
    """Let gradients flow from embeddings into straight-through one-hots, without changing a value.

    Inside, the output of ``embedding`` at positions ``start, start + 1, ...`` carries the gradient of ``one_hot @ weight``.

    Args:
        embedding: The input embedding; a constant factor of its own (Gemma's square root of d) is part of the gradient.
        one_hot: (B, T, V), zeros and ones of the very ids that are embedded there.
        start: First of the T positions.
    """
    weight, factor = cast(Tensor, embedding.weight), getattr(embedding, "embed_scale", 1.0)
    # the table itself is trained through the embedding's own output, not through this path a second time
    carried = (one_hot @ weight.detach().to(one_hot)) * factor
    carried = carried - carried.detach()

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        before, after = start, output.shape[1] - start - carried.shape[1]
        return output + nn.functional.pad(carried, (0, 0, before, after)).to(output)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
