"""Problems, texts and scores: what policies are fed, and what they offer to whoever measures or steers them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

Chat: TypeAlias = list[dict[str, str]]
"""Chat messages, each ``{"role": ..., "content": ...}``."""


@runtime_checkable
class PromptRow(Protocol):
    """One problem as a policy sees it. Datamodules add whatever fields grading needs."""

    @property
    def id(self) -> str:
        """Stable name of the problem; sampling seeds and reports are keyed by it."""
        ...

    @property
    def prompt(self) -> str | Chat:
        """Raw text, or chat messages that the policy's chat template turns into text."""
        ...


@runtime_checkable
class PromptReserve(Protocol):
    """A sampler of training prompts that can name further ones for a window whose own teach nothing."""

    def further(self, step: int) -> list[int]:
        """All rows of its dataset in an order that is a function of the data's seed and the step alone, the same on every rank.

        Whoever needs further prompts takes the first of them that the window does not hold.
        """
        ...


@runtime_checkable
class PromptPreview(Protocol):
    """A sampler of training prompts that can say what comes next, so that its completions can be sampled beforehand."""

    def upcoming(self) -> list[int]:
        """This rank's rows of its next batch, beyond the end of an epoch too. Nothing is taken: that batch comes as it would have."""
        ...


@dataclass(frozen=True, slots=True)
class Example:
    """One demonstration for supervised fine-tuning.

    Attributes:
        id: Stable name.
        prompt: Raw text, or chat messages, as in :class:`PromptRow`.
        completion: The text to learn.
    """

    id: str
    prompt: str | Chat
    completion: str


@dataclass(frozen=True, slots=True)
class ContrastPair:
    """One prompt with a completion that shows the concept and one that does not.

    Attributes:
        prompt: Prompt text or chat messages, as in :class:`PromptRow`.
        concept: Completion text that shows the unwanted behaviour (a hack).
        clean: Completion text that does not.
    """

    prompt: str | Chat
    concept: str
    clean: str


@runtime_checkable
class PairSource(Protocol):
    """A datamodule that can make contrastive pairs for its own task."""

    def contrast_pairs(self, n: int, seed: int) -> list[ContrastPair]:
        """``n`` pairs, a function of ``seed`` alone."""
        ...


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt and a completion in token ids (the completion includes its end token when it has one)."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


@runtime_checkable
class SequenceScorer(Protocol):
    """A module that can score token sequences under its current weights. Callbacks need no more of a policy."""

    def encode(self, prompt: str | Chat, completion: str) -> TokenSequence:
        """Tokenise a pair of texts as training would, end token included."""
        ...

    def completion_log_probs(self, sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
        """Differentiable log-probabilities and their mask, both (B, T) over completion tokens, padding 0."""
        ...

    def completion_states(self, sequences: Sequence[TokenSequence], layer: int) -> tuple[Tensor, Tensor]:
        """Residual-stream states after decoder layer ``layer`` (B, T, d) and their completion mask (B, T), without gradient."""
        ...


@runtime_checkable
class Completer(Protocol):
    """A module that can complete prompts under its current weights."""

    def complete(self, prompts: Sequence[str | Chat], n: int, seed: int, greedy: bool = False) -> list[list[str]]:
        """``n`` completions of every prompt; a function of prompt, seed and weights."""
        ...
