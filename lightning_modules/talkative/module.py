"""A verbaliser that describes activations and reconstructors that read the descriptions: what all ways of training them share.

The subclasses train it: :class:`TalkativeSFT` on captions, :class:`TalkativeGumbel` through straight-through samples, and
:class:`TalkativeGRPO` on rewards. This class alone evaluates one::

    theodolite test --config configs/talkative/k_sweep.yaml --model.weights runs/sft/talkative
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from theodolite.batch_arithmetic import BatchArithmetic, split_batch
from theodolite.distributed import gather_objects, sum_gradients
from theodolite.functional.talkative_losses import RECONSTRUCTION_LOSSES
from theodolite.protocols import ActivationRows
from theodolite.seeds import derive_seed, run_seed

from ..decoding import Decoded, Sampling
from ..evaluation import add_sums
from ..manual import SCHEDULES, ManualModule
from .build import build_verbaliser, shared_tokenizer
from .captions import caption_ids
from .evaluation import evaluation_metrics, evaluation_sums
from .hashing import weights_hash
from .reconstructor import TextReconstructor, build_reconstructor
from .settings import ReconstructorSettings, VerbaliserSettings, check_loss, choice
from .verbaliser import ActivationVerbaliser
from .weights import load_weights, save_weights

Sums = dict[str, tuple[float, float]]


class TalkativeModule(ManualModule):
    """A talkative autoencoder (a ``theodolite.protocols.TalkativeAutoencoder``): activations to texts and back.

    Args:
        verbaliser: See :class:`~theodolite.lightning_modules.talkative.settings.VerbaliserSettings`.
        reconstructor: The one that trains with the verbaliser; see
            :class:`~theodolite.lightning_modules.talkative.settings.ReconstructorSettings`.
        held_out: A second one, which learns from captions alone and never sees what a policy writes; null = none.
        weights: Folder ``talkative`` that an earlier run exported; its settings must be these.
        width: d of the activations; null = the datamodule's ``width``.
        dtype: Of the language models: ``float32``, ``bfloat16`` or ``float16``. Projections and heads are float32.
        loss: ``relative_mse``, ``directional`` or ``mse``, of standardised activations; also the reward, negated.
        max_new_tokens: Length of a text, or its limit.
        temperature: Of sampling, in training and evaluation.
        eval_samples: Texts per held-out activation in validation.
        seed: Of sampling and of random initialisations; null = the run's ``seed_everything``.
        lr: Learning rate of the verbaliser's language model.
        injection_lr: Factor on ``lr`` for the projection.
        reconstructor_lr: Factor on ``lr`` for the reconstructors.
        betas: Adam's decay rates.
        weight_decay: Decoupled weight decay.
        warmup_steps: Optimizer steps over which the learning rates rise linearly.
        schedule: ``constant``, or ``cosine`` or ``linear`` to ``min_lr_fraction`` over the trainer's ``max_steps``.
        min_lr_fraction: Where a decaying schedule ends.
        max_grad_norm: Gradient-norm clip over everything that trains; 0 = off.
        micro_batch_size: Texts per forward pass on one rank; null = all of a step's at once.
        export: Save the folder ``talkative`` at the end of a fit.
    """

    texts_per_row = 1

    def __init__(
        self,
        verbaliser: VerbaliserSettings,
        reconstructor: ReconstructorSettings,
        held_out: ReconstructorSettings | None = None,
        weights: str | None = None,
        width: int | None = None,
        dtype: str = "float32",
        loss: str = "relative_mse",
        max_new_tokens: int = 8,
        temperature: float = 1.0,
        eval_samples: int = 4,
        seed: int | None = None,
        lr: float = 1e-4,
        injection_lr: float = 10.0,
        reconstructor_lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: str = "constant",
        min_lr_fraction: float = 0.0,
        max_grad_norm: float = 1.0,
        micro_batch_size: int | None = None,
        export: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["verbaliser", "reconstructor", "held_out"])
        self.automatic_optimization = False
        verbaliser.check()
        reconstructor.check("reconstructor")
        if held_out is not None:
            held_out.check("held_out")
        check_loss("loss", loss)
        choice("schedule", schedule, SCHEDULES)
        if weights is not None and not (Path(weights) / "talkative.json").is_file():
            raise ValueError(f"model.weights is {weights!r}, which holds no talkative.json; name the folder talkative of a finished run.")
        self.settings = {"verbaliser": verbaliser, "reconstructor": reconstructor, "held_out": held_out}
        self.verbaliser_settings, self.weights, self.width, self.dtype_name = verbaliser, weights, width, dtype
        self.loss_name, self.row_loss = loss, RECONSTRUCTION_LOSSES[loss]
        self.sampling, self.eval_samples = Sampling(max_new_tokens, temperature), eval_samples
        self.run_seed = run_seed(seed)
        self.lr, self.injection_lr, self.reconstructor_lr = lr, injection_lr, reconstructor_lr
        self.betas, self.weight_decay = betas, weight_decay
        self.warmup_steps, self.schedule, self.min_lr_fraction, self.max_grad_norm = warmup_steps, schedule, min_lr_fraction, max_grad_norm
        self.micro_batch_size, self.export = micro_batch_size, export
        self.batch_arithmetic: BatchArithmetic | None = None
        self.model_id = verbaliser.model if isinstance(verbaliser.model, str) else None
        self.model_revision = verbaliser.revision
        self.seconds: dict[str, float] = {}
        self.verbaliser: nn.Module | None = None
        self.readers = nn.ModuleDict()
        self._reference: dict[str, Tensor] = {}  # in no submodule: never trained or saved
        self._evaluated: list[Sums] = []

    def configure_model(self) -> None:
        """Build everything once; Lightning calls this before fit, validate and test, and before a checkpoint is loaded."""
        if self.verbaliser is not None:
            return
        width = self.width if self.width is not None else getattr(self._datamodule(), "width", None)
        if not isinstance(width, int):
            raise ValueError(f"model.width is not set and {type(self._datamodule()).__name__} does not say the width of its activations.")
        tokenizer = shared_tokenizer(self.verbaliser_settings)
        self.verbaliser = build_verbaliser(self.verbaliser_settings, width, self.dtype_name, self.run_seed, tokenizer)
        for name in ("reconstructor", "held_out"):
            settings = cast("ReconstructorSettings | None", self.settings[name])
            if settings is not None:
                self.readers[name] = build_reconstructor(settings, name, width, self.dtype_name, tokenizer)
        if self.weights is not None:
            load_weights(self, Path(self.weights))
        elif self.verbaliser_settings.standardise:
            self._standardise()
        self.freeze_parts()
        self._reference = {name: p.detach().clone() for name, p in self.verbaliser.named_parameters() if p.requires_grad}

    def load_exported(self, folder: str) -> None:
        """Take the weights that an earlier run exported.

        Raises:
            ValueError: If the folder was made with other settings, or its file was changed.
        """
        load_weights(self, Path(folder))

    def freeze_parts(self) -> None:
        """Called once everything is built: a subclass freezes what its objective must not train. Here nothing of a reconstructor learns."""
        self.readers.requires_grad_(False)

    def _standardise(self) -> None:
        statistics = getattr(self._datamodule(), "statistics", None)
        if statistics is None:
            raise ValueError(
                f"{type(self._datamodule()).__name__} offers no statistics to standardise activations with; "
                f"use one that does, load model.weights, or set model.verbaliser.standardise to false."
            )
        mean, scale = statistics()
        for part in (self.writer, *self.texts_to_vectors.values()):
            part.standardise.set(mean, scale)

    @property
    def writer(self) -> ActivationVerbaliser:
        """The verbaliser. Raises ``RuntimeError`` before ``configure_model``."""
        if self.verbaliser is None:
            raise RuntimeError("The verbaliser has not been built yet; call configure_model() first (a Trainer does).")
        return cast(ActivationVerbaliser, self.verbaliser)

    @property
    def texts_to_vectors(self) -> dict[str, TextReconstructor]:
        """The reconstructors by name, the in-loop one first."""
        return {name: cast(TextReconstructor, part) for name, part in self.readers.items()}

    @property
    def in_loop(self) -> TextReconstructor:
        """The reconstructor that trains with the verbaliser."""
        return self.texts_to_vectors["reconstructor"]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Shared by verbaliser and reconstructors."""
        return self.in_loop.tokenizer

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that are optimised, in the module's order."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def configure_optimizers(self) -> Any:
        """AdamW with one group per part, and the configured warm-up and schedule per optimizer step."""
        parts = ((self.writer.lm, 1.0), (self.writer.injection, self.injection_lr), (self.readers, self.reconstructor_lr))
        trained = [([p for p in part.parameters() if p.requires_grad], factor) for part, factor in parts]
        groups = [{"params": parameters, "lr": self.lr * factor} for parameters, factor in trained if parameters]
        optimizer = AdamW(groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, self._lr_factor), "interval": "step"}}

    @property
    def reconstructors(self) -> Mapping[str, TextReconstructor]:
        """By name; the first selects among candidates."""
        return self.texts_to_vectors

    def describe(
        self, activations: Tensor, ids: Sequence[str], candidates: range, temperature: float, max_new_tokens: int, seed: int
    ) -> list[list[str]]:
        """See ``theodolite.protocols.Verbaliser``; an unfinished text counts as no text."""
        greedy = temperature == 0
        sampling = Sampling(max_new_tokens, 1.0 if greedy else temperature, top_k=1 if greedy else 0)
        seeds = [[derive_seed("describe", seed, name, candidate) for candidate in candidates] for name in ids]
        if not ids or not candidates:
            return [[] for _ in ids]
        texts = self.texts(self.writer.write(activations, seeds, sampling))
        return [texts[i : i + len(candidates)] for i in range(0, len(texts), len(candidates))]

    def fingerprint(self) -> str:
        """Content hash of the verbaliser: weights, prompt, tokenizer, how the activation is put in."""
        return weights_hash(self.writer, asdict(self.verbaliser_settings) | {"vocabulary": self.tokenizer.get_vocab()})

    def texts(self, decoded: Decoded) -> list[str]:
        """The written texts; empty where one may end by itself and did not."""
        ids = [row[:n] for row, n in zip(decoded.ids.tolist(), decoded.lengths.tolist(), strict=True)]
        texts = cast("list[str]", self.tokenizer.batch_decode(ids, skip_special_tokens=True))
        usable = torch.ones_like(decoded.stopped) if self.verbaliser_settings.fixed_length else decoded.stopped
        return [text.strip() if good else "" for text, good in zip(texts, usable.tolist(), strict=True)]

    def caption_ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See :func:`~theodolite.lightning_modules.talkative.captions.caption_ids`."""
        return caption_ids(self.in_loop, texts, self.sampling.max_new_tokens, self.verbaliser_settings.fixed_length)

    def on_fit_start(self) -> None:
        """Split the global batch over ranks."""
        if type(self).accumulate is TalkativeModule.accumulate:
            raise ValueError("TalkativeModule does not train; use TalkativeSFT, TalkativeGumbel or TalkativeGRPO.")
        size = getattr(self._datamodule(), "global_batch_size", None)
        if not isinstance(size, int):
            raise TypeError(f"{type(self._datamodule()).__name__} does not say global_batch_size; training needs the global rows per step.")
        self.batch_arithmetic = split_batch(size, self.trainer.world_size, self.texts_per_row, self.micro_batch_size)
        rank_zero_info(f"training {sum(p.numel() for p in self.trainable_parameters()):,} parameters")

    def on_train_start(self) -> None:
        """No dropout: between sampling, scoring and reference log-probabilities it would be noise in every ratio."""
        self.eval()

    def accumulate(self, rows: ActivationRows) -> Sums:
        """Add this rank's part of the step's gradient to ``p.grad``; returns (sum, count) pairs, losses with count 0."""
        raise ValueError("TalkativeModule does not train; use TalkativeSFT, TalkativeGumbel or TalkativeGRPO.")

    def training_step(self, batch: ActivationRows, batch_idx: int) -> None:
        """One optimizer step on the global batch, microbatch by microbatch."""
        self.seconds = {}
        optimizer = cast(LightningOptimizer, self.optimizers())
        optimizer.zero_grad()
        sums = self.accumulate(batch)
        sum_gradients(self.trainable_parameters())
        lr = float(optimizer.param_groups[0]["lr"])
        with self.timed("update"):
            optimizer.step()
            cast(Any, self.lr_schedulers()).step()
        self._log_step(sums, lr)

    def backward_part(self, loss: Tensor) -> None:
        """Backward of one microbatch's share of the loss, without averaging over ranks."""
        with self._without_gradient_sync():
            self.manual_backward(loss)

    def microbatches(self, texts: int) -> list[slice]:
        """Consecutive slices of this rank's texts."""
        size = self.micro_batch_size or max(1, texts)
        return [slice(i, i + size) for i in range(0, texts, size)]

    def row_errors(self, standardised: Tensor, activations: Tensor) -> Tensor:
        """(B,) losses of reconstructions against activations (both on the module's device), in standardised coordinates."""
        return self.row_loss(standardised, self.in_loop.standardise(activations))

    @torch.no_grad()
    def reference_logits(
        self, activations: Tensor, index: Tensor, ids: Tensor, mask: Tensor, prompt: Sequence[int] | None = None
    ) -> Tensor:
        """As the verbaliser's ``forward``, with the weights that it had when the run was built (a copy of what trains, not of the rest)."""
        self._reference = {name: tensor.to(self.device) for name, tensor in self._reference.items()}
        return functional_call(self.writer, self._reference, (activations, index, ids, mask, prompt))

    def _log_step(self, sums: Sums, lr: float) -> None:
        totals = add_sums(gather_objects(sums))
        metrics = {f"train/{name}": total / count if count else total for name, (total, count) in totals.items()}
        seconds = gather_objects(self.seconds)
        metrics |= {f"time/{phase}_s": max(s.get(phase, 0.0) for s in seconds) for phase in self.seconds}
        metrics["train/lr"] = lr
        self.log_dict(metrics, rank_zero_only=False, sync_dist=False)
        self.log("loss", metrics["train/loss"], prog_bar=True, logger=False)

    def on_validation_epoch_start(self) -> None:
        """Forget earlier evaluations."""
        self._evaluated = []

    def on_test_epoch_start(self) -> None:
        """Forget earlier evaluations."""
        self._evaluated = []

    def validation_step(self, batch: ActivationRows, batch_idx: int) -> None:
        """Describe and reconstruct held-out rows; ``batch`` may be empty on a rank that has run out of them."""
        if batch.ids:
            self._evaluated.append(evaluation_sums(self, batch))

    def test_step(self, batch: ActivationRows, batch_idx: int) -> None:
        """As ``validation_step``."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log over all ranks."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log over all ranks."""
        self._report("test")

    def _report(self, stage: str) -> None:
        sums = add_sums([part for parts in gather_objects(self._evaluated) for part in parts])
        metrics = {f"{stage}/{name}": value for name, value in evaluation_metrics(sums).items()}
        self.log_dict(metrics, rank_zero_only=False, sync_dist=False)

    def on_train_end(self) -> None:
        """Export what was trained."""
        if self.export and self.global_rank == 0 and not self.trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            save_weights(self, Path(self.trainer.default_root_dir) / "talkative")
