"""Talkative autoencoders: activations to texts and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Verbaliser(Protocol):
    """Turns activations into texts.

    Randomness is counter-based: the text of a (row id, candidate index, temperature, seed) depends on no other row, on no other candidate
    and on no batch or rank, up to float noise in the logits. So candidates can be drawn in any order and extended later.
    """

    def describe(
        self, activations: Tensor, ids: Sequence[str], candidates: range, temperature: float, max_new_tokens: int, seed: int
    ) -> list[list[str]]:
        """One text per row and candidate index.

        Args:
            activations: (R, d) in the producer's units.
            ids: R row ids; with the candidate index and the seed they name a random stream.
            candidates: Indices to draw, for example ``range(8, 16)`` after ``range(8)``.
            temperature: Divides the logits; 0 is greedy decoding (every candidate is then the same text).
            max_new_tokens: Longest text, end token included.
            seed: Of the run.

        Returns:
            R lists of ``len(candidates)`` texts; an empty text says that nothing usable was written.
        """
        ...

    def fingerprint(self) -> str:
        """Content hash of all that decides the texts: weights, prompt, tokenizer, how the activation is put in."""
        ...


@runtime_checkable
class Reconstructor(Protocol):
    """Turns texts back into activations."""

    def reconstruct(self, texts: Sequence[str]) -> Tensor:
        """(R, d) reconstructions in the producer's units, without gradient; each depends on its own text alone, up to float noise."""
        ...

    def fingerprint(self) -> str:
        """Content hash of all that decides the reconstructions."""
        ...


@runtime_checkable
class TalkativeAutoencoder(Verbaliser, Protocol):
    """A module that describes activations and has reconstructors to read the descriptions."""

    @property
    def reconstructors(self) -> Mapping[str, Reconstructor]:
        """By name. The first one selects among candidates; the others (held out, never seen in training) only score what it selected."""
        ...
        ...
