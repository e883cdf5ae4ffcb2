"""Rows of activation banks for training and measuring talkative autoencoders.

::

    data:
      class_path: theodolite.datamodules.activations.bank_datamodule.ActivationBankDataModule
      init_args:
        model: google/gemma-2-2b
        site: resid_post.20
        documents: {class_path: theodolite.datamodules.activations.documents.HubDocuments, init_args: {dataset: org/corpus}}
        test_rows: 10000
        checkpoint: [runs/sft/last.ckpt, runs/grpo/last.ckpt]
"""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from theodolite.batch_arithmetic import split_batch
from theodolite.protocols import ActivationRows, ActivationTable
from theodolite.seeds import run_seed

from ..samplers import DistributedBatchSampler
from .bank import ActivationBank
from .bank_producer import ActivationProducer
from .documents import SPLITS, DocumentSource, DocumentSplit, FileDocuments
from .positions import PositionPolicy

EXPORTED = "talkative.json"
"""A folder with this file holds exported weights."""


class TableDataset(Dataset):
    """A table as a dataset that takes lists of row numbers."""

    def __init__(self, table: ActivationTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, rows: Sequence[int]) -> ActivationRows:
        return self.table.rows(rows)  # an empty list is an empty batch: a rank that has run out of rows


class ActivationBankDataModule(LightningDataModule):
    """Activation banks of three document-disjoint splits, and which checkpoints to measure on them.

    Only the splits that a stage needs are computed: ``fit`` builds train and validation, ``test`` only test. A bank that is complete on
    disk is read without loading the model.

    Args:
        model: Hub id or folder of the model whose activations are read.
        site: Where, for example ``resid_post.20``.
        documents: A ``.jsonl`` or ``.txt`` file, or any :class:`DocumentSource`.
        revision: Hub revision of the model.
        dtype: Of the model's weights: ``float32``, ``bfloat16`` or ``float16``.
        bank_dtype: In which activations are stored.
        max_tokens: Documents are cut to this many tokens.
        special_tokens: Let the tokenizer add its own, as the model was trained.
        position_strategy: ``random`` or ``midpoint``.
        num_positions: Most rows per document.
        min_position: First position that may become a row.
        position_seed: Of ``random`` positions.
        validation_share: Share of documents for validation.
        test_share: Share of documents for the test; 1 = measure on all documents.
        split_seed: Of the hash that splits documents.
        train_rows: Rows of the training split; null = all. More can be added later, here and below.
        eval_rows: Rows of the validation split.
        test_rows: Rows of the test split.
        max_norm: Leave out rows with a larger norm; they are counted and reported. null = keep all.
        cache_dir: Folder of banks, shared by runs.
        load_store: Read from and add to ``cache_dir``; false = compute the bank afresh in the run's own folder.
        extraction_batch_size: Documents per forward pass on one rank; halved where memory runs out.
        rows_per_shard: Of a new bank.
        global_batch_size: Rows per training step over all ranks.
        eval_batch_size: Rows per evaluation batch over all ranks.
        checkpoint: What best-of-K measures: checkpoint files, or folders of exported weights, of the talkative module; patterns allowed.
            null = the weights that the run has.
        seed: Of the order of training rows; null = the run's ``seed_everything``.

    Raises:
        ValueError: For settings that cannot work.
    """

    def __init__(
        self,
        model: str,
        site: str,
        documents: str | DocumentSource,
        revision: str | None = None,
        dtype: str = "float32",
        bank_dtype: str = "float32",
        max_tokens: int = 128,
        special_tokens: bool = True,
        position_strategy: str = "random",
        num_positions: int = 1,
        min_position: int = 8,
        position_seed: int = 0,
        validation_share: float = 0.05,
        test_share: float = 0.05,
        split_seed: int = 0,
        train_rows: int | None = None,
        eval_rows: int | None = 256,
        test_rows: int | None = 1024,
        max_norm: float | None = None,
        cache_dir: str = "runs/activation_banks",
        load_store: bool = True,
        extraction_batch_size: int = 8,
        rows_per_shard: int = 1024,
        global_batch_size: int = 64,
        eval_batch_size: int = 256,
        checkpoint: str | list[str] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.producer = ActivationProducer(model, site, revision, dtype, max_tokens, special_tokens)
        self.source = FileDocuments(documents) if isinstance(documents, str) else documents
        self.policy = PositionPolicy(position_strategy, num_positions, min_position, position_seed)
        self.split = DocumentSplit(validation_share, test_share, split_seed)
        self.limits = {"train": train_rows, "validation": eval_rows, "test": test_rows}
        self.max_norm, self.bank_dtype, self.cache_dir, self.load_store = max_norm, bank_dtype, Path(cache_dir), load_store
        self.extraction_batch_size, self.rows_per_shard = extraction_batch_size, rows_per_shard
        self.global_batch_size, self.eval_batch_size, self.seed = global_batch_size, eval_batch_size, run_seed(seed)
        self.checkpoints = checkpoint_files(checkpoint)
        self._banks: dict[str, ActivationBank] = {}
        for name in SPLITS:
            self._bank(name, self.cache_dir)  # refuse bad settings before anything is loaded

    @property
    def width(self) -> int:
        """Entries of one activation."""
        return self.producer.width

    @property
    def provenance(self) -> dict[str, Any]:
        """Keys of the banks in use and the rows left out for their norm, for the manifest."""
        return {"banks": {name: {**bank.key, "rows": len(bank), "left_out": bank.left_out} for name, bank in self._banks.items()}}

    def setup(self, stage: str) -> None:
        """Build or open the banks of the stage.

        Raises:
            ValueError: If a global batch does not split over the ranks.
        """
        for size in (self.global_batch_size, self.eval_batch_size):
            split_batch(size, 1 if self.trainer is None else self.trainer.world_size)
        for name in {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage, ("test",)):
            self.table(name)

    def table(self, split: str) -> ActivationBank:
        """See :class:`~theodolite.protocols.ActivationTables`."""
        if split not in self._banks:
            trainer = self.trainer
            root = self.cache_dir if self.load_store or trainer is None else Path(trainer.default_root_dir) / "banks"
            bank = self._bank(split, root)
            bank.build("cpu" if trainer is None else trainer.strategy.root_device)
            self._banks[split] = bank
        return self._banks[split]

    def statistics(self, rows: int = 8192) -> tuple[Tensor, Tensor]:
        """Mean (d,) and one scale of the first training rows: with them standardised activations have zero mean and unit variance.

        Args:
            rows: How many rows to look at.
        """
        table = self.table("train")
        activations = table.rows(range(min(rows, len(table)))).activations.double()
        mean = activations.mean(dim=0)
        return mean.float(), (activations - mean).square().mean().sqrt().float()

    def dataset(self, table: ActivationTable) -> Dataset:
        """What loaders read: lists of row numbers become rows. A subclass may put captions in."""
        return TableDataset(table)

    def train_dataloader(self) -> StatefulDataLoader:
        """Shuffled global batches; a short last one is left out of the epoch."""
        return self._loader("train", self.global_batch_size, training=True)

    def val_dataloader(self) -> StatefulDataLoader:
        """All validation rows, each once over all ranks."""
        return self._loader("validation", self.eval_batch_size)

    def test_dataloader(self) -> StatefulDataLoader:
        """All test rows, each once over all ranks."""
        return self._loader("test", self.eval_batch_size)

    def _bank(self, name: str, root: Path) -> ActivationBank:
        return ActivationBank(
            self.producer,
            self.source,
            self.policy,
            self.split,
            name,
            root,
            self.limits[name],
            self.max_norm,
            self.bank_dtype,
            self.extraction_batch_size,
            self.rows_per_shard,
        )

    def _loader(self, name: str, batch_size: int, training: bool = False) -> StatefulDataLoader:
        ranks, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        table = self.table(name)
        sampler = DistributedBatchSampler(len(table), batch_size, ranks, rank, shuffle=training, seed=self.seed, drop_last=training)
        return StatefulDataLoader(self.dataset(table), batch_size=None, sampler=sampler, num_workers=0, collate_fn=_as_is)


def checkpoint_files(checkpoint: str | list[str] | None) -> list[str]:
    """Files that names and patterns stand for, each pattern's in alphabetical order.

    Raises:
        ValueError: If a name or pattern stands for nothing, or for a folder that is no export (which of its files?).
    """
    files: list[str] = []
    for pattern in [checkpoint] if isinstance(checkpoint, str) else checkpoint or []:
        found = [pattern] if Path(pattern).exists() else sorted(glob(pattern, recursive=True))
        if not found:
            raise ValueError(f"data.checkpoint: there is no checkpoint {pattern!r}.")
        unclear = [name for name in found if Path(name).is_dir() and not (Path(name) / EXPORTED).is_file()]
        if unclear:
            raise ValueError(f"data.checkpoint: the folder {unclear[0]!r} holds no {EXPORTED}; name a checkpoint file in it.")
        files += [name for name in found if name not in files]
    return files


def _as_is(batch: Any) -> Any:
    return batch
