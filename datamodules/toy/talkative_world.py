"""A small world whose documents can be described truthfully: the toy system of talkative autoencoders.

A document is about one of eight topics, in one of four moods, and has a main and a second character. Its sentences read
``NAME [conj] VERB the ADJ NOUN [in the PLACE] .``; verbs, nouns and places depend on the topic, adjectives on the mood. So the state of a
language model after a word is about that word, and about facts that the grammar knows. A caption lists such facts, one word each.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from theodolite.protocols import Example
from theodolite.seeds import derive_seed

TOPICS: dict[str, tuple[str, str, str]] = {
    "sea": ("sails steers anchors floats dives fishes", "boat sail rope wave net gull shell mast", "harbour bay lagoon cove reef"),
    "farm": ("ploughs feeds milks mows herds sows", "cow barn fence goat field plough hen tractor", "meadow stable yard orchard pasture"),
    "kitchen": ("bakes stirs boils fries tastes chops", "soup bread pan knife onion pie spoon oven", "pantry cellar bistro canteen larder"),
    "school": (
        "teaches reads writes learns studies draws",
        "book pencil lesson map desk exam chalk globe",
        "classroom library hall lab attic",
    ),
    "space": (
        "orbits launches lands drifts scans docks",
        "rocket star probe planet comet antenna moon capsule",
        "hangar crater base dome void",
    ),
    "forest": ("hikes climbs camps gathers tracks hides", "tree fox owl moss root trail bear acorn", "glade cave ridge swamp grove"),
    "city": ("drives builds paints sells parks waits", "bus tower bridge shop sign lamp taxi wall", "square alley station market plaza"),
    "music": ("sings plays hums tunes dances claps", "drum flute song harp choir piano verse bell", "stage theatre studio tent club"),
}
"""By topic: verbs, nouns, places."""

MOODS: dict[str, str] = {
    "happy": "bright merry lovely sunny golden",
    "gloomy": "dark broken cold lonely grey",
    "angry": "rough harsh loud fierce bitter",
    "calm": "quiet soft gentle slow still",
}
"""By mood: adjectives."""

NAMES = [
    "anna",
    "bruno",
    "clara",
    "dario",
    "elena",
    "felix",
    "greta",
    "hugo",
    "ines",
    "jonas",
    "karla",
    "leon",
    "mira",
    "nils",
    "olga",
    "paul",
    "quinn",
    "rosa",
    "sven",
    "tilda",
    "uma",
    "victor",
    "wanda",
    "yusuf",
]
CONJUNCTIONS = ["then", "often", "soon", "now"]
ORDINALS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
MAX_LENGTH = 60
FIELDS = ("word", "previous", "topic", "character", "mood", "sentence")
"""What a caption can say, in this order: the word at the position, the one before it, the document's topic, the sentence's character,
the document's mood, the sentence's number."""


@dataclass(frozen=True, slots=True)
class ToyDocument:
    """A document and what is true of each of its words.

    Attributes:
        words: The words, in order.
        facts: By word: one value per entry of :data:`FIELDS`.
    """

    words: tuple[str, ...]
    facts: tuple[tuple[str, ...], ...]


class ToyWorld:
    """Documents by number, a function of ``(seed, number)`` alone.

    Args:
        seed: Names an unlimited sequence of documents.
        length: Words per document; the last sentence may be cut off.

    Raises:
        ValueError: If the length is more than ten sentences always have.
    """

    def __init__(self, seed: int = 0, length: int = 40) -> None:
        if not 1 <= length <= MAX_LENGTH:
            raise ValueError(f"A toy document has 1 to {MAX_LENGTH} words, got length {length}.")
        self.seed, self.length = seed, length

    def document(self, number: int) -> ToyDocument:
        """The ``number``-th document."""
        return _document(self.seed, self.length, number)

    def caption(self, number: int, position: int, fields: Sequence[str]) -> str:
        """The facts of one word of one document, blank between them."""
        facts: dict[str, str] = dict(zip(FIELDS, _document(self.seed, self.length, number).facts[position], strict=True))
        return " ".join(facts[field] for field in fields)

    def identity(self) -> dict[str, Any]:
        """What decides the documents."""
        return {"kind": "toy world", "version": 1, "seed": self.seed, "length": self.length}


def vocabulary() -> list[str]:
    """Every word that a document or a caption can hold."""
    topical = [word for lists in TOPICS.values() for text in lists for word in text.split()]
    moody = [word for text in MOODS.values() for word in text.split()]
    return sorted({*topical, *moody, *TOPICS, *MOODS, *NAMES, *CONJUNCTIONS, *ORDINALS, "the", "in", "."})


@functools.lru_cache(maxsize=16384)
def _document(seed: int, length: int, number: int) -> ToyDocument:
    rng = random.Random(derive_seed("toy world", seed, number))
    topic, mood, (main, second) = rng.choice(list(TOPICS)), rng.choice(list(MOODS)), rng.sample(NAMES, 2)
    words: list[str] = []
    facts: list[tuple[str, ...]] = []
    for sentence in ORDINALS:
        character = main if rng.random() < 0.7 else second
        for word in _sentence(rng, character, topic, mood):
            facts.append((word, words[-1] if words else ".", topic, character, mood, sentence))
            words.append(word)
    return ToyDocument(tuple(words[:length]), tuple(facts[:length]))


def _sentence(rng: random.Random, character: str, topic: str, mood: str) -> Iterator[str]:
    verbs, nouns, places = (text.split() for text in TOPICS[topic])
    yield character
    if rng.random() < 0.5:
        yield rng.choice(CONJUNCTIONS)
    yield from (rng.choice(verbs), "the", rng.choice(MOODS[mood].split()), rng.choice(nouns))
    if rng.random() < 0.5:
        yield from ("in", "the", rng.choice(places))
    yield "."


def corpus_example(world: ToyWorld, number: int) -> Example:
    """A document as a demonstration without prompt, to train a language model on."""
    return Example(f"toy-{world.seed}-{number}", "", " ".join(world.document(number).words))
