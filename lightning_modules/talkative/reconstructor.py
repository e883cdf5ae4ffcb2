"""The reconstructor: a language model cut off after some layers, with a linear head read at the last token of a template."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from theodolite.sites import find_blocks

from ..decoding import evaluation_mode
from ..policy import load_policy
from .hashing import weights_hash
from .injection import Standardise, identity_linear
from .settings import ReconstructorSettings
from .verbaliser import soft_embeddings

FINAL_NORMS = ("norm", "ln_f")


class TextReconstructor(nn.Module):
    """Reads a text and returns the activation that it describes (a ``theodolite.protocols.Reconstructor``).

    Args:
        trunk: A decoder of ``transformers`` without head.
        head: Maps its last hidden state to the activation.
        standardise: Whose inverse turns the head's output into the producer's units.
        tokenizer: Encodes texts.
        prefix: Text before the description.
        suffix: Text after it.
        batch_size: Most texts per forward pass of :meth:`reconstruct`; changes memory and time only.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        standardise: Standardise,
        tokenizer: PreTrainedTokenizerBase,
        prefix: str,
        suffix: str,
        batch_size: int = 1024,
    ) -> None:
        super().__init__()
        self.trunk, self.head, self.standardise = trunk, head, standardise
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.prefix_ids, self.suffix_ids = encode(tokenizer, prefix), encode(tokenizer, suffix)

    def forward(self, ids: Tensor, lengths: Tensor, one_hot: Tensor | None = None) -> Tensor:
        """Standardised reconstructions.

        Args:
            ids: (B, T) token ids, padded on the right with anything.
            lengths: (B,) real tokens.
            one_hot: (B, T, V) straight-through one-hots of the same ids, to carry gradients to whoever wrote them.

        Returns:
            (B, d). A row depends on its own tokens alone.
        """
        rows, start, end = torch.arange(len(ids), device=ids.device), len(self.prefix_ids), len(self.suffix_ids)
        width = start + ids.shape[1] + end
        whole = ids.new_zeros(len(ids), width)
        whole[:, :start] = torch.tensor(self.prefix_ids, dtype=ids.dtype, device=ids.device)
        whole[:, start : start + ids.shape[1]] = ids
        for offset, token in enumerate(self.suffix_ids):
            whole[rows, start + lengths + offset] = token
        last = start + lengths + end - 1
        attention = (torch.arange(width, device=ids.device) <= last[:, None]).long()
        embedding = cast(Any, self.trunk).get_input_embeddings()
        with nullcontext() if one_hot is None else soft_embeddings(embedding, one_hot, start):
            states = self.trunk(input_ids=whole, attention_mask=attention, use_cache=False).last_hidden_state
        return self.head(states[rows, last].to(self.head.weight))

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, T) token ids, padded on the right with 0, and (B,) lengths."""
        encoded = cast("list[list[int]]", self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []
        lengths = torch.tensor([len(ids) for ids in encoded])
        padded = torch.zeros(len(encoded), max(1, *lengths.tolist()) if encoded else 1, dtype=torch.long)
        for row, ids in enumerate(encoded):
            padded[row, : len(ids)] = torch.tensor(ids)
        device = next(self.trunk.parameters()).device
        return padded.to(device), lengths.to(device)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        """(R, d) standardised reconstructions without gradient; a text that occurs several times is read once."""
        distinct = {text: None for text in texts}
        order = sorted(distinct, key=len)
        with evaluation_mode(self):
            parts = [self(*self.encode(order[i : i + self.batch_size])) for i in range(0, len(order), self.batch_size)]
        rows = {text: row for row, text in enumerate(order)}
        read = torch.cat(parts) if parts else torch.zeros(0, len(self.standardise.mean))
        return read[torch.tensor([rows[text] for text in texts], dtype=torch.long, device=read.device)]

    def reconstruct(self, texts: Sequence[str]) -> Tensor:
        """(R, d) reconstructions in the producer's units, without gradient."""
        return self.standardise.invert(self.read(texts))

    def fingerprint(self) -> str:
        """Content hash of weights, template and tokenizer."""
        return weights_hash(self, {"prefix": self.prefix_ids, "suffix": self.suffix_ids, "tokenizer": self.tokenizer.get_vocab()})


def build_reconstructor(
    settings: ReconstructorSettings, name: str, width: int, dtype: str, tokenizer: PreTrainedTokenizerBase
) -> TextReconstructor:
    """Load the model, keep its first layers without the final norm, and put an identity head on it.

    Args:
        settings: What to build.
        name: Its key in the config, for messages.
        width: d of the activations.
        dtype: Of the trunk; the head is float32.
        tokenizer: Shared with the verbaliser.

    Raises:
        ValueError: If the model has fewer layers than are to be kept, or too small a vocabulary for the tokenizer.
    """
    model = cast(Any, load_policy(settings.model, settings.revision, dtype, settings.seed, len(tokenizer), None))
    trunk = model.get_decoder()
    blocks = find_blocks(trunk)
    kept = len(blocks.modules) if settings.layers is None else settings.layers
    if kept > len(blocks.modules):
        raise ValueError(f"model.{name}.layers is {kept}, but the model has {len(blocks.modules)} layers.")
    if trunk.get_input_embeddings().num_embeddings < len(tokenizer):
        raise ValueError(f"model.{name}.model has fewer embeddings than the verbaliser's tokenizer has tokens; the two must share it.")
    setattr(trunk, blocks.prefix, nn.ModuleList(blocks.modules[:kept]))
    trunk.config.num_hidden_layers = kept
    for norm in FINAL_NORMS:
        if hasattr(trunk, norm):
            setattr(trunk, norm, nn.Identity())
    head = identity_linear(trunk.config.hidden_size, width, settings.bias)
    return TextReconstructor(trunk, head, Standardise(width), tokenizer, settings.prefix, settings.suffix)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without special tokens of the tokenizer's own."""
    return cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"])
