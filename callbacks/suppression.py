r"""Generation-time suppression: rollouts are sampled from a model whose residual stream is kept off a concept; training is not.

While a window's rollouts are drawn, the output of every decoder layer in a band of the depth loses what points towards the concept,

    ``h' = h - strength * relu(<h, u>) u``,

with ``u`` the unit mean difference of states over contrastive pairs at that layer, taken from the policy at the start of the fit. It is the
baseline that changes what is *sampled* and neither rewards nor gradients (Wu & Tang 2026, arXiv 2604.01476, where it does least).

**Which ratio.** The sampler's log-probabilities are those of the distribution that was really sampled from: the suppressed one. What is
trained, and what is evaluated, is the policy without suppression, so its rollouts are off policy. ``model.mismatch`` corrects for that with
importance weights against the recorded log-probabilities (``configs/grpo/arms/suppressed.yaml`` sets ``token_tis`` with a bound of 2);
without it the gradient is that of the unsuppressed policy on another policy's rollouts. ``train/sampler_gap`` and
``train/sampler_kl`` say how far the two are apart.

Deviations from the paper: same-prompt pairs of the task instead of sentences of a general domain, and a unit direction per layer (the text
leaves the scale open; with a unit vector and strength 1 the component is exactly zero).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from theodolite.callbacks.completion_states import layer_band, layer_modules, pooled_states, shared_over_ranks
from theodolite.callbacks.sequence_gradients import contrast_pairs, encode_pairs, require_pair_source, require_scorer
from theodolite.functional.subspaces import haar_rows
from theodolite.protocols import Window
from theodolite.seeds import run_seed


class GenerationSuppression(Callback):
    """Keep training rollouts off a concept while they are sampled; evaluation, scoring and gradients see the plain model.

    Args:
        band: Depth of the layers, as fractions of their number.
        n_pairs: Contrastive pairs to take the directions from.
        position: ``last`` completion token, or the ``mean`` over the completion.
        strength: 1 removes the component, less weakens it.
        pairs: JSONL file of pairs; None asks the datamodule.
        seed: Of the datamodule's pairs and of a random direction; None = the run's ``seed_everything``.
        random_direction: Control: uniformly random unit directions instead.
        chunk_size: Sequences per forward pass when the directions are taken.

    Raises:
        ValueError: A setting out of range.
    """

    def __init__(
        self,
        band: tuple[float, float] = (0.6, 0.75),
        n_pairs: int = 64,
        position: Literal["last", "mean"] = "last",
        strength: float = 1.0,
        pairs: str | None = None,
        seed: int | None = None,
        random_direction: bool = False,
        chunk_size: int = 32,
    ) -> None:
        super().__init__()
        layer_band(100, band)
        if n_pairs < 1 or chunk_size < 1 or not 0 < strength <= 1:
            raise ValueError(f"n_pairs={n_pairs} and chunk_size={chunk_size} must be positive and strength={strength} in (0, 1].")
        if position not in ("last", "mean"):
            raise ValueError(f"position={position!r} must be 'last' or 'mean'.")
        self.position: Literal["last", "mean"] = position
        self.band, self.n_pairs, self.strength, self.pairs, self.seed = band, n_pairs, strength, pairs, run_seed(seed)
        self.random_direction, self.chunk_size = random_direction, chunk_size
        self.directions: dict[int, Tensor] = {}
        """Unit (d,) in float32 on the CPU, by decoder layer (counted from 1)."""
        self._engine: SuppressedEngine | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find a module that cannot be read or does not sample with an engine, or missing pairs, before training."""
        require_scorer(pl_module)
        layer_modules(pl_module)
        if not hasattr(getattr(pl_module, "engine", None), "generate"):
            raise TypeError(f"{type(pl_module).__name__} has no engine that generates rollouts, so there is nothing to suppress.")
        if self.pairs is None:
            require_pair_source(trainer)
        else:
            contrast_pairs(trainer, self.pairs, self.n_pairs, self.seed)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the directions from the base policy (unless a checkpoint brought them) and stand between module and sampler."""
        if not self.directions:
            self.directions = self._fitted(trainer, pl_module)
        module: Any = pl_module
        self._engine = SuppressedEngine(module.engine, pl_module, self.directions, self.strength)
        module.engine = self._engine

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """What is sampled from here on are the window's rollouts."""
        if self._engine is not None:
            self._engine.begin()

    def on_rollouts(self, trainer: Trainer, pl_module: LightningModule, window: Window) -> None:
        """The rollouts are there: what is sampled from here on is not suppressed.

        Raises:
            RuntimeError: The sampler did not run the module's own layers, so nothing was suppressed.
        """
        assert self._engine is not None, "on_train_start has not run"
        if self._engine.end() == 0 and window.rollouts:
            raise RuntimeError(
                "The rollout engine does not run the module's own layers, so nothing was suppressed: use the engine that samples with "
                "the live model."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its own engine back."""
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its own engine back."""
        self._restore(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The directions by layer."""
        return {"directions": self.directions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`."""
        self.directions = state_dict["directions"]

    def _restore(self, pl_module: Any) -> None:
        if self._engine is not None:
            pl_module.engine, self._engine = self._engine.engine, None

    def _fitted(self, trainer: Trainer, pl_module: LightningModule) -> dict[int, Tensor]:
        layers = layer_band(len(layer_modules(pl_module)), self.band)
        pairs = encode_pairs(require_scorer(pl_module), contrast_pairs(trainer, self.pairs, self.n_pairs, self.seed))
        sequences = [side for pair in pairs for side in pair]
        found: dict[int, Tensor] = {}
        for layer in layers:
            states = pooled_states(trainer, pl_module, sequences, layer, self.position, self.chunk_size)
            states = shared_over_ranks(trainer, pl_module, states)
            found[layer] = unit_difference(states[0::2], states[1::2])
            if self.random_direction:
                found[layer] = haar_rows(f"suppression.{layer}", 1, (states.shape[1],), self.seed)[0].float()
        return found


def unit_difference(concept: Tensor, clean: Tensor) -> Tensor:
    """``d / |d|`` with ``d = mean(concept) - mean(clean)``, in float32.

    Args:
        concept: (n, d).
        clean: (n, d).

    Raises:
        ValueError: The two means coincide or are not finite.
    """
    difference = concept.mean(0) - clean.mean(0)
    norm = float(difference.norm())
    if not 0 < norm < float("inf"):
        raise ValueError("The pairs' two sides have the same mean state or one that is not finite: there is no direction to suppress.")
    return (difference / norm).float()


class SuppressedEngine:
    """A rollout engine that generates under suppression between :meth:`begin` and :meth:`end`; everything else is the engine's own.

    Args:
        engine: The engine that samples with ``module``'s own layers.
        module: Holds the decoder layers.
        directions: Unit (d,) by decoder layer.
        strength: See :class:`GenerationSuppression`.
    """

    def __init__(self, engine: Any, module: nn.Module, directions: dict[int, Tensor], strength: float) -> None:
        self.engine, self.module, self.directions, self.strength = engine, module, directions, strength
        self._active, self._calls = False, 0

    def __getattr__(self, name: str) -> Any:
        """What this class does not define is the engine's."""
        if name == "engine":  # not there yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.engine, name)

    def begin(self) -> None:
        """Suppress from here on, and count from zero."""
        self._active, self._calls = True, 0

    def end(self) -> int:
        """Stop, and say how often a layer was called under suppression."""
        self._active = False
        return self._calls

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Any, seeds: Sequence[Sequence[int]]) -> Any:
        """As the engine's."""
        if not self._active:
            return self.engine.generate(prompts, sampling, seeds)
        with removed_from_layers(self.module, self.directions, self.strength, self._count):
            return self.engine.generate(prompts, sampling, seeds)

    def _count(self, _: Tensor) -> None:
        self._calls += 1


@contextmanager
def removed_from_layers(
    module: nn.Module, directions: dict[int, Tensor], strength: float, watch: Callable[[Tensor], None]
) -> Iterator[None]:
    """``strength * relu(<h, u>) u`` taken from the output of decoder layers (counted from 1); nothing is left behind.

    Args:
        module: Holds the layers.
        directions: Unit (d,) by layer.
        strength: Share of the component that goes.
        watch: Called with every ``relu(<h, u>)`` (B, T).
    """
    layers = layer_modules(module)

    def hook_of(direction: Tensor) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            u = direction.to(states)
            component = (states @ u).relu()
            watch(component)
            kept = states - strength * component[..., None] * u
            return (kept, *output[1:]) if isinstance(output, tuple) else kept

        return hook

    handles = [layers[layer - 1].register_forward_hook(hook_of(direction)) for layer, direction in directions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
