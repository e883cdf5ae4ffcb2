"""Decompose a model of your own and ask an adversary about the result; some seconds on a CPU.

    python docs/examples/decompose_own_model.py

A target is any module that maps a batch to a tensor (or to something that holds one: ``Target.output_attr``). Here it is given a name, by
which ``model.target: {kind: permutation, ...}`` finds it. In a config of your own name the class below instead of ``DecompositionModule``,
so that this file is imported: ``PYTHONPATH=docs/examples theodolite fit --config ... --model decompose_own_model.OwnDecomposition``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from theodolite.callbacks import PGDReconLossCallback
from theodolite.datamodules.toy import ToyDataModule
from theodolite.lightning_modules import DecompositionModule
from theodolite.lightning_modules.decomposition.targets.build import BUILDERS, KEYS, Target

FEATURES = 4


class Permutation(nn.Module):
    """Moves every feature one place further. Ground truth: one component per feature.

    Args:
        n_features: How many.
    """

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.move = nn.Linear(n_features, n_features, bias=False)
        with torch.no_grad():  # a trained model would load its weights here, from safetensors
            self.move.weight.copy_(torch.eye(n_features).roll(1, dims=0))

    def forward(self, features: Tensor) -> Tensor:
        """Features (rows, n) to features (rows, n)."""
        return self.move(features)


def permutation(fields: Mapping[str, Any], seed: int) -> Target:
    """The target of a config's fields; ``seed`` is for targets that are trained on the spot."""
    return Target(Permutation(**fields), output_loss="mse", features=fields["n_features"])


BUILDERS["permutation"], KEYS["permutation"] = permutation, {"n_features"}


class OwnDecomposition(DecompositionModule):
    """As its parent; naming it imports this file, and so registers the target."""


def main(steps: int = 600) -> dict[str, float]:
    """Train and test; returns the numbers of the test."""
    module = OwnDecomposition(
        target={"kind": "permutation", "n_features": FEATURES},
        modules={"move": 2 * FEATURES},
        ci_fn={"mode": "layerwise", "fn_type": "mlp", "hidden_dims": [16]},
        losses=[
            {"name": "importance_minimality", "coeff": 3e-3, "pnorm": 1.0},
            {"name": "stochastic_recon", "coeff": 1.0},
        ],
        metrics=[
            {"name": "stochastic_recon"},
            {"name": "identity_ci_error", "identity": {"move": FEATURES}},
            {"name": "recovery", "modules": {"move": "rows"}},
        ],
        lr=1e-2,
        faithfulness_steps=200,
        faithfulness_lr=0.01,
    )
    data = ToyDataModule(kind="unit", width=FEATURES, probability=0.2, global_batch_size=256, eval_batch_size=256, eval_batches=2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, limit_val_batches=0, callbacks=[PGDReconLossCallback(n_steps=[0, 20])],
            default_root_dir=folder, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        (numbers,) = trainer.test(module, datamodule=data, verbose=False)
    for name, value in sorted(numbers.items()):
        print(f"{name:<40} {value:.4g}")
    return dict(numbers)


if __name__ == "__main__":
    main()
