"""A sampler that deals global batches out to ranks, without padding, and can be resumed in the middle of an epoch.

Position ``p`` of a global batch goes to rank ``p % W``; so rank ``r``'s ``i``-th item has the global slot ``r + i * W``. The global batches
themselves do not depend on ``W``. That is all a module needs to give every sample the same name (and seed) on 1 GPU and on 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from theodolite.batch_arithmetic import split_batch
from theodolite.seeds import derive_seed


class DistributedBatchSampler(DistributedSampler):
    """Yields one list of dataset indices per global batch: this rank's share of it.

    Use it as ``sampler`` of a loader with ``batch_size=None``, whose dataset takes a list of indices. It is a ``DistributedSampler`` so
    that Lightning leaves it in place and calls ``set_epoch``.

    Unlike its base class it neither repeats nor drops a row to make shares equal. Where the number of rows is not a multiple of the global
    batch, the last batch is short, and on some ranks its list may be *empty*: the number of batches is the same everywhere, so collectives
    inside a step stay in step, and the module has to accept ``[]``.

    The state is the epoch and the number of batches already yielded in it; an epoch ends with its last batch. It is the same on every rank,
    so rank 0's copy in a checkpoint resumes all of them, also with another number of ranks. After a resume the epoch is counted on from the
    state's, whatever number ``set_epoch`` names: Lightning counts an epoch that ``max_steps`` cut short as a whole one.

    Args:
        num_examples: Rows of the dataset.
        global_batch_size: Rows per batch over all ranks; a multiple of ``num_replicas``.
        num_replicas: Number of ranks.
        rank: This rank.
        shuffle: Permute the rows by ``(seed, epoch)``; otherwise keep their order.
        seed: Seed of the permutation.
        drop_last: Leave a short last batch out (training only: it drops rows).

    Raises:
        ValueError: If the batch does not split over the ranks, or no batch is left.
    """

    def __init__(
        self,
        num_examples: int,
        global_batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        split_batch(global_batch_size, num_replicas)
        if num_examples < (global_batch_size if drop_last else 1):
            needed = f"a global batch of {global_batch_size}" if drop_last else "one batch"
            raise ValueError(f"{num_examples} examples do not fill {needed}; give more examples or a smaller batch.")
        # The base class only needs a length; its num_samples and total_size describe padded shares and are not used here.
        super().__init__(range(num_examples), num_replicas, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        self.num_examples = num_examples
        self.global_batch_size = global_batch_size
        self._offset = 0  # between the epoch that set_epoch names and the one that is dealt out
        self._resume: tuple[int, int] | None = None
        self._next: tuple[int, int] | None = None
        self._resumed = False

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        full, rest = divmod(self.num_examples, self.global_batch_size)
        return full if self.drop_last or not rest else full + 1

    def order(self, epoch: int) -> list[int]:
        """An epoch's order of all rows, a function of ``(seed, epoch)`` alone."""
        if not self.shuffle:
            return list(range(self.num_examples))
        generator = torch.Generator().manual_seed(derive_seed("sampler", self.seed, epoch))
        return torch.randperm(self.num_examples, generator=generator).tolist()

    def further(self, step: int) -> list[int]:
        """All rows in an order that belongs to a step: a function of ``(seed, step)`` alone, so that it needs no state to be resumed.

        See :class:`theodolite.protocols.PromptReserve`.
        """
        generator = torch.Generator().manual_seed(derive_seed("further rows", self.seed, step))
        return torch.randperm(self.num_examples, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rank's share ``batch[rank::num_replicas]`` of each global batch, from where a loaded state left off."""
        start = 0
        if self._resumed and self._resume is None and self._next is not None and self._next[1]:
            self._resume = self._next  # Lightning may cut a resumed epoch short where max_steps ended the run exactly with an epoch
        if self._resume is not None:
            epoch, start = self._resume
            self._offset, self._resume = epoch - self.epoch, None
        epoch = self.epoch + self._offset
        order = self.order(epoch)
        for batch in range(start, len(self)):
            self._next = (epoch, batch + 1) if batch + 1 < len(self) else (epoch + 1, 0)
            yield self._share(order, batch)

    def upcoming(self) -> list[int]:
        """What the next batch will hold on this rank, in this epoch or the one after it; nothing is taken.

        See :class:`theodolite.protocols.PromptPreview`.
        """
        epoch, batch = self._resume or self._next or (self.epoch, 0)
        return self._share(self.order(epoch), batch)

    def _share(self, order: list[int], batch: int) -> list[int]:
        rows = order[batch * self.global_batch_size : (batch + 1) * self.global_batch_size]
        return rows[self.rank :: self.num_replicas]

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the batches already yielded in it, and the settings that the order depends on."""
        epoch, yielded = self._resume or self._next or (self.epoch, 0)
        return {
            "epoch": epoch,
            "yielded": yielded,
            "num_examples": self.num_examples,
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that ``state`` has seen, at the next iteration.

        Raises:
            ValueError: If the state belongs to other data, another batch size or another seed: the rest of the epoch would then repeat some
                rows and miss others.
        """
        for name in ("num_examples", "global_batch_size", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"The checkpoint's sampler has {name} {state[name]} but this run has {getattr(self, name)}; "
                    f"resume with {name} {state[name]}, or start a new run."
                )
        self._resume = (state["epoch"], state["yielded"])
        self._resumed = True
