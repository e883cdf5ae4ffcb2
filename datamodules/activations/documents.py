"""Documents for an activation bank: ids and texts in a fixed order, and what identifies the corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from theodolite.provenance import file_hash
from theodolite.seeds import derive_seed

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a name that is unique in its corpus."""

    id: str
    text: str


@runtime_checkable
class DocumentSource(Protocol):
    """A corpus. Iterating again gives the same documents in the same order."""

    def identity(self) -> dict[str, Any]:
        """Plain data that changes whenever a document does; part of a bank's key."""
        ...

    def __iter__(self) -> Iterator[Document]:
        """All documents."""
        ...


class FileDocuments:
    """Documents of a local file: ``.jsonl`` with one object per line, or ``.txt`` with one document per line (empty lines are none).

    Args:
        path: The file.
        text_field: Of a ``.jsonl`` object: its text.
        id_field: Of a ``.jsonl`` object: its id; null = the line's number.

    Raises:
        ValueError: If there is no such file, or it is of another kind.
    """

    def __init__(self, path: str, text_field: str = "text", id_field: str | None = None) -> None:
        self.path, self.text_field, self.id_field = Path(path), text_field, id_field
        if not self.path.is_file() or self.path.suffix not in (".jsonl", ".txt"):
            raise ValueError(f"Documents are read from a .jsonl or .txt file; {path!r} is none.")

    def identity(self) -> dict[str, Any]:
        """Hash of the file and the fields that are read; not where it lies."""
        return {"kind": "file", "sha256": file_hash(self.path), "text_field": self.text_field, "id_field": self.id_field}

    def __iter__(self) -> Iterator[Document]:
        """Documents in the order of their lines.

        Raises:
            ValueError: If a line lacks a field.
        """
        with open(self.path, encoding="utf-8") as file:
            for number, line in enumerate(file):
                if not line.strip():
                    continue
                if self.path.suffix == ".txt":
                    yield Document(str(number), line.rstrip("\n"))
                    continue
                row = json.loads(line)
                wanted = [self.text_field, *([self.id_field] if self.id_field else [])]
                if any(field not in row for field in wanted):
                    raise ValueError(f"Line {number + 1} of {self.path} needs the fields {wanted}, it has {sorted(row)}.")
                yield Document(str(row[self.id_field]) if self.id_field else str(number), str(row[self.text_field]))


class HubDocuments:
    """Documents of a Hugging Face dataset, pinned to a commit.

    Args:
        dataset: Hub id.
        split: Of the dataset.
        revision: Commit, branch or tag; the commit it stands for is part of the bank's key.
        name: Configuration of the dataset.
        text_field: Column of the text.
    """

    def __init__(
        self, dataset: str, split: str = "train", revision: str = "main", name: str | None = None, text_field: str = "text"
    ) -> None:
        self.dataset, self.split, self.revision, self.name, self.text_field = dataset, split, revision, name, text_field
        self._commit: str | None = None

    def identity(self) -> dict[str, Any]:
        """Dataset, commit, split and column."""
        if self._commit is None:
            from huggingface_hub import HfApi

            self._commit = HfApi().dataset_info(self.dataset, revision=self.revision).sha
        return {
            "kind": "hub", "dataset": self.dataset, "commit": self._commit, "name": self.name, "split": self.split,
            "text_field": self.text_field,
        }  # fmt: skip

    def __iter__(self) -> Iterator[Document]:
        """Rows in order, named by their number, streamed."""
        from datasets import load_dataset

        commit = self.identity()["commit"]
        rows = load_dataset(self.dataset, self.name, split=self.split, revision=commit, streaming=True)
        for number, row in enumerate(rows):
            yield Document(str(number), str(row[self.text_field]))


@dataclass(frozen=True, slots=True)
class DocumentSplit:
    """Which documents belong to which split: by a hash of their id, so that it depends on no other document.

    Attributes:
        validation_share: Share of documents for validation.
        test_share: Share of documents for the test; 1 = all.
        seed: Of the hash.
    """

    validation_share: float = 0.05
    test_share: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        if min(self.validation_share, self.test_share) < 0 or self.validation_share + self.test_share > 1:
            shares = f"{self.validation_share} and {self.test_share}"
            raise ValueError(f"validation_share and test_share must be at least 0 and at most 1 together, got {shares}.")

    def of(self, document: str) -> str:
        """The split of a document."""
        place = derive_seed("split", self.seed, document) / 2**63
        if place < self.test_share:
            return "test"
        return "validation" if place < self.test_share + self.validation_share else "train"
