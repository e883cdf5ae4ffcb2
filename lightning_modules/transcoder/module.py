"""Training transcoders and sparse autoencoders, nested prefixes included.

Run it (CPU; a language model trained on the spot, then its transcoders)::

    make demo-transcoder

On real models::

    theodolite fit --config configs/transcoder/gpt2.yaml
    torchrun --nproc_per_node=2 train.py fit --config configs/transcoder/gpt2.yaml --trainer.devices=2 --trainer.strategy=ddp

Where it deviates from the papers: docs/transcoder.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from theodolite.batch_arithmetic import BatchArithmetic, split_batch
from theodolite.distributed import sum_gradients, sum_over_ranks
from theodolite.functional.activation_threshold import update_mean
from theodolite.functional.prefixes import resolve_prefixes
from theodolite.seeds import run_seed

from ..manual import SCHEDULES, ManualModule
from .evaluation import CoderEvaluation, held_out_threshold, prefix_metrics
from .exports import export_coder, pretrained_coder
from .memory import fitting_memory
from .selection import Moments, global_moments
from .training import LossSettings, StepResult, training_loss
from .transcoder import Activation, DecoderNorm, Init, Normalise, Transcoder


class TranscoderModule(ManualModule):
    """Train a :class:`~theodolite.lightning_modules.transcoder.transcoder.Transcoder` on pairs of activations.

    The loss is a sum over the rows of the *global* batch divided by that batch's total variance, BatchTopK selects over the global batch,
    and gradients are summed over ranks: a step does not depend on the number of ranks.

    Batches are mappings with ``input`` (N, d_in) and ``target`` (N, d_out), this rank's rows of the global batch.

    Args:
        latents: Size of the dictionary; null = ``expansion`` times the input's width.
        expansion: See ``latents``.
        k: Active latents per token (``topk``) or on average (``batchtopk``).
        activation: ``topk``, ``batchtopk`` or ``jumprelu``.
        prefixes: Cumulative sizes of the nested prefixes, the last one all latents, or fractions of them that end in 1; null = no nesting.
        prefix_blocks: The same as sizes of the blocks between prefixes.
        prefix_weights: Weight of each prefix's loss, normalised to sum 1; null = uniform.
        skip: Add a linear map of the input.
        decoder_norm: ``unit``, ``free`` or ``rescaled``.
        init: ``tied``, ``random`` or ``zeros`` (decoder).
        bias_init: Start the decoder's bias at the first global batch's mean target (``mean``) or at 0 (``zero``).
        normalise: Units in which the coder works, from the first global batch: ``none``; ``scale``: input and target each divided by
            their root mean square; ``standardise``: their means are subtracted first.
        auxiliary: Weight of the loss that revives dead latents; 0 = off.
        auxiliary_k: Dead latents per token that take part; null = half the target's width.
        auxiliary_levels: Dead latents explain what is left after their own prefix, not after the last one.
        dead_after_tokens: A latent is dead when it was not active for so many tokens.
        threshold_decay: Of the running inference threshold of ``batchtopk``.
        jumprelu_threshold: Initial threshold of ``jumprelu``.
        jumprelu_width: Width of the kernel through which its thresholds learn.
        l0_coefficient: Weight of its mean number of active latents in the loss.
        l0_warmup_steps: Steps over which that weight rises linearly.
        lr: Learning rate; null = 2e-4 / sqrt(latents / 16384).
        betas: Adam's decay rates.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        schedule: ``constant``, or ``cosine`` or ``linear`` to ``min_lr_fraction`` over the trainer's ``max_steps``.
        min_lr_fraction: Where a decaying schedule ends.
        max_grad_norm: Gradient-norm clip after all callbacks; 0 = off.
        calibrate: When training ends, set the inference threshold so that k latents are active per held-out token on average
            (``topk``, ``batchtopk``; the datamodule's validation data).
        export: Then save the coder in the run directory: ``transcoder/`` in raw units, and ``transcoder/saelens/`` for SAELens.
        pretrained: Folder of a coder of this package, of SAELens or of sparsify to start from or to evaluate; it brings its own sizes,
            activation, selection and units.
        d_in: Width of the input; null = what the datamodule says.
        d_out: Width of the target; null likewise.
        seed: Seed of the initialisation; null = the run's ``seed_everything``.

    Attributes:
        logs_fvu_as: What its FVU is called in the logs, so that no callback logs another one under the same name.
    """

    logs_fvu_as = "fvu"

    def __init__(
        self,
        latents: int | None = None,
        expansion: int = 16,
        k: int = 32,
        activation: Activation = "batchtopk",
        prefixes: list[float] | None = None,
        prefix_blocks: list[int] | None = None,
        prefix_weights: list[float] | None = None,
        skip: bool = False,
        decoder_norm: DecoderNorm = "unit",
        init: Init = "random",
        bias_init: Literal["mean", "zero"] = "mean",
        normalise: Normalise = "scale",
        auxiliary: float = 1 / 32,
        auxiliary_k: int | None = None,
        auxiliary_levels: bool = True,
        dead_after_tokens: int = 10_000_000,
        threshold_decay: float = 0.999,
        jumprelu_threshold: float = 0.001,
        jumprelu_width: float = 0.001,
        l0_coefficient: float = 0.0,
        l0_warmup_steps: int = 0,
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 1000,
        schedule: str = "constant",
        min_lr_fraction: float = 0.0,
        max_grad_norm: float = 1.0,
        calibrate: bool = True,
        export: bool = True,
        pretrained: str | None = None,
        d_in: int | None = None,
        d_out: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        for name, value, allowed in (
            ("schedule", schedule, SCHEDULES),
            ("bias_init", bias_init, ("mean", "zero")),
            ("normalise", normalise, ("none", "scale", "standardise")),
        ):
            if value not in allowed:
                raise ValueError(f"model.{name} is {value!r}; choose one of {', '.join(allowed)}.")
        self.latents, self.expansion, self.k, self.skip = latents, expansion, k, skip
        self.activation: Activation = activation
        self.decoder_norm: DecoderNorm = decoder_norm
        self.init: Init = init
        self.normalise: Normalise = normalise
        self.nesting = {"prefixes": prefixes, "blocks": prefix_blocks}
        self.prefix_weights, self.bias_init = prefix_weights, bias_init
        self.auxiliary, self.auxiliary_k, self.auxiliary_levels = auxiliary, auxiliary_k, auxiliary_levels
        self.dead_after_tokens, self.threshold_decay = dead_after_tokens, threshold_decay
        self.jumprelu_threshold, self.jumprelu_width = jumprelu_threshold, jumprelu_width
        self.l0_coefficient, self.l0_warmup_steps = l0_coefficient, l0_warmup_steps
        self.lr, self.betas, self.warmup_steps = lr, betas, warmup_steps
        self.schedule, self.min_lr_fraction, self.max_grad_norm = schedule, min_lr_fraction, max_grad_norm
        self.calibrate, self.export, self.pretrained = calibrate, export, pretrained
        self.d_in, self.d_out, self.run_seed = d_in, d_out, run_seed(seed)
        self.batch_arithmetic: BatchArithmetic | None = None
        self.seconds = {}
        self._coder: Transcoder | None = None
        self._evaluation: CoderEvaluation | None = None

    # ------------------------------------------------------------------ building

    def configure_model(self) -> None:
        """Build the coder once, with the widths of the data; Lightning calls this before fit, validate and test."""
        if self._coder is not None:
            return
        self._coder = self._new_coder() if self.pretrained is None else pretrained_coder(self.pretrained, self._datamodule())
        weights = torch.tensor(self.prefix_weights or [1.0] * len(self._coder.prefixes))
        if len(weights) != len(self._coder.prefixes) or not weights.sum() > 0 or bool((weights < 0).any()):
            raise ValueError(
                f"model.prefix_weights is {self.prefix_weights}; give {len(self._coder.prefixes)} weights that are not negative."
            )
        self._weights: Tensor
        self.register_buffer("_weights", weights / weights.sum(), persistent=False)
        self.lr = 2e-4 / (self._coder.latents / 2**14) ** 0.5 if self.lr is None else self.lr

    def _new_coder(self) -> Transcoder:
        d_in, d_out = self._width("d_in", "input_width"), self._width("d_out", "target_width")
        latents = self.latents or self.expansion * d_in
        return Transcoder(
            d_in, d_out, latents, self.k, self.activation, resolve_prefixes(latents, **self.nesting), self.skip, self.decoder_norm,
            self.init, self.jumprelu_threshold, self.run_seed,
        )  # fmt: skip

    def _width(self, own: str, offered: str) -> int:
        data = self._datamodule()
        width = getattr(self, own) or getattr(data, offered, None)
        if not isinstance(width, int):
            raise ValueError(f"model.{own} is null and {type(data).__name__} does not say its {offered}; give model.{own}.")
        return width

    def _datamodule(self) -> Any:
        """The Trainer's datamodule; None where there is no Trainer, as for a coder that is only loaded."""
        return None if self._trainer is None else super()._datamodule()

    @property
    def coder(self) -> Transcoder:
        """The coder. Raises ``RuntimeError`` before ``configure_model``."""
        if self._coder is None:
            raise RuntimeError("The transcoder has not been built yet; call configure_model() first (a Trainer does).")
        return self._coder

    def forward(self, inputs: Tensor) -> Tensor:
        """Reconstruct raw inputs (..., d_in) by the inference rule."""
        return self.coder(inputs)

    def setup(self, stage: str) -> None:
        """Refuse weights in 16 bits (Adam's steps are below their resolution) and scaled gradients (clipping would see the scale)."""
        if str(self.trainer.precision) in ("bf16-true", "16-true", "16-mixed"):
            raise ValueError(f"trainer.precision={self.trainer.precision} cannot train a coder; use bf16-mixed or 32-true.")

    def on_fit_start(self) -> None:
        """Split the global batch over ranks, and refuse what will not fit into memory: the language model is not loaded yet."""
        size = getattr(self._datamodule(), "global_batch_size", None)
        if isinstance(size, int):
            self.batch_arithmetic = split_batch(size, self.trainer.world_size)
            rank_zero_info(fitting_memory(self.coder, self.batch_arithmetic.micro, self._datamodule(), self.device))
        self.coder.calibrate(math.nan)  # a coder that was loaded goes on with what its training had, not with its fixed threshold
        rank_zero_info(f"{self.coder.latents} latents, {sum(p.numel() for p in self.coder.parameters()):,} parameters")

    def configure_optimizers(self) -> Any:
        """Adam with the configured warm-up and schedule per optimizer step."""
        lr = cast(float, self.lr)
        optimizer = Adam(self.coder.parameters(), lr=lr, betas=self.betas, fused=True)
        scheduler = LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ------------------------------------------------------------------ one step

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """One optimizer step on the global batch."""
        coder = self.coder
        if not bool(coder.initialised):
            coder.initialise(global_moments(batch["input"]), global_moments(batch["target"]), self.normalise, self.bias_init == "mean")
        inputs, target = coder.normalise_input(batch["input"]), coder.normalise_target(batch["target"])
        moments = global_moments(target)
        optimizer = cast(LightningOptimizer, self.optimizers())
        optimizer.zero_grad()
        step = training_loss(coder, inputs, target, moments, self._loss_settings())
        with self._without_gradient_sync():
            self.manual_backward(step.loss)
        sum_gradients(coder.parameters())
        optimizer.step()
        coder.renormalise_decoder()
        counts = sum_over_ranks(step.codes.counts())
        coder.count_tokens(moments.count, counts > 0)
        if step.threshold is not None:
            coder.threshold_state.copy_(update_mean(coder.threshold_state, step.threshold, self.threshold_decay))
        every = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if every and self.trainer.global_step % every == 0:  # making numbers that nobody reads would cost a tenth of a small step
            self._log_step(step, moments, counts, optimizer.param_groups[0]["lr"])
        cast(Any, self.lr_schedulers()).step()

    def _loss_settings(self) -> LossSettings:
        ramp = min(1.0, (self.trainer.global_step + 1) / self.l0_warmup_steps) if self.l0_warmup_steps else 1.0
        return LossSettings(
            weights=self._weights,
            auxiliary=self.auxiliary,
            auxiliary_k=self.auxiliary_k or max(1, self.coder.d_out // 2),
            auxiliary_levels=self.auxiliary_levels,
            dead_after_tokens=self.dead_after_tokens,
            l0_coefficient=self.l0_coefficient * ramp,
            width=self.jumprelu_width,
        )

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Runs after every callback's hook of this name: project the decoder's gradient, then clip."""
        self.coder.project_decoder_gradient()
        if self.max_grad_norm > 0:  # torch's own: Lightning's refuses a fused Adam under autocast, though gradients are never scaled here
            torch.nn.utils.clip_grad_norm_(self.coder.parameters(), self.max_grad_norm)

    def _log_step(self, step: StepResult, moments: Moments, counts: Tensor, lr: float) -> None:
        sums = sum_over_ranks(torch.cat([step.residuals, step.auxiliary.double()[None], step.loss.detach().double()[None]]))
        fvu = sums[:-2] / moments.variance
        dead = (self.coder.tokens_since_active >= self.dead_after_tokens).double().mean()
        values = prefix_metrics(self.coder.prefixes.tolist(), fvu) | {
            "loss": sums[-1],
            "auxiliary_loss": sums[-2],
            "l0": counts.sum() / moments.count,
            "dead_fraction": dead,
            "lr": torch.tensor(lr),
        }
        if self.coder.activation == "batchtopk":
            values["threshold"] = self.coder.threshold[0]
        shown = {f"train/{name}": value.float() for name, value in values.items()}
        self.log_dict(shown, rank_zero_only=False, sync_dist=False)
        self.log("fvu", fvu[-1].float(), prog_bar=True, logger=False, rank_zero_only=False, sync_dist=False)

    # ------------------------------------------------------------------ after training

    def on_train_end(self) -> None:
        """Calibrate the inference threshold, then export."""
        if self.trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        if self.calibrate and self.coder.activation != "jumprelu" and hasattr(self._datamodule(), "val_dataloader"):
            self.coder.calibrate(held_out_threshold(self.coder, self._datamodule().val_dataloader()))
        if self.export and self.global_rank == 0:
            export_coder(self.coder, self._datamodule(), Path(self.trainer.default_root_dir) / "transcoder")

    # ------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        """Forget earlier evaluations."""
        self._evaluation = CoderEvaluation(self.coder)

    def on_test_epoch_start(self) -> None:
        """Forget earlier evaluations."""
        self.on_validation_epoch_start()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Run the coder by its inference rule; a rank that has run out of rows gets none."""
        assert self._evaluation is not None
        self._evaluation.add(batch["input"], batch["target"])

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """As ``validation_step``."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the numbers over all ranks."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the numbers over all ranks."""
        self._report("test")

    def _report(self, stage: str) -> None:
        assert self._evaluation is not None
        values = {f"{stage}/{name}": value.float() for name, value in self._evaluation.metrics().items()}
        self.log_dict(values, rank_zero_only=False, sync_dist=False)
