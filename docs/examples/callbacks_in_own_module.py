"""Three callbacks in a project of your own: projection, attack and FVU on a LightningModule that knows nothing of this package.

    python docs/examples/callbacks_in_own_module.py

The module is a gated autoencoder; some seconds on a CPU. What each callback asks of it:

* ``GradientProjectionCallback``: nothing but names of parameters. The direction is a gradient difference: where
  the decoder learns to write the first feature.
* ``FVUCallback``: steps return ``target`` and ``reconstruction`` (other ways: docs/fvu.md).
* ``PGDReconLossCallback``: the four methods of ``theodolite.protocols.MaskedReconstruction``. A source is how far the adversary opens a
  gate again that the module has closed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from theodolite.callbacks import FVUCallback, GradientProjectionCallback, PGDReconLossCallback
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.extraction import gradient_difference

FEATURES, HIDDEN = 8, 16
SHOWN = (
    "val/fvu",
    "val/pgd_recon/joint_64/n0",
    "val/pgd_recon/joint_64/n20",
    "projection/projection/update_cos_before",
    "along the direction",
)


class SparseRows(Dataset[Tensor]):
    """Rows (FEATURES,), most of whose entries are 0."""

    def __init__(self, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        active = torch.rand(rows, FEATURES, generator=generator) < 0.3
        self.rows = active * torch.rand(rows, FEATURES, generator=generator)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        """One row."""
        return self.rows[index]


class GatedAutoencoder(L.LightningModule):
    """``x' = W_dec (gate(x) * relu(W_enc x))``, gates in (0, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.gate = nn.Linear(FEATURES, HIDDEN), nn.Linear(FEATURES, HIDDEN)
        self.decoder = nn.Linear(HIDDEN, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of rows (B, FEATURES)."""
        return self.decoder(self.gate(x).sigmoid() * self.encoder(x).relu())

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Loss, and what FVU is measured on."""
        reconstruction = self(batch)
        loss = nn.functional.mse_loss(reconstruction, batch) + 0.01 * self.gate(batch).sigmoid().mean()
        return {"loss": loss, "target": batch, "reconstruction": reconstruction.detach()}

    def validation_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """What FVU is measured on."""
        return {"target": batch, "reconstruction": self(batch)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimizer will do."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    # ------------------------------------------------------------------ what an adversary may ask (MaskedReconstruction)

    def leading_shape(self, batch: Tensor) -> tuple[int, ...]:
        """A batch has rows and no positions."""
        return (len(batch),)

    def source_channels(self) -> dict[str, int]:
        """One source per gate."""
        return {"gate": HIDDEN}

    def prepare(self, batch: Tensor) -> dict[str, Tensor]:
        """What all steps of an attack share."""
        with torch.no_grad():
            return {"target": batch, "gate": self.gate(batch).sigmoid(), "hidden": self.encoder(batch).relu()}

    def loss_sum(self, prepared: Any, sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Squared error where each gate is between the module's own value (source 0) and open (source 1)."""
        gate = prepared["gate"] + (1 - prepared["gate"]) * sources["gate"]
        error = self.decoder(gate * prepared["hidden"]) - prepared["target"]
        return error.square().sum(), error.numel()


def first_feature(module: GatedAutoencoder, rows: Tensor) -> ConceptDirection:
    """``grad loss(concept) - grad loss(clean)``: the concept is a decoder that writes the first feature, the clean one leaves it out."""
    without = rows * (torch.arange(FEATURES) != 0)

    def gradient(target: Tensor) -> Tensor:
        return torch.autograd.grad(nn.functional.mse_loss(module(rows), target), module.decoder.weight)[0]

    return gradient_difference({"decoder.weight": (gradient(rows) - gradient(without))[None]})


def main(steps: int = 100) -> dict[str, float]:
    """Train; returns what was logged last, and how far the decoder went along the direction (as a cosine)."""
    torch.manual_seed(0)
    module, training = GatedAutoencoder(), SparseRows(1024, seed=1)
    direction, start = first_feature(module, training.rows), module.decoder.weight.detach().clone()
    callbacks: list[L.Callback] = [
        GradientProjectionCallback(direction, gate="two_sided", apply_to="update"),
        FVUCallback(),
        PGDReconLossCallback(n_steps=[0, 20], attack_batch_size=64),
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, check_val_every_n_epoch=None, val_check_interval=steps,
            limit_val_batches=2, num_sanity_val_steps=0, callbacks=callbacks, default_root_dir=folder, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(training, batch_size=64), DataLoader(SparseRows(256, seed=2), batch_size=128))
    moved = (module.decoder.weight.detach() - start).flatten()
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    logged["along the direction"] = float(moved @ direction.vectors["decoder.weight"].flatten() / moved.norm())
    for name in SHOWN:
        print(f"{name:<40} {logged[name]:.4g}")
    return logged


if __name__ == "__main__":
    main()
