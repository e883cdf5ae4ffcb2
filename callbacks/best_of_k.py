"""Measure a talkative autoencoder by best-of-K, with every control, on rows of an activation bank.

::

    theodolite test --config configs/talkative/k_sweep.yaml --data.checkpoint runs/sft/checkpoints/last.ckpt

    callbacks:
      - class_path: theodolite.callbacks.best_of_k.BestOfKCallback
        init_args: {k_values: [1, 2, 4, 8, 16, 32], temperature: [0.8, 1.0, 1.2]}

Works with any module that is a ``theodolite.protocols.TalkativeAutoencoder`` and any datamodule that is an ``ActivationTables``. What is
drawn, scored and written, and what each number means: ``docs/best_of_k.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from theodolite.best_of_k.candidates import Drawing
from theodolite.best_of_k.curves import Curves, Resampling
from theodolite.best_of_k.sweep import SweepPlan, run_labels, run_stages
from theodolite.protocols import ActivationTable, ActivationTables, TalkativeAutoencoder
from theodolite.provenance import write_json_atomic
from theodolite.reports.best_of_k import result_of, write_result
from theodolite.reports.best_of_k_page import write_report
from theodolite.seeds import run_seed
from theodolite.shard_work import agreed


class BestOfKCallback(Callback):
    """Best-of-K in ``test``, and optionally at validations of a fit.

    Args:
        k_values: The K to report, ascending.
        n_candidates: Candidates drawn per activation; null = the largest K. More make small K less noisy.
        temperature: Of sampling; a list gives one run each.
        max_new_tokens: Longest text; null = the module's own.
        max_rows: First rows of the table; null = all.
        generation_batch_size: Most texts decoded at once on one rank; halved where memory runs out. Changes no text.
        do_bootstrap: Give confidence intervals; without, their fields are null.
        bootstrap_replicates: Bootstrap samples of documents.
        bootstrap_seed: Names them.
        confidence: Level of the intervals.
        cache_dir: Folder of candidates and scores, shared by runs.
        load_store: Read from and add to ``cache_dir``; false = draw and score afresh in the run's own folder.
        output_dir: Folder of results; null = ``best_of_k`` in the run's folder.
        output_file: Name of the JSON; with several checkpoints or temperatures their names are added.
        seed: Of sampling; null = the run's ``seed_everything``.
        every_n_validations: Also measure at every n-th validation of a fit; 0 = only in ``test`` and ``validate``.
        rows_per_shard: Rows that are drawn, and lost by an interruption, together.
        report: Draw figures and write the HTML page, beside the JSON and the parquet of texts.
        worst_rows: Rows shown with their texts at either end of the page.

    Raises:
        ValueError: For settings that cannot work.
    """

    def __init__(
        self,
        k_values: list[int] = [1, 2, 4, 8, 16, 32],  # noqa: B006  (never changed; jsonargparse shows it in --help)
        n_candidates: int | None = None,
        temperature: float | list[float] = 1.0,
        max_new_tokens: int | None = None,
        max_rows: int | None = None,
        generation_batch_size: int = 32,
        do_bootstrap: bool = True,
        bootstrap_replicates: int = 2000,
        bootstrap_seed: int = 42,
        confidence: float = 0.95,
        cache_dir: str = "runs/best_of_k_cache",
        load_store: bool = True,
        output_dir: str | None = None,
        output_file: str = "k_sweep_results.json",
        seed: int | None = None,
        every_n_validations: int = 0,
        rows_per_shard: int = 32,
        report: bool = True,
        worst_rows: int = 5,
    ) -> None:
        super().__init__()
        self.ks = tuple(k_values)
        self.n = max(k_values, default=0) if n_candidates is None else n_candidates
        self.temperatures = [float(t) for t in (temperature if isinstance(temperature, list) else [temperature])]
        self.max_new_tokens, self.max_rows, self.generation_batch_size = max_new_tokens, max_rows, generation_batch_size
        self.resampling = Resampling(bootstrap_replicates if do_bootstrap else 0, bootstrap_seed, confidence)
        self.cache_dir, self.load_store, self.output_dir = Path(cache_dir), load_store, output_dir
        self.output_file, self.seed, self.rows_per_shard = output_file, run_seed(seed), rows_per_shard
        self.report, self.worst_rows = report, worst_rows
        self.every_n_validations, self._validations = every_n_validations, 0
        if not output_file.endswith(".json"):
            raise ValueError(f"output_file names the JSON of results, so it must end in .json, got {output_file!r}.")
        if len(set(self.temperatures)) != len(self.temperatures) or not self.temperatures:
            raise ValueError(f"temperature must be a number or a list of distinct ones, got {self.temperatures}.")
        for t in self.temperatures:
            self._plan(t, 1)  # refuse what cannot be drawn before anything is built

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse modules and data that cannot be measured.

        Raises:
            TypeError: The module describes nothing, or the datamodule has no table.
        """
        if not all(hasattr(type(pl_module), name) for name in ("describe", "reconstructors", "fingerprint")):
            raise TypeError(f"BestOfKCallback measures a TalkativeAutoencoder; {type(pl_module).__name__} offers no describe().")
        if not isinstance(getattr(trainer, "datamodule", None), ActivationTables):
            raise TypeError("BestOfKCallback needs a datamodule with table(split), for example ActivationBankDataModule.")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure on the test rows."""
        self._sweep(trainer, pl_module, "test")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure on the validation rows, where it is time to."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        fitting = trainer.state.fn == "fit"
        if not fitting or (self.every_n_validations and self._validations % self.every_n_validations == 0):
            self._sweep(trainer, pl_module, "validation", f"step_{trainer.global_step:06d}" if fitting else None)

    def state_dict(self) -> dict[str, Any]:
        """The number of validations seen, so that a resumed fit measures at the same ones."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`."""
        self._validations = state_dict["validations"]

    def _plan(self, temperature: float, max_new_tokens: int) -> SweepPlan:
        drawing = Drawing(temperature, max_new_tokens, self.seed)
        return SweepPlan(self.ks, self.n, drawing, self.max_rows, self.generation_batch_size, self.rows_per_shard)

    def _sweep(self, trainer: Trainer, pl_module: LightningModule, split: str, subfolder: str | None = None) -> None:
        """All checkpoints and temperatures; in a fit only the weights of the moment."""
        data = cast(Any, trainer).datamodule
        folder = Path(self.output_dir) if self.output_dir else Path(trainer.default_root_dir) / "best_of_k"
        folder = folder / subfolder if subfolder else folder
        root = self.cache_dir if self.load_store else Path(trainer.default_root_dir) / "best_of_k_stages"
        table = cast(ActivationTable, data.table(split))
        labels = run_labels([] if subfolder else getattr(data, "checkpoints", []), self.temperatures)
        length = self._length(pl_module)
        written: list[Path] = []
        with isolate_rng(), torch.no_grad(), _restored(pl_module, any(path for path, _ in labels)):
            loaded: str | None = None
            for (checkpoint, temperature), label in labels.items():
                if checkpoint is not None and checkpoint != loaded:
                    load_checkpoint(pl_module, checkpoint)
                    loaded = checkpoint
                plan = self._plan(temperature, length)
                name = Path(self.output_file).stem + (f"-{label}" if len(labels) > 1 else "")
                values = self._run(root, folder / name, table, pl_module, plan, checkpoint, label)
                written.append(folder / f"{name}.json")
                prefix = f"{split}/best_of_k/" + (f"{label}/" if len(labels) > 1 else "")
                pl_module.log_dict({f"{prefix}{key}": value for key, value in values.items()}, rank_zero_only=False, sync_dist=False)
        if self.report:
            agreed(lambda: write_report(written, folder, Path(self.output_file).stem, self.worst_rows))

    def _run(
        self,
        root: Path,
        target: Path,
        table: ActivationTable,
        pl_module: LightningModule,
        plan: SweepPlan,
        checkpoint: str | None,
        label: str,
    ) -> dict[str, float]:
        """Stages on all ranks, curves and files on rank 0; the logged numbers everywhere."""
        done = run_stages(root, table, cast(TalkativeAutoencoder, pl_module), plan, f" ({label})")

        def report() -> dict[str, float]:
            curves = Curves(done.scores, plan.ks, self.resampling)
            result = result_of(curves, self._settings(plan), checkpoint, label)
            write_result(target.parent, target.name, curves, result)
            write_json_atomic(target.parent / f"{target.name}.timings.json", {"seconds": done.seconds})
            return logged(result)

        return agreed(report)

    def _settings(self, plan: SweepPlan) -> dict[str, Any]:
        """What decides the numbers, for the JSON: batch sizes and folders do not."""
        return {
            "k_values": list(plan.ks),
            "n_candidates": plan.n,
            "temperature": plan.drawing.temperature,
            "max_new_tokens": plan.drawing.max_new_tokens,
            "seed": plan.drawing.seed,
            "max_rows": plan.rows,
            "do_bootstrap": self.resampling.replicates > 0,
            "bootstrap_replicates": self.resampling.replicates,
            "bootstrap_seed": self.resampling.seed,
            "confidence": self.resampling.level,
        }

    def _length(self, pl_module: LightningModule) -> int:
        length = pl_module.hparams.get("max_new_tokens") if self.max_new_tokens is None else self.max_new_tokens
        if not isinstance(length, int):
            raise ValueError(f"{type(pl_module).__name__} does not say max_new_tokens; set it in BestOfKCallback.")
        return length


def logged(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a result that go to the loggers: FVE against K for each curve, controls, and the share of empty texts."""
    values = {"failed_share": result["run"]["failed_candidates"] / (result["run"]["rows"] * result["run"]["candidates"])}
    for name, metrics in result["curves"].items():
        column = metrics["fve"]["value"]
        at = [f"@{k}" for k in result["k_values"]] if len(column) == len(result["k_values"]) and not name.startswith("greedy") else [""]
        values |= {f"fve.{name}{k}": value for k, value in zip(at, column, strict=False) if value is not None}
    return values


def load_checkpoint(pl_module: LightningModule, path: str) -> None:
    """Put a checkpoint's weights into a module; a folder of exported weights is the module's own affair.

    Raises:
        ValueError: If the file holds no ``state_dict``, or the module cannot read folders.
    """
    if Path(path).is_dir():
        read = getattr(pl_module, "load_exported", None)
        if read is None:
            raise ValueError(f"{type(pl_module).__name__} reads no folder of exported weights; give a checkpoint file instead of {path}.")
        read(path)
        return
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if "state_dict" not in checkpoint:
        raise ValueError(f"{path} is no Lightning checkpoint: it holds {sorted(checkpoint)[:5]} and no state_dict.")
    pl_module.on_load_checkpoint(checkpoint)
    pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)


@contextmanager
def _restored(pl_module: LightningModule, changes: bool) -> Iterator[None]:
    """The module's own weights again on the way out, where checkpoints are put in."""
    kept = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()} if changes else {}
    try:
        yield
    finally:
        if changes:
            pl_module.load_state_dict(kept)


__all__: Sequence[str] = ("BestOfKCallback", "load_checkpoint", "logged")
