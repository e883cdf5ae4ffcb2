"""Pictures of a decomposition at every evaluation: importances of one-hot inputs, components, histograms, mean importances.

Files go to ``figures/step_<step>/`` in the run's folder: ``permuted_ci.png`` and ``uv.png`` (targets of features only),
``ci_histogram.png``, ``logit_histogram.png`` and ``mean_ci.png``; ``importances.json`` holds the one-hot importances of the first.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from theodolite.distributed import sum_over_ranks
from theodolite.functional.decomposition_losses import column_sums
from theodolite.protocols import ComponentView
from theodolite.provenance import write_bytes_atomic, write_json_atomic
from theodolite.reports.component_figures import (
    component_orders,
    draw_components,
    draw_histograms,
    draw_importances,
    draw_mean_importances,
    histogram,
)

LOGITS = (-2.0, 3.0)
"""Range of the histogram of logits; what lies outside is counted in its outermost bins."""


class DecompositionFigures(Callback):
    """Draw a decomposition at every evaluation. All ranks' rows are counted; memory is that of one batch.

    Args:
        dense: Glob patterns of modules whose components are ordered by use instead of towards the identity.
        every: Draw at every so many validations; tests are always drawn.
    """

    def __init__(self, dense: list[str] | None = None, every: int = 1) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        self.dense, self.every = dense or [], every
        self._validations = 0
        self._sums: dict[str, dict[str, Tensor]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse modules without components.

        Raises:
            TypeError: The module does not offer ``ComponentView``.
        """
        if not isinstance(pl_module, ComponentView):
            raise TypeError(f"{type(pl_module).__name__} has no components to draw; DecompositionFigures needs a ComponentView.")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting, if this one is drawn."""
        wanted = not trainer.sanity_checking and self._validations % self.every == 0
        self._validations += not trainer.sanity_checking
        self._sums = {"importance": {}, "logit": {}, "mean": {}, "positions": {}} if wanted else None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a batch."""
        if self._sums is None or dataloader_idx:
            return
        assert isinstance(pl_module, ComponentView)
        for name, (lower, logits) in pl_module.importances(batch).items():
            parts = {"importance": histogram(lower, 0.0, 1.0), "logit": histogram(logits, *LOGITS), "mean": column_sums(lower)}
            parts["positions"] = torch.tensor([float(lower[..., 0].numel())], device=lower.device)
            for key, value in parts.items():
                before = self._sums[key].get(name)
                wide = value.to(pl_module.device, torch.float64)
                self._sums[key][name] = wide if before is None else before + wide

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was counted."""
        if self._sums is None:
            return
        assert isinstance(pl_module, ComponentView)
        sums = {key: {name: sum_over_ranks(value).cpu() for name, value in part.items()} for key, part in self._sums.items()}
        self._sums = None
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            folder = Path(trainer.default_root_dir) / "figures" / f"step_{trainer.global_step:06d}"
            self._write_counts(folder, sums)
            self._write_one_hot(folder, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation, always."""
        self._validations = 0
        self.on_validation_epoch_start(trainer, pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As for validation."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self.on_validation_epoch_end(trainer, pl_module)

    def _write_counts(self, folder: Path, sums: Mapping[str, Mapping[str, Tensor]]) -> None:
        means = {name: total / sums["positions"][name] for name, total in sums["mean"].items()}
        write_bytes_atomic(folder / "ci_histogram.png", draw_histograms(sums["importance"], 0.0, 1.0, "causal importance"))
        write_bytes_atomic(folder / "logit_histogram.png", draw_histograms(sums["logit"], *LOGITS, "logit of causal importance"))
        write_bytes_atomic(folder / "mean_ci.png", draw_mean_importances(means))

    def _write_one_hot(self, folder: Path, view: ComponentView) -> None:
        probe = view.one_hot_batch()
        if probe is None:
            return
        importances = {n: lower.reshape(-1, lower.shape[-1]).cpu() for n, (lower, _) in view.importances(probe).items()}
        orders = component_orders(importances, {n: any(fnmatch.fnmatch(n, p) for p in self.dense) for n in importances})
        matrices = {name: (read.cpu(), write.cpu()) for name, (read, write) in view.component_matrices().items()}
        write_bytes_atomic(folder / "permuted_ci.png", draw_importances(importances, orders))
        write_bytes_atomic(folder / "uv.png", draw_components(matrices, orders))
        write_json_atomic(folder / "importances.json", {name: g[:, orders[name]].tolist() for name, g in importances.items()})
