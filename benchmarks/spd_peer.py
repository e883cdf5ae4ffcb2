"""The same decompositions twice: built by SPD (goodfire-ai/spd), and imported from its state. Only for ``benchmarks/pgd.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from theodolite.lightning_modules.decomposition.component_model import ComponentModel
from theodolite.lightning_modules.decomposition.decomposition import Decomposition
from theodolite.lightning_modules.decomposition.persistent_pgd import PersistentPGDRecon
from theodolite.lightning_modules.decomposition.registry import OBJECTIVES, build_entry
from theodolite.lightning_modules.decomposition.spd_import import llama_from_config, load_spd_state
from theodolite.lightning_modules.decomposition.step import StepBatch, microbatches, step_gradients
from theodolite.lightning_modules.decomposition.targets.toy_models import TMS

LLAMA: dict[str, Any] = {
    "model_type": "LlamaSimpleMLP",
    "block_size": 512,
    "vocab_size": 4019,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 128,
    "n_intermediate": 512,
    "rotary_dim": 32,
    "n_ctx": 512,
    "n_key_value_heads": 2,
}
"""SPD's LlamaSimpleMLP of two layers on SimpleStories."""

COMPONENTS, HIDDEN = 650, 550
"""Per module, and of the causal-importance functions: those of SPD's configuration for it."""


@dataclass
class Pair:
    """One decomposition in both implementations.

    Attributes:
        peer: SPD's ``ComponentModel``.
        ours: The same weights, imported.
        batch: Input of the target.
        kind: ``mse`` or ``kl``.
    """

    peer: Any
    ours: Decomposition
    batch: Tensor
    kind: str


def llama(rows: int, positions: int) -> Pair:
    """LlamaSimpleMLP-2L shapes: 12 modules of 650 components."""
    from spd.configs import LayerwiseCiConfig, ModulePatternInfoConfig  # pyright: ignore[reportMissingImports]
    from spd.models.component_model import ComponentModel as PeerModel  # pyright: ignore[reportMissingImports]
    from spd.pretrain.models.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig  # pyright: ignore[reportMissingImports]
    from spd.utils.module_utils import expand_module_patterns  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    target = LlamaSimpleMLP(LlamaSimpleMLPConfig(**LLAMA)).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[1] ** 0.5)
    pattern = "h.*.*.*_*"
    infos = expand_module_patterns(target, [ModulePatternInfoConfig(module_pattern=pattern, C=COMPONENTS)])
    ci = LayerwiseCiConfig(fn_type="shared_mlp", hidden_dims=[HIDDEN])
    peer = PeerModel(target, infos, ci, "leaky_hard", "idx_0")
    _nearly_faithful(peer)
    model = ComponentModel(llama_from_config(LLAMA), {info.module_path: info.C for info in infos})
    ours = Decomposition(model, {"mode": "layerwise", "fn_type": "shared_mlp", "hidden_dims": [HIDDEN]}, output_loss="kl")
    load_spd_state(ours, peer.state_dict())
    return Pair(peer, ours, torch.randint(0, LLAMA["vocab_size"], (rows, positions)), "kl")


def tms(rows: int) -> Pair:
    """TMS 40-10: 2 modules of 200 components."""
    from spd.configs import LayerwiseCiConfig, ModulePatternInfoConfig  # pyright: ignore[reportMissingImports]
    from spd.experiments.tms.configs import TMSModelConfig  # pyright: ignore[reportMissingImports]
    from spd.experiments.tms.models import TMSModel  # pyright: ignore[reportMissingImports]
    from spd.models.component_model import ComponentModel as PeerModel  # pyright: ignore[reportMissingImports]
    from spd.utils.module_utils import expand_module_patterns  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_features": 40, "n_hidden": 10, "n_hidden_layers": 0, "tied_weights": True, "init_bias_to_zero": True}
    target = TMSModel(TMSModelConfig(device="cpu", **shape)).eval().requires_grad_(False)
    infos = expand_module_patterns(target, [ModulePatternInfoConfig(module_pattern="linear*", C=200)])
    peer = PeerModel(target, infos, LayerwiseCiConfig(fn_type="mlp", hidden_dims=[16]), "leaky_hard", None)
    model = ComponentModel(TMS(40, 10), {info.module_path: info.C for info in infos})
    ours = Decomposition(model, {"mode": "layerwise", "fn_type": "mlp", "hidden_dims": [16]})
    load_spd_state(ours, peer.state_dict())
    batch = torch.rand(rows, 40) * (torch.rand(rows, 40) < 0.05)
    return Pair(peer, ours, batch, "mse")


def _nearly_faithful(peer: Any) -> None:
    """Truncated singular vectors plus noise, so that an attack meets a reconstruction as after training, not noise."""
    with torch.no_grad():
        for path in peer.target_module_paths:
            component = peer.components[path]
            left, values, right = torch.linalg.svd(peer.target_weight(path).T, full_matrices=False)
            component.V.copy_(0.05 * torch.randn_like(component.V) / component.V.shape[0] ** 0.5)
            component.U.copy_(0.05 * torch.randn_like(component.U) / component.C**0.5)
            component.V[:, : len(values)] += left * values.sqrt()
            component.U[: len(values)] += values.sqrt()[:, None] * right


class PeerTraining:
    """SPD's training step, line by line what its loop does between two optimizer steps, in float32 without logging.

    Args:
        pair: What is trained.
        losses: SPD's loss configurations, those with persistent sources included.
    """

    def __init__(self, pair: Pair, losses: list[Any]) -> None:
        from spd.persistent_pgd import PersistentPGDState  # pyright: ignore[reportMissingImports]

        self.model, self.batch, self.kind, self.losses = pair.peer, pair.batch, pair.kind, losses
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
        leading = self.batch.shape if self.kind == "kl" else self.batch.shape[:-1]
        counts = self.model.module_to_c
        persistent = [loss for loss in losses if loss.classname.startswith("Persistent")]
        self.states = {loss: PersistentPGDState(counts, tuple(leading), "cpu", True, loss, self.kind) for loss in persistent}

    def step(self) -> float:
        """One optimizer step; returns the total loss."""
        from spd.losses import compute_losses  # pyright: ignore[reportMissingImports]

        self.optimizer.zero_grad()
        for state in self.states.values():
            state.update_lr(1, 100)
        deltas = self.model.calc_weight_deltas()
        found = self.model(self.batch, cache_type="input")
        ci = self.model.calc_causal_importances(pre_weight_acts=found.cache, detach_inputs=False, sampling="continuous")
        losses = compute_losses(
            loss_metric_configs=self.losses,
            model=self.model,
            batch=self.batch,
            ci=ci,
            target_out=found.output,
            weight_deltas=deltas,
            current_frac_of_training=0.1,
            sampling="continuous",
            use_delta_component=True,
            n_mask_samples=1,
            ppgd_states=self.states,
            output_loss_type=self.kind,
        )
        total = torch.stack([loss.coeff * value for loss, value in losses.items()]).sum()
        gradients = {loss: state.get_grads(losses[loss], retain_graph=True) for loss, state in self.states.items()}
        total.backward()
        for loss, state in self.states.items():
            state.step(gradients[loss])
        self.optimizer.step()
        return float(total.detach())


class OurTraining:
    """Our training step on the same batch with the same losses, and the optimizer as ``DecompositionModule`` makes it.

    Args:
        pair: What is trained.
        losses: Our loss configurations.
    """

    def __init__(self, pair: Pair, losses: list[dict[str, Any]]) -> None:
        self.parts, self.batch = pair.ours, pair.batch
        self.objectives = [build_entry(spec, OBJECTIVES, "losses") for spec in losses]
        for objective in self.objectives:
            if isinstance(objective, PersistentPGDRecon):
                objective.plan(100)
        self.optimizer = torch.optim.AdamW([p for p in self.parts.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0, fused=True)
        self.steps = 0

    def step(self) -> float:
        """One optimizer step; returns the total loss."""
        self.optimizer.zero_grad()
        parts = microbatches(self.batch, 0, 1, None)
        batch = StepBatch(parts, len(self.batch), (0, "train", self.steps), self.steps, 0.1)
        shares = step_gradients(self.parts, self.objectives, batch, torch.Tensor.backward)
        self.optimizer.step()
        self.steps += 1
        return float(shares["total"])
