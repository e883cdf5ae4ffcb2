"""One token per byte: a tokenizer that needs no training and no download, for models made on the spot."""

from __future__ import annotations

from typing import Protocol


class TextTokenizer(Protocol):
    """What packing needs of a tokenizer; those of ``transformers`` have it."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]:
        """Token ids of a text."""
        ...


class ByteTokenizer:
    """UTF-8 bytes, shifted past three special tokens.

    Attributes:
        vocab_size: 259.
    """

    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    vocab_size = 259

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """``bytes + 3``; special tokens are never added here."""
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        """The text, without special tokens; broken characters are shown as such."""
        return bytes(token - 3 for token in ids if token >= 3).decode(errors="replace")
