"""Activations made of known sparse features, as a datamodule of the form that transcoders are trained on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from theodolite.datamodules.samplers import DistributedBatchSampler


def feature_pairs(tokens: int, features: int, d_in: int, d_out: int, seed: int, dictionary_seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs (N, d_in), targets (N, d_out) and the two dictionaries (F, d) of unit rows; the same features with the same dictionary seed.

    Feature i is active with a probability that falls with i, so that a nested prefix has something to prefer.
    """
    made = torch.Generator().manual_seed(dictionary_seed)
    source, image = (normalize(torch.randn(features, d, generator=made), dim=1) for d in (d_in, d_out))
    drawn = torch.Generator().manual_seed(seed)
    probability = 0.25 / (1 + torch.arange(features) / 4)
    active = torch.rand(tokens, features, generator=drawn) < probability
    amounts = active * (0.5 + torch.rand(tokens, features, generator=drawn))
    return amounts @ source, amounts @ image, source, image


class Pairs(Dataset):
    def __init__(self, inputs: Tensor, target: Tensor) -> None:
        self.inputs, self.target = inputs, target

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: Any) -> dict[str, Tensor]:
        return {"input": self.inputs[rows], "target": self.target[rows], "position": torch.tensor(rows, dtype=torch.int64) % 8}


class FeatureData(LightningDataModule):
    """Batches of ``global_batch_size`` tokens, each rank's share of them.

    Args:
        tokens: Tokens to train on.
        features: Ground-truth features.
        d_in: Width of the input.
        d_out: Width of the target; null = the input itself is the target.
        global_batch_size: Tokens per step over all ranks.
    """

    def __init__(
        self, tokens: int = 2048, features: int = 12, d_in: int = 16, d_out: int | None = None, global_batch_size: int = 64
    ) -> None:
        super().__init__()
        self.global_batch_size = global_batch_size
        self.input_width, self.target_width = d_in, d_out or d_in
        self.parts = [self._part(tokens, features, d_in, d_out, seed) for seed in (1, 2)]

    @staticmethod
    def _part(tokens: int, features: int, d_in: int, d_out: int | None, seed: int) -> Pairs:
        inputs, target, _, _ = feature_pairs(tokens, features, d_in, d_out or d_in, seed)
        return Pairs(inputs, inputs if d_out is None else target)

    def _loader(self, part: Pairs, shuffle: bool) -> StatefulDataLoader:
        trainer: Any = self.trainer
        ranks, rank = trainer.world_size, trainer.global_rank
        sampler = DistributedBatchSampler(len(part), self.global_batch_size, ranks, rank, shuffle=shuffle, drop_last=shuffle)
        # a generator of its own: loaders draw a seed from the global one
        return StatefulDataLoader(part, batch_size=None, sampler=sampler, generator=torch.Generator())

    def train_dataloader(self) -> StatefulDataLoader:
        return self._loader(self.parts[0], shuffle=True)

    def val_dataloader(self) -> StatefulDataLoader:
        return self._loader(self.parts[1], shuffle=False)

    test_dataloader = val_dataloader


class KillAfter(Callback):
    """Kills the process, hard, before the given training batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


class Witness(Callback):
    """Writes all weights and buffers when training ends."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().contiguous().clone() for name, tensor in pl_module.state_dict().items()}
        save_file(state, self.folder / f"weights-{trainer.global_rank}.safetensors")
