"""Packs documents into token rows of one length, with every choice explicit, and can be stopped and resumed at any row.

Rows are numbered from 0 in the order in which they are packed; a row's content depends on the corpus and the settings alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from ..activations.documents import Document
from .byte_tokenizer import TextTokenizer


@dataclass(frozen=True)  # without slots: jsonargparse reads defaults with vars()
class Packing:
    """How documents become rows.

    Attributes:
        length: Tokens per row.
        bos: Where a beginning-of-sequence token goes: before every ``row``, before every ``document``, or nowhere (``none``).
        separator: Put an end token between documents (``flow`` only).
        boundary: ``flow`` lets documents run on into the next row, several to a row (attention then sees across them); ``break`` gives
            every row one document only and pads its last row.
    """

    length: int = 128
    bos: Literal["row", "document", "none"] = "row"
    separator: bool = True
    boundary: Literal["flow", "break"] = "flow"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.length < 2:
            raise ValueError(f"packing.length is {self.length}; rows need at least 2 tokens.")
        if self.bos not in ("row", "document", "none") or self.boundary not in ("flow", "break"):
            raise ValueError(
                f"packing.bos={self.bos!r} must be row, document or none, and packing.boundary={self.boundary!r} flow or break."
            )


@dataclass(slots=True)
class TokenRow:
    """One packed row of T tokens.

    Attributes:
        number: Of the row in the stream.
        tokens: (T,) int64.
        documents: (T,) int64 number of each token's document in the stream; -1 for padding and a row's own beginning token.
        begins: (T,) bool, beginning-of-sequence tokens.
        separates: (T,) bool, end tokens between documents.
        attends: (T,) bool, everything but padding.
    """

    number: int
    tokens: Tensor
    documents: Tensor
    begins: Tensor
    separates: Tensor
    attends: Tensor


@dataclass(slots=True)
class _Pending:
    """Tokens that no row holds yet, with their document and what kind they are (0 text, 1 beginning, 2 separator)."""

    tokens: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)

    def add(self, tokens: list[int], document: int, kind: int) -> None:
        self.tokens += tokens
        self.documents += [document] * len(tokens)
        self.kinds += [kind] * len(tokens)

    def take(self, n: int) -> _Pending:
        taken = _Pending(self.tokens[:n], self.documents[:n], self.kinds[:n])
        self.tokens, self.documents, self.kinds = self.tokens[n:], self.documents[n:], self.kinds[n:]
        return taken


class PackedRows:
    """An iterator over :class:`TokenRow`.

    Args:
        documents: Makes an iterator over the corpus from its start; called again after a resume and, with ``repeat``, at its end.
        tokenizer: Encodes texts.
        packing: How.
        repeat: Start again when the corpus ends, without end; otherwise the rows end with it (with ``flow``, less than a row is lost).

    Raises:
        ValueError: The tokenizer lacks a token that ``packing`` asks for.
    """

    def __init__(
        self, documents: Callable[[], Iterator[Document]], tokenizer: TextTokenizer, packing: Packing, repeat: bool = False
    ) -> None:
        flow = packing.boundary == "flow"
        needed = {
            "bos_token_id": packing.bos != "none" and "packing.bos: none",
            "eos_token_id": flow and packing.separator and "packing.separator: false",
            "pad_token_id": not flow and "packing.boundary: flow",
        }
        for name, instead in needed.items():
            if instead and getattr(tokenizer, name) is None:
                raise ValueError(f"The tokenizer has no {name}, which the packing needs; use {instead}, or another tokenizer.")
        self.documents, self.tokenizer, self.packing, self.repeat = documents, tokenizer, packing, repeat
        self._pending, self._row = _Pending(), 0
        self._read, self._before = 0, 0  # documents read in this pass over the corpus, and in earlier passes
        self._corpus: Iterator[Document] | None = None

    def __iter__(self) -> Iterator[TokenRow]:
        """Rows from where it stands."""
        return self

    def __next__(self) -> TokenRow:
        """The next row."""
        packing = self.packing
        room = packing.length - (packing.bos == "row")
        if packing.boundary == "break":
            while not self._pending.tokens:
                self._add_document()
        else:
            while len(self._pending.tokens) < room:
                self._add_document()
        row = self._pending.take(room)
        if packing.bos == "row":
            begin = _Pending([_some(self.tokenizer.bos_token_id)], [-1], [1])
            row = _Pending(begin.tokens + row.tokens, begin.documents + row.documents, begin.kinds + row.kinds)
        self._row += 1
        return self._as_row(row, self._row - 1)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as plain data."""
        waiting = {name: list(getattr(self._pending, name)) for name in ("tokens", "documents", "kinds")}
        return {"read": self._read, "before": self._before, "row": self._row, **waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where ``state`` was taken; documents before it are skipped without being tokenised."""
        self._read, self._before, self._row = state["read"], state["before"], state["row"]
        self._pending = _Pending(list(state["tokens"]), list(state["documents"]), list(state["kinds"]))
        self._corpus = None

    def _add_document(self) -> None:
        text = self._next_document().text
        number = self._before + self._read - 1
        body = self.tokenizer.encode(text, add_special_tokens=False)
        if not body:
            return
        if self.packing.separator and self.packing.boundary == "flow" and number > 0:
            self._pending.add([_some(self.tokenizer.eos_token_id)], number, 2)
        if self.packing.bos == "document":
            self._pending.add([_some(self.tokenizer.bos_token_id)], number, 1)
        self._pending.add(body, number, 0)

    def _next_document(self) -> Document:
        if self._corpus is None:
            self._corpus = islice(self.documents(), self._read, None)
        found = next(self._corpus, None)
        if found is None:
            if not self.repeat:
                raise StopIteration
            if self._read == 0:
                raise ValueError("The corpus holds no document.")
            self._before, self._read = self._before + self._read, 0
            self._corpus = None
            return self._next_document()
        self._read += 1
        return found

    def _as_row(self, row: _Pending, number: int) -> TokenRow:
        padding = self.packing.length - len(row.tokens)
        pad = _some(self.tokenizer.pad_token_id) if padding else 0
        kinds = torch.tensor(row.kinds + [3] * padding)
        return TokenRow(
            number,
            torch.tensor(row.tokens + [pad] * padding),
            torch.tensor(row.documents + [-1] * padding),
            kinds == 1,
            kinds == 2,
            kinds != 3,
        )


def _some(token: int | None) -> int:
    assert token is not None, "checked by the constructor"
    return token
