"""A component model with its causal importances: what losses, metrics and adversaries ask of a decomposition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.functional.causal_importance import jittered_logits, sigmoid_pair
from theodolite.functional.component_masks import ComponentMask, mask_from_source
from theodolite.functional.decomposition_losses import KL_CHUNK_NUMBERS, ReconKind, recon_count, recon_sum
from theodolite.functional.kl_divergence import KLReference, Unembedding, kl_sum

from .ci_functions import ImportanceFunction
from .component_model import ComponentModel
from .components import Known


@dataclass(slots=True)
class Prepared:
    """What every loss on one batch shares.

    Attributes:
        batch: The target's input, rows first.
        target: Its output.
        lower: Lower causal importances by module, (..., C): the masks' lower ends.
        upper_of: From logits to upper importances.
        logits: What both are functions of.
        outputs: Outputs of the decomposed modules in the clean forward pass.
        inputs: Their inputs.
        index: Which microbatch of its step or evaluation batch it is.
        known: What all steps of an attack on it share.
        reference: The target's output, where every step of an attack takes a KL divergence from it.
        unembedding: Where every step of an attack stops before the target's logits, what makes them.
    """

    batch: Tensor
    target: Tensor
    lower: dict[str, Tensor]
    upper_of: Callable[[Tensor], Tensor]
    logits: dict[str, Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    index: int = 0
    known: Known = field(default_factory=Known)
    reference: KLReference | None = None
    unembedding: Unembedding | None = None

    @property
    def upper(self) -> dict[str, Tensor]:
        """Upper importances, which are penalised; computed where they are asked for, which an attack never does."""
        return {name: self.upper_of(z) for name, z in self.logits.items()}

    @property
    def leading(self) -> tuple[int, ...]:
        """Shape of the batch without channels: (rows,) or (rows, positions)."""
        return tuple(next(iter(self.lower.values())).shape[:-1])

    @property
    def positions(self) -> int:
        """Number of positions in the batch."""
        return next(iter(self.lower.values()))[..., 0].numel()

    def detached(self) -> Prepared:
        """The same without graph."""
        lower, logits = ({n: t.detach() for n, t in part.items()} for part in (self.lower, self.logits))
        return Prepared(self.batch, self.target, lower, self.upper_of, logits, self.outputs, self.inputs, self.index)


class Decomposition(nn.Module):
    """Components and causal-importance functions of a target model. Offers ``MaskedReconstruction``.

    Args:
        model: Target and components.
        ci_fn: Configuration of the causal-importance function; see :mod:`~theodolite.lightning_modules.decomposition.ci_functions`.
        sigmoid: From logits to importances; see :data:`~theodolite.functional.causal_importance.SigmoidName`.
        sampling: ``continuous``, or ``binomial``: masks are 0 or 1, and the lower importances' logits are jittered in training.
        use_delta: What the components leave of the weights is one more component, with a mask of its own.
        output_loss: ``mse`` or ``kl``.
    """

    def __init__(
        self,
        model: ComponentModel,
        ci_fn: Mapping[str, Any],
        sigmoid: str = "leaky_hard",
        sampling: str = "continuous",
        use_delta: bool = True,
        output_loss: ReconKind = "mse",
    ) -> None:
        super().__init__()
        if sampling not in ("continuous", "binomial"):
            raise ValueError(f"There is no sampling {sampling!r}; choose continuous or binomial.")
        if output_loss not in ("mse", "kl"):
            raise ValueError(f"There is no output_loss {output_loss!r}; choose mse or kl.")
        self.model = model
        self.ci_fn = ImportanceFunction(model, ci_fn)
        self.lower_of, self.upper_of = sigmoid_pair(sigmoid)
        self.binomial, self.use_delta = sampling == "binomial", use_delta
        self.output_loss: ReconKind = output_loss

    def initialise(self, seed: int) -> None:
        """Draw components and causal-importance functions."""
        self.model.initialise(seed)
        self.ci_fn.initialise(seed)

    @property
    def names(self) -> list[str]:
        """Decomposed modules in order."""
        return self.model.names

    @property
    def device(self) -> torch.device:
        """Where the components are."""
        return self.model.component_parameters()[0].device

    @property
    def noise_channels(self) -> int:
        """Uniform numbers that one position's stochastic masks need: one per component, and one delta per module."""
        return sum(self.model.counts.values()) + len(self.names)

    # ------------------------------------------------------------------ one batch

    def look(self, batch: Tensor, jitter: Tensor | None = None, unembedding: Unembedding | None = None) -> Prepared:
        """Clean forward pass (without graph) and causal importances (with graph where gradients are on).

        Args:
            batch: The target's input.
            jitter: (..., sum of C) uniform numbers for binomial sampling in training; None = no jitter.
            unembedding: Makes the target's logits; None = the target itself does.
        """
        with torch.no_grad():
            clean = self.model(batch, keep=("inputs", "outputs"), states=unembedding is not None)
            target = clean.output if unembedding is None else unembedding.all_logits(clean.output)
        logits = {name: z.to(torch.promote_types(z.dtype, torch.float32)) for name, z in self.ci_fn(clean.inputs).items()}
        lower_logits = logits if jitter is None else _jittered(logits, jitter)
        lower = {name: self.lower_of(z) for name, z in lower_logits.items()}
        return Prepared(batch, target, lower, self.upper_of, logits, clean.outputs, clean.inputs, unembedding=unembedding)

    def recon_sum(self, prepared: Prepared, masks: Mapping[str, ComponentMask], frozen: bool = False, valued: bool = True) -> Tensor:
        """Summed reconstruction loss of the output under ``masks``.

        Args:
            prepared: The batch.
            masks: By module.
            frozen: Leave the components out of the graph.
            valued: The value is wanted, and not its gradient alone.
        """
        known, unembedding = (prepared.known, prepared.unembedding) if frozen else (None, None)
        output = self.model(prepared.batch, masks, frozen=frozen, known=known, states=unembedding is not None).output
        if frozen and prepared.reference is not None:
            return kl_sum(output.flatten(0, -2), prepared.reference, KL_CHUNK_NUMBERS, valued, unembedding)
        return recon_sum(output, prepared.target, self.output_loss)

    def recon_count(self, prepared: Prepared) -> int:
        """What :meth:`recon_sum` is divided by."""
        return recon_count(prepared.target, self.output_loss)

    # ------------------------------------------------------------------ MaskedReconstruction

    def leading_shape(self, batch: Any) -> tuple[int, ...]:
        """(rows,) for features (rows, width), (rows, positions) for tokens or sequences of features."""
        tensor = input_tensor(batch)
        return tuple(tensor.shape) if not tensor.is_floating_point() else tuple(tensor.shape[:-1])

    def source_channels(self) -> dict[str, int]:
        """Components of each module, and one for its delta where that is used."""
        return {name: count + int(self.use_delta) for name, count in self.model.counts.items()}

    def prepare(self, batch: Any) -> Prepared:
        """Target output and causal importances, without graph and without jitter."""
        with torch.no_grad():
            prepared = self.look(input_tensor(batch), unembedding=self._unembedding())
            prepared.known.steps = True
            if self.output_loss == "kl":
                prepared.reference = KLReference(prepared.target)
        return prepared

    def _unembedding(self) -> Unembedding | None:
        """What an attack makes logits by, chunk after chunk; on a GPU many small chunks would take longer."""
        weight = self.model.unembedding() if self.output_loss == "kl" else None
        if weight is None or weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return None
        return Unembedding(weight)

    def loss_sum(self, prepared: Prepared, sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Summed loss under the masks that ``sources`` stand for, differentiable in the sources alone."""
        return self._attacked_sum(prepared, sources, valued=True)

    def slope_sum(self, prepared: Prepared, sources: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The same for its gradient alone, which is the same bit for bit; its value may be NaN."""
        return self._attacked_sum(prepared, sources, valued=False)

    def _attacked_sum(self, prepared: Prepared, sources: Mapping[str, Tensor], valued: bool) -> tuple[Tensor, int]:
        masks = {name: mask_from_source(prepared.lower[name], source) for name, source in sources.items()}
        return self.recon_sum(prepared, masks, frozen=True, valued=valued), self.recon_count(prepared)


def input_tensor(batch: Any) -> Tensor:
    """The target's input in a batch: a tensor, or ``input_ids`` of a mapping.

    Raises:
        TypeError: If there is neither.
    """
    found = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if not isinstance(found, Tensor):
        raise TypeError(f"A batch is a {type(batch).__name__}; a decomposition needs a tensor, or a mapping with input_ids.")
    return found


def _jittered(logits: Mapping[str, Tensor], jitter: Tensor) -> dict[str, Tensor]:
    columns = jitter.split([z.shape[-1] for z in logits.values()], dim=-1)
    return {name: jittered_logits(z, column.to(z.dtype)) for (name, z), column in zip(logits.items(), columns, strict=True)}
