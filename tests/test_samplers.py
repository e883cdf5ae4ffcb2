"""Every row exactly once over the ranks, the same global batches for every world size, and an exact resume in the middle of an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from theodolite.datamodules.samplers import DistributedBatchSampler


class Rows(Dataset):
    """Gives back the indices it is asked for."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, indices: list[int]) -> list[int]:
        return list(indices)


def loader(sampler: DistributedBatchSampler) -> StatefulDataLoader:
    return StatefulDataLoader(Rows(sampler.num_examples), batch_size=None, sampler=sampler, num_workers=0, collate_fn=lambda batch: batch)


def global_batches(n: int, size: int, world: int, **kwargs) -> list[list[int]]:
    """Put the ranks' lists together by the documented slot ``rank + i * world``."""
    per_rank = [list(DistributedBatchSampler(n, size, world, rank, **kwargs)) for rank in range(world)]
    assert len({len(batches) for batches in per_rank}) == 1, "ranks disagree on the number of batches: collectives would hang"
    result = []
    for shares in zip(*per_rank, strict=True):
        slots = {rank + i * world: row for rank, share in enumerate(shares) for i, row in enumerate(share)}
        assert sorted(slots) == list(range(len(slots))), "slots have a hole"
        result.append([slots[slot] for slot in range(len(slots))])
    return result


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 29, 30, 31, 47, 61])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_index_occurs_exactly_once_over_ranks(world: int, n: int, shuffle: bool) -> None:
    batches = global_batches(n, 30, world, shuffle=shuffle)
    assert sorted(row for batch in batches for row in batch) == list(range(n))


def test_further_rows_are_a_permutation_that_depends_on_seed_and_step_alone() -> None:
    one = DistributedBatchSampler(30, 6, 3, 0, shuffle=True, seed=2)
    other = DistributedBatchSampler(30, 6, 3, 2, shuffle=True, seed=2)
    list(other)
    assert sorted(one.further(4)) == list(range(30))
    assert one.further(4) == other.further(4), "neither the rank nor what was dealt out before matters"
    assert one.further(4) != one.further(5)
    assert one.further(4) != DistributedBatchSampler(30, 6, seed=3).further(4)
    assert one.further(0) != one.order(0)


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("drop_last", [False, True])
def test_global_batches_do_not_depend_on_the_number_of_ranks(world: int, drop_last: bool) -> None:
    settings = {"shuffle": True, "seed": 3, "drop_last": drop_last}
    assert global_batches(107, 30, world, **settings) == global_batches(107, 30, 1, **settings)


def test_short_last_batch_leaves_some_ranks_an_empty_list() -> None:
    assert [list(DistributedBatchSampler(7, 6, 3, rank)) for rank in range(3)] == [[[0, 3], [6]], [[1, 4], []], [[2, 5], []]]


def test_drop_last_drops_only_the_short_batch() -> None:
    assert [len(batch) for batch in global_batches(31, 10, 2, drop_last=True)] == [10, 10, 10]


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = DistributedBatchSampler(50, 10, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(3)  # the global stream is of no account
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize(
    ("n", "size", "world", "message"), [(10, 7, 2, "6 or 8 would"), (0, 2, 1, "do not fill"), (10, 0, 1, "at least 1")]
)
def test_impossible_sizes_are_refused(n: int, size: int, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributedBatchSampler(n, size, world)


def test_an_epoch_without_a_full_batch_is_refused_where_short_batches_are_dropped() -> None:
    with pytest.raises(ValueError, match="do not fill a global batch of 8"):
        DistributedBatchSampler(7, 8, drop_last=True)


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_loader_resumes_in_the_middle_of_an_epoch(stop: int) -> None:
    def fresh(rank: int) -> StatefulDataLoader:
        return loader(DistributedBatchSampler(22, 4, 2, rank, shuffle=True, seed=1))

    whole = [list(fresh(rank)) for rank in range(2)]
    interrupted = fresh(0)
    batches = iter(interrupted)
    seen = [next(batches) for _ in range(stop)]
    state = interrupted.state_dict()  # rank 0's: the only one that a checkpoint keeps
    assert seen == whole[0][:stop]
    for rank in range(2):
        resumed = fresh(rank)
        resumed.load_state_dict(state)
        assert list(resumed) == whole[rank][stop:]
        assert len(list(resumed)) == 6, "the epoch after a resumed one is whole again"


def test_resume_works_with_another_number_of_ranks() -> None:
    interrupted = loader(DistributedBatchSampler(24, 4, 1, 0, shuffle=True))
    batches = iter(interrupted)
    next(batches)
    resumed = [loader(DistributedBatchSampler(24, 4, 2, rank, shuffle=True)) for rank in range(2)]
    for part in resumed:
        part.load_state_dict(interrupted.state_dict())
    shares = list(zip(*resumed, strict=True))
    assert [[first[0], second[0], first[1], second[1]] for first, second in shares] == list(batches)


@pytest.mark.parametrize("other", [{"num_examples": 21}, {"global_batch_size": 2}, {"seed": 9}])
def test_state_of_other_data_is_refused(other: dict[str, int]) -> None:
    settings: dict[str, Any] = {"num_examples": 20, "global_batch_size": 4, "seed": 0}
    state = DistributedBatchSampler(**settings).state_dict()
    changed: dict[str, Any] = settings | other
    with pytest.raises(ValueError, match=next(iter(other))):
        DistributedBatchSampler(**changed).load_state_dict(state)


class Recorder(pl.LightningModule):
    """Trains one weight and remembers the rows it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: list[int], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch)
        return self.weight * float(sum(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(directory: Path, max_steps: int, resume: Path | None = None, extra: pl.Callback | None = None) -> tuple[Recorder, pl.Trainer]:
    module, data = Recorder(), loader(DistributedBatchSampler(20, 4, shuffle=True, seed=2, drop_last=True))
    every_step = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        callbacks=[every_step, *([extra] if extra else [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return module, trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, Path]:
    directory = tmp_path_factory.mktemp("whole")
    return fit(directory, 17)[0], directory


def test_lightning_calls_set_epoch_so_that_epochs_differ(whole: tuple[Recorder, Path]) -> None:
    epochs = [whole[0].seen[start : start + 5] for start in (0, 5, 10)]
    assert [sorted(row for batch in epoch for row in batch) for epoch in epochs] == [list(range(20))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("stop", [3, 5, 8, 10])
def test_run_killed_after_a_step_resumes_with_the_rows_it_had_not_seen(tmp_path: Path, whole: tuple[Recorder, Path], stop: int) -> None:
    resumed, _ = fit(tmp_path, 17, whole[1] / f"step={stop}.ckpt")
    assert resumed.seen == whole[0].seen[stop:]
    assert torch.equal(resumed.weight, whole[0].weight)


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_run_that_max_steps_ended_is_extended_with_the_rows_it_had_not_seen(
    tmp_path: Path, whole: tuple[Recorder, Path], stop: int
) -> None:
    first, trainer = fit(tmp_path, stop)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    second, _ = fit(tmp_path, 17, tmp_path / "end.ckpt")
    assert first.seen + second.seen == whole[0].seen


class SaveAt(pl.Callback):
    """Writes a checkpoint in the hooks that end an epoch and a run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.directory / f"epoch_end_{trainer.global_step}.ckpt")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.directory / "train_end.ckpt")


@pytest.mark.parametrize(
    ("steps", "name", "stop"), [(12, "epoch_end_5", 5), (12, "epoch_end_10", 10), (5, "train_end", 5), (8, "train_end", 8)]
)
def test_checkpoints_written_in_the_hooks_of_an_ending_resume_as_well(
    tmp_path: Path, whole: tuple[Recorder, Path], steps: int, name: str, stop: int
) -> None:
    fit(tmp_path, steps, extra=SaveAt(tmp_path))
    resumed, _ = fit(tmp_path, 17, tmp_path / f"{name}.ckpt")
    assert resumed.seen == whole[0].seen[stop:]


def test_lightning_leaves_the_sampler_in_place_on_several_ranks() -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    ours = loader(DistributedBatchSampler(20, 4, 2, 0))
    assert trainer._data_connector._prepare_dataloader(ours, shuffle=True, mode=None) is ours  # type: ignore[arg-type]
    assert trainer._data_connector._requires_distributed_sampler(DataLoader(list(range(4)))), "the guard itself is dead"  # type: ignore[arg-type]
