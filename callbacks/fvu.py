"""Fraction of variance unexplained of any LightningModule, in training (by windows) and in validation and test (over everything).

::

    callbacks:
      - class_path: FVUCallback                      # the step returns {"loss", "target", "reconstruction"}
      - class_path: FVUCallback
        init_args: {target: mlp_out.8, reconstruction: model.layers.8.probe output}    # two points of the module
      - class_path: FVUCallback
        init_args: {forward: true}                   # a transcoder: batch["target"] against module(batch["input"])

Logs ``train/<name>``, ``val/<name>``, ``test/<name>`` (with ``groups`` also ``_min``, ``_max``, ``_mean`` and ``_<group>``),
``*/<name>_median`` (the median row's own ratio) and ``*/<name>_dropped`` (share of rows that did not count). The three above are named
``fvu``, ``fvu_mlp_out.8`` and ``fvu_forward``. Every value is of all rows of all ranks, never a mean of batches. See ``docs/fvu.md``.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from theodolite.callbacks.fvu_sources import ForwardPass, FvuSource, SitePair, StepOutput, begin_ids, counted
from theodolite.metrics.counted_fvu import CountedFvu
from theodolite.shard_work import this_rank

Stage = Literal["train", "val", "test"]
DROPS = ("first", "begins", "padding")


class FVUCallback(Callback):
    """Measure FVU without touching training: no gradient, random number, mode or parameter changes.

    Args:
        target: What should be reconstructed: a site such as ``mlp_out.8`` (see ``docs/sites.md``), or ``<module> input`` or ``output``.
        reconstruction: The reconstruction, likewise.
        forward: Run the module on ``batch["input"]`` and compare with ``batch["target"]``; a name runs that submodule.
        groups: Names of the G reconstructions where they are (..., G, d).
        drop: Rows that do not count: ``first`` token of a sequence, ``begins`` (BOS), ``padding``. Null = all three. What there is to
            know of tokens is read from the batch (``input_ids``, ``attention_mask``, ``position``) and from the shape (batch, tokens, d).
        window: Training batches per value; null = between two writes of the loggers.
        train: Measure training batches too.
        name: Of the logged values, and of this callback where there are several; null = ``fvu`` for the step's own output, and otherwise
            ``fvu_`` and the target's point, the submodule that is run, or ``forward``.

    With neither points nor ``forward`` the step's own output is used: a dict with ``target`` and ``reconstruction``.

    Raises:
        ValueError: Contradictory settings.
    """

    def __init__(
        self,
        target: str | None = None,
        reconstruction: str | None = None,
        forward: bool | str = False,
        groups: list[str] | None = None,
        drop: list[Literal["first", "begins", "padding"]] | None = None,
        window: int | None = None,
        train: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if (target is None) != (reconstruction is None) or (target is not None and forward is not False):
            raise ValueError("FVUCallback takes target and reconstruction together, or forward, or none of them (the step's output).")
        self.drop: set[str] = set(DROPS if drop is None else drop)
        if unknown := sorted(self.drop - {*DROPS}):
            raise ValueError(f"FVUCallback.drop holds {unknown}; choose from {', '.join(DROPS)}.")
        if window is not None and window < 1:
            raise ValueError(f"FVUCallback.window must be at least 1, got {window}.")
        self.groups, self.window, self.train = groups, window, train
        self.source: FvuSource = StepOutput()
        if target is not None and reconstruction is not None:
            self.source = SitePair(target, reconstruction)
        elif forward is not False:
            self.source = ForwardPass("" if forward is True else forward)
        measured = target or ("forward" if forward is True else forward or "")
        self.name = "_".join(["fvu", *measured.split()]) if name is None else name
        self._sums: dict[tuple[Stage, int], CountedFvu] = {("train", 0): CountedFvu(groups)}
        self._batches, self._warned = 0, False
        self._begin_ids: set[int] = set()
        self._watching = ExitStack()

    @property
    def state_key(self) -> str:
        """One key per name, so that several instances can be checkpointed."""
        return self._generate_state_key(name=self.name)

    # ------------------------------------------------------------------ start and end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out what a beginning token is.

        Raises:
            ValueError: The module logs an FVU of its own under this callback's name.
        """
        taken = getattr(pl_module, "logs_fvu_as", None)
        if taken is not None and re.fullmatch(rf"{re.escape(taken)}(_(min|max|mean|\d+))?", self.name):
            raise ValueError(
                f"{type(pl_module).__name__} logs {self.name} itself, and FVUCallback(name={self.name!r}) would overwrite it: "
                "give the callback another name."
            )
        self._begin_ids = begin_ids(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find unknown points before training, and move the sums to the module's device."""
        self._prepare(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a whole pass."""
        self._prepare(pl_module)
        self._reset("val", len(trainer.num_val_batches), pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a whole pass."""
        self._prepare(pl_module)
        self._reset("test", len(trainer.num_test_batches), pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._watching.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._watching.close()

    # ------------------------------------------------------------------ steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the step."""
        if self.train:
            self._watching.enter_context(self.source.watch(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the step, and log at the end of a window."""
        if not self.train:
            return
        self._add("train", trainer, pl_module, outputs, batch)
        self._batches += 1
        # between two windows Lightning writes the last value again, so without a length a window ends where the loggers write
        writes = trainer._logger_connector.should_update_logs
        if writes if self.window is None else self._batches % self.window == 0:
            self._log("train", pl_module, 1)
            self._sums["train", 0].reset()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the step."""
        self._watching.enter_context(self.source.watch(pl_module))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the step."""
        self._add("val", trainer, pl_module, outputs, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the whole pass; Lightning's sanity check is none."""
        if not trainer.sanity_checking:
            self._log("val", pl_module, len(trainer.num_val_batches))

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the step."""
        self._watching.enter_context(self.source.watch(pl_module))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the step."""
        self._add("test", trainer, pl_module, outputs, batch, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the whole pass."""
        self._log("test", pl_module, len(trainer.num_test_batches))

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The open window, joined over ranks (all of them save together), so that a resumed run logs what an uninterrupted one does."""
        return {"batches": self._batches, **self._sums["train", 0].joined_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the open window back, on one rank."""
        self._batches = state_dict["batches"]
        if this_rank() == 0:
            self._sums["train", 0].load(state_dict)

    # ------------------------------------------------------------------ parts

    def _prepare(self, pl_module: LightningModule) -> None:
        """Find unknown points, and put the sums where the rows will be."""
        with self.source.watch(pl_module):
            pass
        self._sums["train", 0].to(pl_module.device)

    def _reset(self, stage: Stage, loaders: int, pl_module: LightningModule) -> None:
        for index in range(loaders):
            self._sums[stage, index] = CountedFvu(self.groups).to(pl_module.device)

    @torch.no_grad()
    def _add(self, stage: Stage, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, loader: int = 0) -> None:
        self._watching.close()
        with trainer.precision_plugin.forward_context():
            rows = self.source.rows(pl_module, outputs, batch)
        mask = counted(rows, batch, self.drop, self._begin_ids)
        self._sums[stage, loader].add(rows.target, rows.reconstruction, mask)

    def _log(self, stage: Stage, pl_module: LightningModule, loaders: int) -> None:
        for index in range(loaders):
            values = self._sums[stage, index].values()
            suffix = "" if loaders == 1 else f"/dataloader_idx_{index}"
            for key, value in values.items():
                shown, whole = key == "fvu", stage != "train"
                # float32: progress bars and loggers cannot hold float64 on every device
                value = value.to(torch.float32)
                name = f"{stage}/{self.name}{key.removeprefix('fvu')}{suffix}"
                pl_module.log(name, value, prog_bar=shown, on_step=not whole, on_epoch=whole, add_dataloader_idx=False)
            self._warn(stage, float(values["fvu"]))

    def _warn(self, stage: Stage, fvu: float) -> None:
        if fvu > 1 and stage != "train" and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{stage}/{self.name} is {fvu:.3g}, worse than predicting the mean: usually another site, layer or norm than the one that "
                "was trained on."
            )
