"""Further corpora: strings in a config, a dataset saved on disk, and English-like text made on the spot.

Files and hub datasets are in :mod:`theodolite.datamodules.activations.documents`. A corpus that cannot be read is an error; nothing is
ever replaced by another corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from theodolite.provenance import content_hash
from theodolite.seeds import derive_seed

from ..activations.documents import Document


class StringDocuments:
    """Texts given in the config or in Python.

    Args:
        texts: The documents.

    Raises:
        ValueError: There is none.
    """

    def __init__(self, texts: list[str]) -> None:
        if not texts:
            raise ValueError("StringDocuments needs at least one text.")
        self.texts = texts

    def identity(self) -> dict[str, Any]:
        """Hash of the texts."""
        return {"kind": "strings", "sha256": content_hash(self.texts)}

    def __iter__(self) -> Iterator[Document]:
        """The texts, named by their number."""
        for number, text in enumerate(self.texts):
            yield Document(str(number), text)


class SavedDatasetDocuments:
    """A split of a dataset that ``datasets`` saved with ``save_to_disk``.

    Args:
        folder: Of a ``Dataset``, or of a ``DatasetDict`` with ``split``.
        split: Which one of a ``DatasetDict``.
        text_field: Column of the text.

    Raises:
        ValueError: There is no such dataset, split or column.
    """

    def __init__(self, folder: str, split: str | None = None, text_field: str = "text") -> None:
        from datasets import DatasetDict, load_from_disk

        if not Path(folder).is_dir():
            raise ValueError(f"The dataset folder {folder!r} does not exist.")
        loaded = load_from_disk(folder)
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise ValueError(f"{folder} has the splits {sorted(loaded)}, not {split!r}.")
            loaded = loaded[split]
        if text_field not in loaded.column_names:
            raise ValueError(f"{folder} has the columns {loaded.column_names}, not {text_field!r}.")
        self.rows, self.text_field = loaded, text_field

    def identity(self) -> dict[str, Any]:
        """The dataset's own fingerprint and the column."""
        return {"kind": "saved dataset", "fingerprint": self.rows._fingerprint, "text_field": self.text_field}

    def __iter__(self) -> Iterator[Document]:
        """Rows in order, named by their number."""
        for number in range(len(self.rows)):
            yield Document(str(number), str(self.rows[number][self.text_field]))


class SyntheticEnglish:
    """English-like documents: a small grammar with topics, agreement and repeated names, so that context predicts words.

    Each document is about one of a few topics and two named people. There is enough structure for a small language model to learn
    (spelling, number agreement, who is who), and no download.

    Args:
        documents: How many.
        sentences: Per document.
        seed: Of the texts.

    Raises:
        ValueError: Numbers below 1.
    """

    def __init__(self, documents: int = 10000, sentences: int = 12, seed: int = 0) -> None:
        if min(documents, sentences) < 1:
            raise ValueError(f"documents={documents} and sentences={sentences} must be at least 1.")
        self.documents, self.sentences, self.seed = documents, sentences, seed

    def identity(self) -> dict[str, Any]:
        """The settings and the grammar."""
        grammar = content_hash([TOPICS, PEOPLE, FRAMES, ADJECTIVES])
        return {"kind": "synthetic english", "grammar": grammar, "sentences": self.sentences, "seed": self.seed}

    def __iter__(self) -> Iterator[Document]:
        """The documents, each a function of its number alone."""
        for number in range(self.documents):
            yield Document(str(number), self.text(number))

    def text(self, number: int) -> str:
        """Document ``number``."""
        generator = torch.Generator().manual_seed(derive_seed("synthetic english", self.seed, number))

        def choose(options: Sequence[Any]) -> Any:
            return options[int(torch.randint(len(options), (), generator=generator))]

        topic = choose(sorted(TOPICS))
        places, things, verbs = TOPICS[topic]
        first, pronoun = choose(PEOPLE)
        second, _ = choose([person for person in PEOPLE if person[0] != first])
        place = choose(places)
        sentences = []
        for _ in range(self.sentences):
            thing, verb = choose(things), choose(verbs)
            number_of = choose(("one", "two", "three", "four"))
            things_there = thing if number_of == "one" else thing + "s"
            words = {
                "first": first, "second": second, "he": pronoun, "place": place, "thing": thing, "verb": verb, "n": number_of,
                "things": things_there, "is": "is" if number_of == "one" else "are", "adjective": choose(ADJECTIVES),
            }  # fmt: skip
            sentence = choose(FRAMES).format(**words)
            sentences.append(sentence[0].upper() + sentence[1:])
        return " ".join(sentences)


TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "farm": (("the barn", "the field"), ("horse", "goat", "cart", "fence", "apple"), ("feeds", "counts", "washes", "sells")),
    "harbour": (("the harbour", "the ship"), ("boat", "rope", "net", "lantern", "anchor"), ("mends", "paints", "loads", "ties")),
    "school": (("the school", "the library"), ("book", "pencil", "letter", "map"), ("reads", "borrows", "copies", "hides")),
    "kitchen": (("the kitchen", "the market"), ("onion", "pot", "plate", "spoon"), ("cooks", "cuts", "carries", "tastes")),
    "workshop": (("the workshop", "the mill"), ("hammer", "wheel", "table", "engine"), ("repairs", "builds", "lifts", "oils")),
}
"""Places, things (whose plural takes an s) and verbs by topic."""
PEOPLE = (("Anna", "she"), ("Boris", "he"), ("Clara", "she"), ("David", "he"), ("Emma", "she"), ("Felix", "he"), ("Greta", "she"))
ADJECTIVES = ("red", "small", "heavy", "broken", "new", "old", "wet", "round")
FRAMES = (
    "{first} {verb} the {adjective} {thing} in {place}.",
    "there {is} {n} {things} in {place}.",
    "{first} and {second} are in {place}.",
    "{second} sees that the {thing} is {adjective}.",
    "when {first} {verb} the {thing}, {he} thinks of {second}.",
    "{second} asks {first} for the {thing}.",
    "today {he} {verb} {n} {adjective} {things}.",
    "the {things} in {place} {is} {adjective}, says {first}.",
)
