"""A talkative autoencoder of a few lines, whose texts are digits drawn from the activation, and a table of activations in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from theodolite.protocols import ActivationRows
from theodolite.seeds import derive_seed

WIDTH, LETTERS = 6, "abcdefgh"


class Table:
    """Activations with a part per document; an ``ActivationTable``."""

    def __init__(self, rows: int = 40, per_document: int = 2, name: str = "first") -> None:
        draw = torch.Generator().manual_seed(derive_seed("table", name))
        shared = torch.randn(1000, WIDTH, generator=draw).repeat_interleave(per_document, 0)
        self.activations = (shared + torch.randn(len(shared), WIDTH, generator=draw))[:rows] * torch.arange(1, WIDTH + 1)
        self.key: Mapping[str, Any] = {"table": name, "per_document": per_document}
        self.per_document = per_document

    def __len__(self) -> int:
        return len(self.activations)

    def rows(self, indices: Sequence[int]) -> ActivationRows:
        documents = tuple(f"d{index // self.per_document}" for index in indices)
        ids = tuple(f"{document}:{index}" for document, index in zip(documents, indices, strict=True))
        return ActivationRows(ids, documents, self.activations[list(indices)], tuple(f"context of {index}" for index in indices))


class Reader(torch.nn.Module):
    """Mean vector of a text's letters."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights: Tensor
        self.register_buffer("weights", weights.clone())
        self.texts_read = 0

    def reconstruct(self, texts: Sequence[str]) -> Tensor:
        self.texts_read += len(texts)
        assert all(texts), "an empty text must never reach a reconstructor"
        letters = torch.stack([torch.bincount(torch.tensor([LETTERS.index(c) for c in t]), minlength=len(LETTERS)) for t in texts])
        return (letters / letters.sum(1, keepdim=True)).float() @ self.weights

    def fingerprint(self) -> str:
        return hashlib.sha256(self.weights.numpy().tobytes()).hexdigest()


class TinyDescriber(pl.LightningModule):
    """Draws each letter by how well its vector fits the activation; some candidates are empty."""

    def __init__(self, seed: int = 0, empty_share: float = 0.0, max_new_tokens: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        draw = torch.Generator().manual_seed(seed)
        vectors = torch.randn(len(LETTERS), WIDTH, generator=draw) * torch.arange(1, WIDTH + 1) * 1.5
        self.reader, self.other = Reader(vectors), Reader(vectors + torch.randn(vectors.shape, generator=draw))
        self.empty_share, self.calls, self.drawn, self.largest_call = empty_share, 0, 0, 0

    @property
    def reconstructors(self) -> Mapping[str, Reader]:
        return {"in_loop": self.reader, "held_out": self.other}

    def fingerprint(self) -> str:
        return f"{self.reader.fingerprint()} {self.empty_share}"

    def describe(
        self, activations: Tensor, ids: Sequence[str], candidates: range, temperature: float, max_new_tokens: int, seed: int
    ) -> list[list[str]]:
        self.calls += 1
        self.drawn += len(ids) * len(candidates)
        self.largest_call = max(self.largest_call, len(ids) * len(candidates))
        logits = activations @ self.reader.weights.T / 8
        texts: list[list[str]] = []
        for row, name in zip(logits, ids, strict=True):
            if temperature == 0:
                texts.append([LETTERS[int(row.argmax())] * max_new_tokens for _ in candidates])
                continue
            cumulative = torch.softmax(row.double() / temperature, 0).cumsum(0).numpy()
            texts.append([self._one(cumulative, name, candidate, max_new_tokens, seed) for candidate in candidates])
        return texts

    def _one(self, cumulative: np.ndarray, name: str, candidate: int, length: int, seed: int) -> str:
        draw = np.random.Generator(np.random.Philox(key=derive_seed("describe", seed, name, candidate))).random(length + 1)
        if draw[0] < self.empty_share:
            return ""
        return "".join(LETTERS[min(int(np.searchsorted(cumulative, u, side="right")), len(LETTERS) - 1)] for u in draw[1:])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class TableData(pl.LightningDataModule):
    """A table as both splits."""

    def __init__(self, rows: int = 40, per_document: int = 2, name: str = "first", checkpoint: list[str] | None = None) -> None:
        super().__init__()
        self.whole = Table(rows, per_document, name)
        self.checkpoints = checkpoint or []

    def table(self, split: str) -> Table:
        assert split in ("test", "validation")
        return self.whole

    def test_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(2, 1))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(2, 1))  # type: ignore[arg-type]
