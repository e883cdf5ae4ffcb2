"""The callback that keeps a run's own folder: resolved config, manifest, and metrics that survive a kill."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from theodolite.config_layers import ConfigError
from theodolite.provenance import manifest, write_json_atomic, write_text_atomic
from theodolite.run_logger import RunLogger

CHECKPOINT_KEY = "theodolite_metrics"
"""Where a checkpoint keeps the number of rows logged before it, and the row that its own batch has yet to log."""


class RunRecorder(Callback):
    """Writes ``config.yaml`` and ``manifest.json`` (for ``fit``; ``config.validate.yaml`` and so on otherwise), atomically, on rank zero.

    On resuming it cuts ``metrics.jsonl`` back to the rows that the checkpoint knows, so that the resumed file equals the
    uninterrupted one, and applies a changed learning rate to the restored optimizer, which would otherwise keep the old one.
    Nothing is written under ``fast_dev_run``.

    A module may offer ``batch_arithmetic`` (anything with ``as_dict()``), ``model_id`` and ``model_revision``: they go into the manifest.
    Module and datamodule may offer ``provenance``, a dictionary of plain data by field: the manifest gets its fields.

    Args:
        run_dir: The run's own folder.
        subcommand: ``fit``, ``validate``, ``test`` or ``predict``.
        config: The resolved configuration as plain data.
        config_text: The same as YAML.
        argv: The command line.
    """

    def __init__(self, run_dir: str, subcommand: str, config: Mapping[str, Any], config_text: str, argv: list[str]) -> None:
        super().__init__()
        self.run_dir = Path(run_dir)
        self.subcommand = subcommand
        self._config, self._config_text, self._argv = dict(config), config_text, argv
        self._unlogged: Literal["batch", "epoch"] | None = None
        self._restored: dict[str, Any] | None = None
        self._restored_lr: float | None = None

    def file(self, stem: str, suffix: str) -> Path:
        """Path of a file of this run: ``fit`` has the plain name, the other subcommands carry theirs."""
        return self.run_dir / (f"{stem}{suffix}" if self.subcommand == "fit" else f"{stem}.{self.subcommand}{suffix}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save config and manifest: everything is set up, nothing has run. A start that failed leaves the folder free."""
        self._save(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As :meth:`on_fit_start`."""
        self._save(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As :meth:`on_fit_start`."""
        self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        write_text_atomic(self.file("config", ".yaml"), self._config_text)
        self._write_manifest(trainer, pl_module)

    def _write_manifest(self, trainer: Trainer, pl_module: LightningModule) -> None:
        arithmetic = getattr(pl_module, "batch_arithmetic", None)
        content = manifest(
            hashed_config(self._config),
            argv=self._argv,
            model=getattr(pl_module, "model_id", None),
            model_revision=getattr(pl_module, "model_revision", None),
            seeds=seeds_of(self._config),
            batch_arithmetic=None if arithmetic is None else arithmetic.as_dict(),
            files={"config": self.file("config", ".yaml")},
            subcommand=self.subcommand,
            ranks=trainer.world_size,
            **_provenance(pl_module),
            **_provenance(getattr(trainer, "datamodule", None)),
        )
        write_json_atomic(self.file("manifest", ".json"), content)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say the batch arithmetic, and continue a resumed run's metrics, learning rate and validation."""
        self._continue_metrics(trainer)
        self._continue_lr(trainer, pl_module)
        self._continue_validation(trainer)
        arithmetic = getattr(pl_module, "batch_arithmetic", None)
        if arithmetic is None or not trainer.is_global_zero:
            return
        print(arithmetic, flush=True)
        if not getattr(trainer, "fast_dev_run", False):
            self._write_manifest(trainer, pl_module)

    # -- metrics that survive a kill ---------------------------------------------------------------------------------------------
    # Lightning saves a checkpoint in on_train_batch_end and logs that batch's row afterwards. A resumed run does not repeat the batch,
    # so a kill between the two would lose the row; a kill later would leave rows that the resumed run writes again.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A new batch: the last one's row is on disk."""
        self._unlogged = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """From here until Lightning logs, a checkpoint must carry the row."""
        self._unlogged = "batch"

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The batch's row was logged before validation."""
        self._unlogged = None
        if self.subcommand == "validate":
            self._save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch's row is logged after all callbacks' hooks."""
        self._unlogged = "epoch"

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Whatever was complete has been logged. Ranks other than 0 say why they fail at once: rank 0 ends them when it misses them."""
        self._unlogged = None
        if trainer.global_rank > 0 and isinstance(exception, Exception):
            print(f"rank {trainer.global_rank} failed:", *traceback.format_exception(exception), file=sys.stderr, flush=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the number of rows on disk, the row still to come, and whether the batch's validation is."""
        logger = _run_logger(trainer)
        if logger is not None:
            checkpoint[CHECKPOINT_KEY] = {
                "rows": logger.row_count(),
                "pending": self._pending_row(trainer),
                "validation_due": self._unlogged == "batch" and _validation_due(trainer),
            }

    def _pending_row(self, trainer: Trainer) -> dict[str, Any] | None:
        connector = trainer._logger_connector
        if self._unlogged is None or (self._unlogged == "batch" and not (connector.should_update_logs or trainer.should_stop)):
            return None
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in connector.metrics["log"].items()}
        if not values:
            return None
        # the epoch's row carries its last batch's step, and the counter has already moved on
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - (self._unlogged == "epoch")
        if "step" in values:
            step = int(values.pop("step"))
        else:
            values.setdefault("epoch", trainer.current_epoch)
        return {"step": step, "metrics": values}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what the checkpoint knew; it is applied once training starts."""
        self._restored = dict(checkpoint.get(CHECKPOINT_KEY) or {})
        lr = checkpoint.get("hyper_parameters", {}).get("lr")
        self._restored_lr = float(lr) if isinstance(lr, int | float) else None

    def _continue_metrics(self, trainer: Trainer) -> None:
        logger = _run_logger(trainer)
        if self._restored is None or logger is None:
            return
        if "rows" not in self._restored:
            logger.truncate_after(trainer.fit_loop.epoch_loop._batches_that_stepped)
        elif logger.row_count() >= self._restored["rows"]:
            logger.keep_rows(self._restored["rows"])
            if self._restored["pending"]:
                logger.log_metrics(**self._restored["pending"])

    def _continue_validation(self, trainer: Trainer) -> None:
        """Run the validation that was due when the checkpoint was saved: Lightning takes it for done."""
        if not (self._restored or {}).get("validation_due"):
            return
        connector = trainer._logger_connector
        first = connector._first_loop_iter
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False  # from its first batch: the restored progress is that of the validation before
        trainer.validating = True
        loop.run()
        trainer.training = True
        connector._first_loop_iter = first

    def _continue_lr(self, trainer: Trainer, pl_module: LightningModule) -> None:
        lr = getattr(pl_module, "lr", None)
        if self._restored is None or not isinstance(lr, int | float):
            return
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        present = {group["lr"] for group in groups}
        # without stored hyperparameters only a single constant rate can be told from a schedule
        old = self._restored_lr if self._restored_lr is not None else (present.pop() if len(present) == 1 else None)
        if old is None or old == lr or (self._restored_lr is None and trainer.lr_scheduler_configs):
            return
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        if old == 0 or not all(isinstance(scheduler, LambdaLR) for scheduler in schedulers):
            raise ConfigError(f"lr is {lr}, but the checkpoint was trained with {old} under a schedule that resumes with it; keep {old}.")
        for group in groups:
            group["lr"] *= lr / old
            group["initial_lr"] = group.get("initial_lr", old) * lr / old
        for scheduler in schedulers:  # lr(t) = base x factor(t): scaling the base scales all of it
            scheduler.base_lrs = [base * lr / old for base in scheduler.base_lrs]
        rank_zero_info(f"Resumed with a new learning rate: {old} in the checkpoint, {lr} now.")


def _provenance(part: Any) -> dict[str, Any]:
    return dict(getattr(part, "provenance", None) or {})


def hashed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that decides the numbers: without where results go and what is resumed."""
    kept = {key: value for key, value in config.items() if key not in ("run_dir", "ckpt_path", "config")}
    if isinstance(kept.get("trainer"), Mapping):
        kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key != "default_root_dir"}
    return kept


def seeds_of(config: Any, prefix: str = "") -> dict[str, int]:
    """Every whole number in a config whose key is ``seed``, ends in ``_seed`` or is ``seed_everything``, by dotted key."""
    found: dict[str, int] = {}
    items = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        name = f"{prefix}{key}"
        is_seed = str(key) in ("seed", "seed_everything") or str(key).endswith("_seed")
        if is_seed and isinstance(value, int) and not isinstance(value, bool):
            found[name] = value
        found |= seeds_of(value, f"{name}.")
    return found


def _validation_due(trainer: Trainer) -> bool:
    """Whether validation follows the batch that has just ended."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    return fetcher is not None and loop._should_check_val_fx(fetcher)


def _run_logger(trainer: Trainer) -> RunLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)
