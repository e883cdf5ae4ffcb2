"""Train and evaluate a parameter decomposition.

Run it (CPU; the toy target is trained first, in seconds)::

    theodolite fit --config configs/decomposition/tms_5-2.yaml

On several processes::

    torchrun --nproc_per_node=2 train.py fit --config configs/decomposition/tms_5-2.yaml --trainer.devices=2 --trainer.strategy=ddp

Deviations from SPD (goodfire-ai/spd): random numbers belong to rows and not to ranks; importance minimality uses the sums of the global
batch in training and in evaluation; tied modules share parameters instead of storage; the target is never trained with dropout; an
evaluation draws the same masks every time and takes nothing from training's random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from theodolite.batch_arithmetic import BatchArithmetic, split_batch
from theodolite.distributed import gather_objects, sum_gradients
from theodolite.functional.decomposition_losses import faithfulness
from theodolite.functional.schedules import schedule_factor
from theodolite.seeds import run_seed

from .component_model import ComponentModel
from .decomposition import Decomposition, Prepared, input_tensor
from .evaluation import Evaluation, build_measures
from .ground_truth import one_hot_probe
from .objectives import ImportanceMinimality, WholeBatchObjective
from .persistent_pgd import PersistentPGDEval, PersistentPGDRecon
from .registry import training_losses
from .step import StepBatch, microbatches, step_gradients
from .targets.build import Target, build_target, check_target


class DecompositionModule(L.LightningModule):
    """A target model, its components and their causal importances. Offers ``MaskedReconstruction`` once built.

    The model is built in ``configure_model``, after every config has been checked; toy targets are trained there.

    Args:
        target: What is decomposed: ``kind`` (``tms``, ``resid_mlp``, ``induction``, ``llama_simple_mlp``, ``hf``) and its fields.
        modules: Number of components by glob pattern of module paths.
        ci_fn: Causal-importance function: ``mode``, ``fn_type`` and its fields.
        losses: Training losses: ``name``, ``coeff`` and their fields.
        metrics: Evaluations: any loss without ``coeff``, or a measure, by ``name``.
        identity_modules: Number of components by pattern, for identities inserted in front of modules.
        tie: Let modules whose weights are transposes of one another share their components.
        sigmoid: From logits to importances.
        sampling: ``continuous`` or ``binomial`` masks.
        use_delta: Treat what the components leave of the weights as one more component.
        output_loss: ``mse`` or ``kl``; null = the target's own.
        seed: Of components, masks and attacks; null = the run's ``seed_everything``. The datamodule has its own.
        target_seed: Of the target's training; null = ``seed``.
        lr: Learning rate of AdamW.
        betas: Its decay rates.
        weight_decay: Decoupled weight decay.
        schedule: ``constant``, ``linear`` or ``cosine`` over the trainer's ``max_steps``.
        warmup_fraction: Fraction of all steps over which the learning rate rises from 0.
        final_lr_fraction: Where a decaying schedule ends.
        clip_components: Gradient-norm clip of the components; 0 = off.
        clip_ci_fn: Gradient-norm clip of the causal-importance functions; 0 = off.
        faithfulness_steps: AdamW steps on faithfulness alone before training.
        faithfulness_lr: Their learning rate.
        faithfulness_weight_decay: Their weight decay.
        micro_batch_size: Rows per forward pass on one rank; null = all at once.
    """

    def __init__(
        self,
        target: dict[str, Any],
        modules: dict[str, int],
        ci_fn: dict[str, Any],
        losses: list[dict[str, Any]] = [],  # noqa: B006  (never changed; jsonargparse shows it in --help)
        metrics: list[dict[str, Any]] = [],  # noqa: B006
        identity_modules: dict[str, int] | None = None,
        tie: bool = True,
        sigmoid: str = "leaky_hard",
        sampling: str = "continuous",
        use_delta: bool = True,
        output_loss: str | None = None,
        seed: int | None = None,
        target_seed: int | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: str = "cosine",
        warmup_fraction: float = 0.0,
        final_lr_fraction: float = 0.0,
        clip_components: float = 0.0,
        clip_ci_fn: float = 0.0,
        faithfulness_steps: int = 0,
        faithfulness_lr: float = 1e-3,
        faithfulness_weight_decay: float = 0.0,
        micro_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        check_target(target)
        self.target_spec, self.module_counts, self.ci_fn_spec = target, modules, ci_fn
        self.identity_modules, self.tie = identity_modules, tie
        self.sigmoid, self.sampling, self.use_delta, self.output_loss = sigmoid, sampling, use_delta, output_loss
        self.run_seed = run_seed(seed)
        self.target_seed = self.run_seed if target_seed is None else target_seed
        self.objectives = training_losses(losses)
        self.measures = build_measures(metrics)
        for measure in self.measures:
            if isinstance(measure, PersistentPGDEval):
                measure.bind(self.objectives)
        schedule_factor(0, 1, schedule)
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.schedule, self.warmup_fraction, self.final_lr_fraction = schedule, warmup_fraction, final_lr_fraction
        self.clip_components, self.clip_ci_fn = clip_components, clip_ci_fn
        self.faithfulness_steps, self.faithfulness_lr = faithfulness_steps, faithfulness_lr
        self.faithfulness_weight_decay = faithfulness_weight_decay
        self.micro_batch_size = micro_batch_size
        self.target: Target | None = None
        self.built: Decomposition | None = None
        self.batch_arithmetic: BatchArithmetic | None = None
        self._evaluation: Evaluation | None = None

    # ------------------------------------------------------------------ building

    def configure_model(self) -> None:
        """Build the target, train it if it is a toy, and draw the components; once."""
        if self.built is None:
            self.target = build_target(self.target_spec, self.target_seed)
            ties = [pair for pair in self.target.tied if self.tie]
            model = ComponentModel(self.target.module, self.module_counts, self.identity_modules, ties, self.target.output_attr)
            kind = cast(Any, self.output_loss or self.target.output_loss)
            self.built = Decomposition(model, self.ci_fn_spec, self.sigmoid, self.sampling, self.use_delta, kind)
            self.built.initialise(self.run_seed)

    @property
    def decomposition(self) -> Decomposition:
        """The decomposition. Raises ``RuntimeError`` before ``configure_model``."""
        if self.built is None:
            raise RuntimeError("The decomposition has not been built yet; call configure_model() first (a Trainer does).")
        return self.built

    @property
    def provenance(self) -> dict[str, Any]:
        """How the target came about, for the manifest."""
        return {} if self.target is None else self.target.provenance

    # ------------------------------------------------------------------ MaskedReconstruction

    def leading_shape(self, batch: Any) -> tuple[int, ...]:
        """See :class:`~theodolite.lightning_modules.decomposition.decomposition.Decomposition`; likewise the next four."""
        return self.decomposition.leading_shape(batch)

    def source_channels(self) -> dict[str, int]:
        """Source channels by module."""
        return self.decomposition.source_channels()

    def prepare(self, batch: Any) -> Prepared:
        """What every step of an attack shares."""
        return self.decomposition.prepare(batch)

    def loss_sum(self, prepared: Prepared, sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Summed loss under sources, and its count."""
        return self.decomposition.loss_sum(prepared, sources)

    def slope_sum(self, prepared: Prepared, sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The same for its gradient alone."""
        return self.decomposition.slope_sum(prepared, sources)

    # ------------------------------------------------------------------ ComponentView

    def importances(self, batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """By module, lower causal importances and logits (..., C)."""
        prepared = self.prepare(batch)
        return {name: (lower, prepared.logits[name]) for name, lower in prepared.lower.items()}

    def component_matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By module, V (d_in, C) and U (C, d_out)."""
        return {n: (s.components.V.detach(), s.components.U.detach()) for n, s in self.decomposition.model.sites.items()}

    def one_hot_batch(self) -> Tensor | None:
        """Inputs with one active feature each; None where the target reads tokens."""
        features = None if self.target is None else self.target.features
        return None if features is None else one_hot_probe(self.decomposition, features)

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """Split the global batch, and refuse what cannot be trained."""
        if not self.objectives:
            raise ValueError("model.losses is empty, so there is nothing to train; list losses, or run validate.")
        size = getattr(getattr(self.trainer, "datamodule", None), "global_batch_size", None)
        if not isinstance(size, int):
            raise TypeError("The datamodule does not say global_batch_size, the number of rows per optimizer step over all ranks.")
        if self.trainer.max_steps < 1:
            raise ValueError("trainer.max_steps must be set: schedules and annealing are fractions of it.")
        for objective in self.objectives:
            if isinstance(objective, PersistentPGDRecon):
                objective.plan(self.trainer.max_steps)
            if isinstance(objective, ImportanceMinimality):
                objective.charged(self.decomposition.names)
        self.batch_arithmetic = split_batch(size, self.trainer.world_size, micro=self.micro_batch_size)

    def on_train_start(self) -> None:
        """Make the components faithful before anything else, once."""
        if self.global_step == 0 and self.faithfulness_steps:
            loss = self.make_faithful()
            self.print(f"faithfulness after {self.faithfulness_steps} steps of its own: {loss:.3g}")

    def make_faithful(self) -> float:
        """AdamW on faithfulness alone; the same on every rank. Returns the last loss."""
        parts = self.decomposition
        optimizer = AdamW(parts.model.component_parameters(), lr=self.faithfulness_lr, weight_decay=self.faithfulness_weight_decay)
        loss = torch.zeros(())
        for _ in range(self.faithfulness_steps):
            optimizer.zero_grad()
            loss = faithfulness(parts.model.deltas().values())
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One optimizer step on the global batch."""
        assert self.batch_arithmetic is not None
        rows = input_tensor(batch)
        optimizer = cast(LightningOptimizer, self.optimizers())
        optimizer.zero_grad()
        step = StepBatch(
            microbatches(rows, self.global_rank, self.trainer.world_size, self.micro_batch_size),
            self.batch_arithmetic.global_batch,
            (self.run_seed, "train", self.global_step),
            self.global_step,
            self.global_step / self.trainer.max_steps,
        )
        shares = step_gradients(self.decomposition, self.objectives, step, self.manual_backward, self._without_gradient_sync)
        sum_gradients(self.trained_parameters())
        logging = self.trainer._logger_connector.should_update_logs
        norms = self._gradient_norms() if logging else {}
        optimizer.step()
        rate = optimizer.param_groups[0]["lr"]
        cast(Any, self.lr_schedulers()).step()
        if logging:
            self._log_step(shares, norms, rate)

    def _log_step(self, shares: Mapping[str, Tensor], norms: Mapping[str, float], rate: float) -> None:
        each = gather_objects({label: float(share) for label, share in shares.items()})
        for label in each[0]:
            self._log(f"train/{label if label == 'total' else f'loss/{label}'}", math.fsum(rank[label] for rank in each))
        for name, value in norms.items():
            self._log(f"train/grad_norm/{name}", value)
        self._log("train/lr", rate)

    def _log(self, name: str, value: float) -> None:
        self.log(name, torch.tensor(value, dtype=torch.float64), sync_dist=False, rank_zero_only=False, batch_size=1)

    def _gradient_norms(self) -> dict[str, float]:
        """Norms before clipping."""
        groups = {"components": self.decomposition.model.component_parameters(), "ci_fn": list(self.decomposition.ci_fn.parameters())}
        return {name: float(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for name, group in groups.items()}

    def trained_parameters(self) -> list[nn.Parameter]:
        """Components, then causal-importance functions."""
        return [*self.decomposition.model.component_parameters(), *self.decomposition.ci_fn.parameters()]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Runs after every callback's hook of this name: clip components and causal-importance functions, each by its own norm."""
        if self.clip_components > 0:
            nn.utils.clip_grad_norm_(self.decomposition.model.component_parameters(), self.clip_components)
        if self.clip_ci_fn > 0:
            nn.utils.clip_grad_norm_(self.decomposition.ci_fn.parameters(), self.clip_ci_fn)

    def configure_optimizers(self) -> Any:
        """AdamW on components and causal-importance functions, with the schedule per optimizer step."""
        # a fused optimizer would leave the unscaling of gradients to itself, after the clipping
        fused = getattr(self.trainer.precision_plugin, "scaler", None) is None
        optimizer = AdamW(self.trained_parameters(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=fused)
        steps = max(1, self.trainer.max_steps)
        rates = LambdaLR(optimizer, lambda step: schedule_factor(step, steps, self.schedule, self.warmup_fraction, self.final_lr_fraction))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def _without_gradient_sync(self) -> AbstractContextManager[Any]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what losses carry from step to step, such as the sources of a persistent adversary."""
        checkpoint["objectives"] = {o.label: o.state_dict() for o in self._with_state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        for objective in self._with_state():
            objective.load_state_dict(checkpoint["objectives"][objective.label])

    def _with_state(self) -> list[Any]:
        return [o for o in self.objectives if isinstance(o, WholeBatchObjective) and hasattr(o, "state_dict")]

    # ------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        fraction = self.global_step / self.trainer.max_steps if self.trainer.max_steps > 0 else 1.0
        self._evaluation = Evaluation(self.decomposition, self.measures, self.run_seed, min(1.0, fraction), self.micro_batch_size)

    def on_test_epoch_start(self) -> None:
        """As in validation."""
        self.on_validation_epoch_start()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to every measure."""
        assert self._evaluation is not None
        # standalone evaluations run in inference mode, whose tensors no attack can differentiate
        with torch.inference_mode(False), torch.no_grad():
            self._evaluation.add(input_tensor(batch).clone(), batch_idx, self.global_rank, self.trainer.world_size)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log every measure over all ranks' rows."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self._finish("test")

    def _finish(self, phase: str) -> None:
        assert self._evaluation is not None
        with torch.inference_mode(False), torch.no_grad():
            numbers = self._evaluation.compute(self.target)
        for name, value in numbers.items():
            self._log(f"{phase}/{name}", value)
        self._evaluation = None
