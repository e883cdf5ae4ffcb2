r"""How badly can a reconstruction fail within what its masks allow? Projected gradient ascent on the masks, at every evaluation.

Works on any ``LightningModule`` that offers :class:`~theodolite.protocols.MaskedReconstruction`, in ``fit``, ``validate`` and ``test``::

    callbacks:
      - class_path: theodolite.callbacks.pgd_recon_loss.PGDReconLossCallback
        init_args:
          n_steps: [1, 5, 20, 100]     # one attack of 100 steps, read at four points
          attack_batch_size: 64        # over all ranks: this decides the number
          micro_batch_size: 8          # per forward pass: this only decides the memory
          legacy_ranks: 8              # also what 8 processes of 8 rows would have logged

**The attack batch belongs to the number.** A shared source must hurt all rows that share it, so the loss falls as the attack batch grows,
and an evaluation on another number of processes used to be another attack. Here the batch is a global size, it is part of every logged
name (``val/pgd_recon/joint_64/n20``), and it stands beside every number in ``pgd/<name>.<stage>.step_<step>.json``.

Every setting and every logged number is explained in ``docs/callbacks/pgd_recon_loss.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from theodolite.evaluation_rows import RowStore
from theodolite.functional.pgd import MaskScope, SourceInit
from theodolite.protocols import MaskedReconstruction
from theodolite.provenance import write_json_atomic
from theodolite.reconstruction_attack import AttackSettings, attack_reconstruction
from theodolite.seeds import run_seed


class PGDReconLossCallback(Callback):
    """Attack the reconstruction of the evaluation data and log the worst losses found.

    Args:
        n_steps: Numbers of ascent steps at which the loss is reported, all read off one attack.
        step_size: Of the sign ascent; sources live in [0, 1].
        init: Where sources start: ``random`` (uniform), ``zeroes`` (the masks at their causal importance) or ``ones``. From ``ones``
            with a delta component the reconstruction is exact, so the first gradient is nothing but rounding.
        mask_scope: ``shared_across_batch`` (one source per channel), ``shared_across_batch_per_position`` (one per position),
            ``unique_per_row`` or ``unique_per_datapoint`` (every row and position its own).
        attack_batch_size: Rows that are attacked together, over all ranks.
        micro_batch_size: Rows per forward pass and rank. None = as the datamodule gives them.
        attacks: Attack batches per evaluation. None = as many as the data fills.
        legacy_ranks: Report also what so many processes would have found that split the attack batch and average their gradients
            (``averaged_8x8``), or attack their parts separately (``separate_8``).
        keep_prepared: Keep target outputs and causal importances of all microbatches between steps: faster, but not in the memory of one.
        dataloader: Index of the evaluation dataloader that is attacked.
        seed: Of random starts; None = the run's. Every evaluation starts alike.
        name: In logs and files; several instances need different ones.

    Raises:
        ValueError: Contradictory settings.
    """

    def __init__(
        self,
        n_steps: int | list[int] = 20,
        step_size: float = 0.1,
        init: SourceInit = "random",
        mask_scope: MaskScope = "shared_across_batch",
        attack_batch_size: int = 64,
        micro_batch_size: int | None = None,
        attacks: int | None = None,
        legacy_ranks: int | None = None,
        keep_prepared: bool = False,
        dataloader: int = 0,
        seed: int | None = None,
        name: str = "pgd_recon",
    ) -> None:
        super().__init__()
        steps = (n_steps,) if isinstance(n_steps, int) else tuple(n_steps)
        self.settings = AttackSettings(
            steps,
            step_size,
            init,
            mask_scope,
            attack_batch_size,
            micro_batch_size,
            attacks,
            legacy_ranks,
            keep_prepared,
            run_seed(seed),
        )
        self.dataloader, self.name = dataloader, name
        self.table: list[dict[str, Any]] = []
        """The last evaluation's numbers, as they are written to the file."""
        self._store: RowStore | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse modules that cannot be attacked, and two instances of one name.

        Raises:
            TypeError: The module does not offer ``MaskedReconstruction``.
            ValueError: Another instance has the same name.
        """
        if not isinstance(pl_module, MaskedReconstruction):
            raise TypeError(
                f"{type(pl_module).__name__} cannot be attacked: PGDReconLossCallback needs a module with leading_shape, source_channels, "
                "prepare and loss_sum (theodolite.protocols.MaskedReconstruction)."
            )
        callbacks: list[Any] = list(getattr(trainer, "callbacks", []))
        if sum(isinstance(other, PGDReconLossCallback) and other.name == self.name for other in callbacks) > 1:
            raise ValueError(f"Two PGDReconLossCallbacks are called {self.name!r}, and one would overwrite the other: give each a name.")

    # ------------------------------------------------------------------ collect

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start collecting rows."""
        wanted = self.settings.attacks
        limit = None if wanted is None else wanted * self.settings.attack_batch_size
        self._store = None if trainer.sanity_checking else RowStore(trainer.global_rank, trainer.world_size, limit)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the batch's rows."""
        if self._store is not None and dataloader_idx == self.dataloader:
            assert isinstance(pl_module, MaskedReconstruction)
            self._store.add(batch, pl_module.leading_shape(batch)[0])

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self.on_validation_epoch_start(trainer, pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As for validation."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    # ------------------------------------------------------------------ attack

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attack what was collected; log and write the numbers."""
        self._attack(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self._attack(trainer, pl_module, "test")

    def _attack(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._store is None:
            return
        assert isinstance(pl_module, MaskedReconstruction)
        store, self._store = self._store, None
        outcomes, left_out = attack_reconstruction(pl_module, store, self.settings, trainer.precision_plugin.forward_context)
        self.table = [outcome.row(label, n, self.settings) for label, outcome in outcomes.items() for n in self.settings.n_steps]
        for row in self.table:
            prefix = f"{stage}/{self.name}/{row['attack']}"
            self._log(pl_module, f"{prefix}/n{row['n_steps']}", row["loss"])
            if row["gradient_agreement"] is not None:
                self._log(pl_module, f"{prefix}/agreement_n{row['n_steps']}", row["gradient_agreement"])
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            self._write(trainer, stage, left_out)

    def _log(self, pl_module: LightningModule, key: str, value: float) -> None:
        # every rank holds the global number already
        pl_module.log(key, torch.tensor(value, dtype=torch.float64), on_step=False, on_epoch=True, batch_size=1, rank_zero_only=False)

    def _write(self, trainer: Trainer, stage: str, left_out: int) -> None:
        settings = self.settings
        content = {
            "name": self.name,
            "stage": stage,
            "step": trainer.global_step,
            "ranks": trainer.world_size,
            "attack_batch_size": settings.attack_batch_size,
            "micro_batch_size": settings.micro_batch_size,
            "legacy_ranks": settings.legacy_ranks,
            "seed": settings.seed,
            "rows_left_out": left_out,
            "results": self.table,
        }
        path = Path(trainer.default_root_dir) / "pgd" / f"{self.name}.{stage}.step_{trainer.global_step:06d}.json"
        write_json_atomic(path, content)
        if trainer.state.fn != "fit":
            print(table_text(self.table), flush=True)


def table_text(rows: list[dict[str, Any]]) -> str:
    """The numbers of one evaluation as a table: attacks by numbers of steps, each with its attack batch and its standard error."""
    steps = sorted({row["n_steps"] for row in rows})
    by_label: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_label.setdefault(row["attack"], {})[row["n_steps"]] = row
    lines = [f"{'PGD loss after':<20}" + "".join(f"{n:>20d}" for n in steps) + "  steps"]
    for label, found in by_label.items():
        cells = [_cell(found[n]) for n in steps]
        lines.append(f"{label:<20}" + "".join(f"{cell:>20}" for cell in cells) + f"  ({next(iter(found.values()))['attacks']} attacks)")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return f"{row['loss']:.5g}" + ("" if error is None else f" ± {error:.1g}")
