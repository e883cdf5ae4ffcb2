"""Which token positions of a document become rows of an activation bank."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from theodolite.seeds import derive_seed

STRATEGIES = ("random", "midpoint")


@dataclass(frozen=True, slots=True)
class PositionPolicy:
    """Positions of one document, a function of the document's id and tokens alone: no rank, order or other document matters.

    The *window* of a document are its positions from ``min_position`` to its last token, without special tokens. A document whose window
    is empty (it is shorter than ``min_position + 1`` tokens, or all special) has no rows and is counted by its bank. A window with fewer
    positions than asked for gives all it has, each once.

    Attributes:
        strategy: ``random`` = without replacement from the window, keyed by seed and document; ``midpoint`` = its middle position.
        num_positions: Most rows per document; with ``random``, fewer are a subset of more.
        min_position: First position that may be taken, counted from 0 with special tokens: a state needs context to describe.
        seed: Of ``random``.
    """

    strategy: str = "random"
    num_positions: int = 1
    min_position: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no document could satisfy."""
        if self.strategy not in STRATEGIES:
            raise ValueError(f"The position strategy {self.strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}.")
        if self.num_positions < 1 or self.min_position < 0:
            raise ValueError(
                f"num_positions must be at least 1 and min_position at least 0, got {self.num_positions}, {self.min_position}."
            )
        if self.strategy == "midpoint" and self.num_positions != 1:
            raise ValueError(f"The midpoint of a document is one position: num_positions must be 1 with it, got {self.num_positions}.")

    def window(self, tokens: Sequence[int], special: Collection[int]) -> list[int]:
        """Positions that may be taken, ascending."""
        return [position for position in range(self.min_position, len(tokens)) if tokens[position] not in special]

    def positions(self, document: str, tokens: Sequence[int], special: Collection[int] = ()) -> list[int]:
        """The document's rows, ascending and distinct; empty where the window is.

        Args:
            document: Its id.
            tokens: Its token ids, cut to the longest the producer reads.
            special: Ids that never become a row (beginning of sequence, padding).
        """
        window = self.window(tokens, special)
        if not window:
            return []
        if self.strategy == "midpoint":
            return [window[(len(window) - 1) // 2]]
        generator = np.random.Generator(np.random.Philox(key=derive_seed("position", self.seed, document)))
        order = generator.permutation(len(window))[: self.num_positions]
        return sorted(window[index] for index in order.tolist())

    def as_dict(self) -> dict[str, Any]:
        """For keys and manifests."""
        return asdict(self)
