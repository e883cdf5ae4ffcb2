"""Captions as token ids that a verbaliser can be taught."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from .reconstructor import TextReconstructor


def caption_ids(reader: TextReconstructor, texts: Sequence[str], longest: int, fixed_length: bool) -> tuple[Tensor, Tensor]:
    """(B, T) token ids of texts to be learnt, the end token included where texts may end, and their mask.

    Args:
        reader: Whose tokenizer is used, and on whose device the ids are.
        texts: Captions.
        longest: Most tokens, or the number of all where ``fixed_length``.
        fixed_length: Texts never end by themselves.

    Raises:
        ValueError: If a text of fixed length has another length, or one is longer than ``longest``.
    """
    ids, lengths = reader.encode(texts)
    if not fixed_length:
        ids = pad(ids, (0, 1))
        ids[torch.arange(len(ids)), lengths] = cast(int, reader.tokenizer.eos_token_id)
        lengths = lengths + 1
    elif bool((lengths != longest).any()):
        wrong = int((lengths != longest).nonzero()[0])
        raise ValueError(f"The caption {texts[wrong]!r} has {int(lengths[wrong])} tokens, but fixed_length texts have {longest}.")
    if int(lengths.max()) > longest:
        wrong = int(lengths.argmax())
        raise ValueError(f"The caption {texts[wrong]!r} has {int(lengths[wrong])} tokens; model.max_new_tokens is {longest}.")
    return ids, (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).float()
