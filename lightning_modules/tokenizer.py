"""Tokenizers made on the spot, for models that are trained from scratch: byte-level BPE, or one token per word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_TOKEN = "<eos>"
PAD_TOKEN = "<pad>"
UNKNOWN_TOKEN = "<unk>"


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int, boundaries: Sequence[str] = ("\n",)) -> PreTrainedTokenizerFast:
    r"""Byte-level BPE whose merges may span spaces ("super-words").

    An ordinary tokenizer cuts text at spaces before it merges. This one cuts only *after* the given boundaries (and around digits, which
    stay single), so a frequent line of code becomes one or two tokens. On the embedded problems this makes prompts and completions about
    three times shorter, and time per step with them.

    Args:
        texts: Training texts; their order does not matter.
        vocab_size: Number of tokens, including 256 bytes and two special tokens.
        boundaries: Strings that a token may end with but never cross, e.g. ``["\n", ", then"]``.

    Returns:
        A tokenizer with ``<eos>`` and ``<pad>``. Any text can be encoded; decoding gives it back exactly.

    Raises:
        ValueError: If ``vocab_size`` leaves no room for merges.
    """
    if vocab_size <= 258:
        raise ValueError(f"vocab_size must exceed 258 (256 bytes and 2 special tokens), got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(_escape(boundary)), behavior="merged_with_previous") for boundary in boundaries]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [*splits, pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_TOKEN, pad_token=PAD_TOKEN, clean_up_tokenization_spaces=False, padding_side="left"
    )


def train_word_tokenizer(texts: Iterable[str], markers: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token per word, words being separated by blanks. For worlds with a closed vocabulary.

    Args:
        texts: Training texts; their order does not matter.
        markers: Further special tokens, e.g. the place where an activation goes.

    Returns:
        A tokenizer with ``<eos>``, ``<pad>``, ``<unk>`` (any word that the texts do not hold) and the markers.
    """
    words = sorted({word for text in texts for word in text.split()})
    special = [PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN, *markers]
    vocabulary = {word: i for i, word in enumerate([*special, *(word for word in words if word not in special)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        additional_special_tokens=list(markers),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def train_tokenizer(texts: Iterable[str], kind: str = "bpe", **settings: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of ``kind`` ``bpe`` (:func:`train_bpe_tokenizer`) or ``words`` (:func:`train_word_tokenizer`).

    Raises:
        ValueError: For another kind.
    """
    makers = {"bpe": train_bpe_tokenizer, "words": train_word_tokenizer}
    if kind not in makers:
        raise ValueError(f"model.train_tokenizer.kind is {kind!r}; choose one of {', '.join(makers)}.")
    return makers[kind](texts, **settings)


def _escape(text: str) -> str:
    return "".join(f"\\{c}" if c in r".^$*+?{}[]\|()" else c for c in text)
