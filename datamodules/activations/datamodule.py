"""Pairs of activations made on the fly from text: what a transcoder or sparse autoencoder is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from theodolite.seeds import run_seed
from theodolite.sites import ActivationSite, parse_site

from ..text.packing import PackedRows, Packing, TokenRow
from .documents import Document, DocumentSource, DocumentSplit
from .frozen_model import FrozenModel
from .loaders import Background, HeldOutLoader, StreamLoader
from .paired_rows import DROPS, Drop, PairProducer
from .shuffled_lanes import ShuffledLanes


class ActivationDataModule(LightningDataModule):
    """Runs a language model on packed text and yields shuffled :class:`~theodolite.protocols.ActivationBatch` es of two of its sites.

    The same global batches on any number of ranks that divides ``lanes``, and after a resume.

    Args:
        model: Hub id, folder, or the fields of a ``transformers`` config for random weights.
        text: The corpus, for example ``HubDocuments`` or ``FileDocuments``.
        input_site: For example ``mlp_in.8``; TransformerLens names work too. See ``docs/sites.md``.
        target_site: Likewise; null = ``input_site`` (an autoencoder).
        global_batch_size: Rows (tokens that count) per step over all ranks; a multiple of ``lanes``.
        buffer_rows: Packed token rows that are mixed with one another, over all ranks; a multiple of twice ``lanes``.
        model_batch_rows: Packed token rows per forward pass on one rank; halved where memory runs out, without changing any batch.
        packing: How documents become token rows.
        drop: Positions that do not count: ``first`` of a row, ``begins`` (BOS), ``separators`` (end tokens between documents), ``padding``.
        validation_rows: Packed token rows of held-out documents; thresholds are calibrated on them too.
        test_rows: Packed token rows of other held-out documents, for the test alone; null = as many as for validation.
        validation_share: Share of the documents that are held out for validation, chosen by a hash of their ids.
        test_share: Likewise for the test.
        repeat: Read the corpus again when it ends; otherwise its end is an error.
        lanes: The numbers of ranks that are possible are its divisors.
        steps_per_epoch: Batches that Lightning calls an epoch.
        prefetch: Make the next rows in a thread while these are trained on.
        buffer_on_cpu: Keep the buffer in main memory instead of the model's device.
        revision: Hub revision of the model.
        dtype: Of the model's weights, and so of the activations.
        tokenizer: Hub id or folder, or ``bytes``; null = the model's own.
        seed: Of the order and of random weights; null = the run's ``seed_everything``.

    Raises:
        ValueError: Settings that cannot work, before any weights are loaded.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        text: DocumentSource,
        input_site: str,
        target_site: str | None = None,
        global_batch_size: int = 4096,
        buffer_rows: int = 4096,
        model_batch_rows: int = 32,
        packing: Packing = Packing(),  # noqa: B008  (frozen)
        drop: list[Drop] | None = None,
        validation_rows: int = 64,
        test_rows: int | None = None,
        validation_share: float = 0.02,
        test_share: float = 0.02,
        repeat: bool = False,
        lanes: int = 8,
        steps_per_epoch: int = 1000,
        prefetch: bool = True,
        buffer_on_cpu: bool = False,
        revision: str | None = None,
        dtype: str = "float32",
        tokenizer: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.seed = run_seed(seed)
        self.model = FrozenModel(model, revision, dtype, tokenizer, self.seed)
        self.text, self.packing, self.repeat = text, packing, repeat
        self.input_site: ActivationSite = parse_site(input_site)
        self.target_site: ActivationSite = parse_site(target_site or input_site)
        self.drop: list[Drop] = list(DROPS) if drop is None else drop  # type: ignore[arg-type]
        self.split = DocumentSplit(validation_share, test_share, self.seed)
        self.global_batch_size, self.buffer_rows, self.model_batch_rows = global_batch_size, buffer_rows, model_batch_rows
        self.validation_rows, self.test_rows = validation_rows, validation_rows if test_rows is None else test_rows
        self.lanes, self.steps_per_epoch = lanes, steps_per_epoch
        self.prefetch, self.buffer_on_cpu = prefetch, buffer_on_cpu
        self._held_out: dict[str, list[TokenRow]] = {}
        self._background: Background | None = None
        self._check()

    # ------------------------------------------------------------------ what modules may ask

    @property
    def input_width(self) -> int:
        """Of the source site, from the model's config."""
        return self.model.width

    @property
    def target_width(self) -> int:
        """Of the target site."""
        return self.model.width

    @property
    def producer(self) -> nn.Module:
        """The language model, in evaluation mode and without gradients."""
        return self.model.load(self._device())

    @property
    def buffer_bytes(self) -> int:
        """Largest size of one rank's buffer, about: the window, the next round, and what was given out and not yet taken."""
        sites = 1 if self.target_site == self.input_site else 2
        ranks = self.trainer.world_size if self.trainer is not None else 1
        item = torch.tensor([], dtype=getattr(torch, self.model.dtype)).element_size()
        return 2 * self.buffer_rows * self.packing.length * self.model.width * sites * item // ranks

    def held_out_tokens(self, sequences: int, split: str) -> Tensor:
        """(sequences, length) int64 token ids of the ``validation`` or ``test`` rows, the same on every rank.

        Raises:
            ValueError: There are not so many.
        """
        rows = self._held_out_rows(split)
        if sequences > len(rows):
            raise ValueError(f"{sequences} held-out rows were asked for, but data.{split}_rows is {len(rows)}.")
        return torch.stack([row.tokens for row in rows[:sequences]])

    # ------------------------------------------------------------------ Lightning

    def setup(self, stage: str) -> None:
        """Check sites against the model's depth and ranks against lanes; no weights are loaded yet.

        Raises:
            ValueError: The model has no such layer, or the ranks do not divide the lanes.
        """
        for site in (self.input_site, self.target_site):
            if site.layer >= self.model.layers:
                raise ValueError(f"{site} asks for layer {site.layer}, but the model has layers 0 to {self.model.layers - 1}.")
        self._packed("train")  # the tokenizer has what packing needs
        if self.lanes % self._world()[1]:
            raise ValueError(f"data.lanes={self.lanes} must be a multiple of the {self._world()[1]} ranks.")

    def train_dataloader(self) -> StreamLoader:
        """The shuffled stream."""
        rank, ranks = self._world()
        if self.prefetch and self._background is None:
            self._background = Background(self._device())
        lanes = ShuffledLanes(
            self._packed("train"), self._produce(), self.lanes, rank, ranks, self.buffer_rows, self.drop, self.seed, self._background
        )
        rank_zero_info(f"activations {self.input_site} -> {self.target_site}, buffer about {self.buffer_bytes / 2**30:.2f} GiB per rank")
        return StreamLoader(lanes, self.global_batch_size, self.steps_per_epoch)

    def val_dataloader(self) -> HeldOutLoader:
        """The validation rows, in order."""
        return self._held_out_loader("validation")

    def test_dataloader(self) -> HeldOutLoader:
        """The test rows, in order: other documents than those of validation, on which thresholds were calibrated."""
        return self._held_out_loader("test")

    def teardown(self, stage: str) -> None:
        """End the thread."""
        if self._background is not None:
            self._background.close()
            self._background = None

    # ------------------------------------------------------------------ parts

    def _check(self) -> None:
        numbers = {
            name: getattr(self, name)
            for name in ("global_batch_size", "buffer_rows", "model_batch_rows", "validation_rows", "test_rows", "lanes", "steps_per_epoch")
        }
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}.")
        if self.global_batch_size % self.lanes:
            near = max(1, round(self.global_batch_size / self.lanes)) * self.lanes
            raise ValueError(f"data.global_batch_size={self.global_batch_size} must be a multiple of data.lanes={self.lanes}; {near} is.")
        if self.buffer_rows % (2 * self.lanes):
            near = max(1, round(self.buffer_rows / (2 * self.lanes))) * 2 * self.lanes
            raise ValueError(f"data.buffer_rows={self.buffer_rows} must be a multiple of 2 x data.lanes={self.lanes}; {near} is.")
        if unknown := sorted({*self.drop} - {*DROPS}):
            raise ValueError(f"data.drop holds {unknown}; choose from {', '.join(DROPS)}.")

    def _documents(self, split: str) -> Iterator[Document]:
        return (document for document in self.text if self.split.of(document.id) == split)

    def _packed(self, split: str) -> PackedRows:
        return PackedRows(lambda: self._documents(split), self.model.tokenizer, self.packing, self.repeat and split == "train")

    def _held_out_rows(self, split: str) -> list[TokenRow]:
        if split not in self._held_out:
            wanted = {"validation": self.validation_rows, "test": self.test_rows}[split]
            rows = list(islice(self._packed(split), wanted))
            if len(rows) < wanted:
                raise ValueError(
                    f"The documents held out for {split} give {len(rows)} token rows, data.{split}_rows asks for {wanted}: "
                    f"give more text or a larger data.{split}_share."
                )
            self._held_out[split] = rows
        return self._held_out[split]

    def _held_out_loader(self, split: str) -> HeldOutLoader:
        rank, ranks = self._world()
        return HeldOutLoader(self._held_out_rows(split), self._produce(), self.model_batch_rows * ranks, rank, ranks)

    def _produce(self) -> PairProducer:
        keep_on = "cpu" if self.buffer_on_cpu else None
        return PairProducer(self.producer, (self.input_site, self.target_site), self.model_batch_rows, self.drop, keep_on)

    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")

    def _world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
