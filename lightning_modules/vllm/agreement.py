"""Do sampler and trainer hold the same policy? A fixed prompt is continued by one and scored by the other.

Three faults leave no trace but the numbers: a stale prefix cache, an adapter that binds to nothing, a tied output head that was not sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from theodolite.protocols import TokenSequence
from theodolite.seeds import derive_seed

from ..decoding import Sampling, evaluation_mode
from ..merged_adapter import adapted_layers
from ..scoring import completion_log_probs, pad_sequences

TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
"""Mean absolute difference of a log-probability that other kernels may cause. Equal weights are 1e-6 apart in float32 and 4e-3 in
bfloat16 (a tiny Qwen3 on a CPU); stale keys and values, or a head that was not sent, are 0.8 to 4 apart."""

PROMPT_TOKENS, DRAWN_TOKENS = 288, 16
"""Long enough to fill two blocks of any prefix cache, so that stale ones are met."""

TEMPERATURE = 0.7
"""Not 1, so that log-probabilities before temperature are recognised."""


class DisagreementError(RuntimeError):
    """Sampler and trainer compute different policies."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a sampler answers to one request.

    Attributes:
        ids: Token ids, the end token included.
        log_probs: Of each, after temperature.
        finish: ``stop`` or ``length``.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: str


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far apart two engines are on the fixed prompt: absolute differences of log-probabilities."""

    mean: float
    largest: float


def probe_prompt(vocabulary: int, longest: int) -> tuple[int, ...]:
    """The fixed prompt: token ids that are a function of the vocabulary alone.

    Args:
        vocabulary: Number of token ids.
        longest: Most tokens that prompt and continuation may have.

    Raises:
        ValueError: There is no room for it.
    """
    tokens = min(PROMPT_TOKENS, longest - DRAWN_TOKENS)
    if tokens < 1:
        raise ValueError(f"A sampler of {longest} tokens has no room for the agreement check; raise max_model_len to {2 * DRAWN_TOKENS}.")
    return tuple(derive_seed("agreement", i) % vocabulary for i in range(tokens))


def probe_sampling() -> Sampling:
    """How the fixed prompt is continued."""
    return Sampling(DRAWN_TOKENS, TEMPERATURE)


@torch.no_grad()
def trainer_log_probs(model: nn.Module, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """(T,) float64 log-probabilities of a continuation under the trainer's model, at :data:`TEMPERATURE`."""
    device = next(model.parameters()).device
    batch = pad_sequences([TokenSequence(tuple(prompt), tuple(ids))], 0, device)
    with evaluation_mode(model):
        return completion_log_probs(model, batch, TEMPERATURE)[0].double().cpu()


def compare(model: nn.Module, prompt: Sequence[int], drawn: Drawn, tolerance: float | None, when: str) -> Agreement:
    """Score what the sampler drew.

    Args:
        model: The trainer's.
        prompt: What was continued.
        drawn: The continuation and the sampler's log-probabilities.
        tolerance: Largest mean absolute difference; None = by the policy's dtype (:data:`TOLERANCES`).
        when: For the message.

    Raises:
        DisagreementError: They differ by more, or the sampler reported no number.
    """
    own = trainer_log_probs(model, prompt, drawn.ids)
    gap = (own - torch.tensor(drawn.log_probs, dtype=torch.float64)).abs()
    found = Agreement(float(gap.mean()), float(gap.max()))
    limit = tolerance_of(model) if tolerance is None else tolerance
    if not found.mean <= limit:
        raise DisagreementError(
            f"{when}, sampler and trainer disagree: log-probabilities of a fixed sequence differ by {found.mean:.2g} on average "
            f"({found.largest:.2g} at most; at most {limit:.2g} is float noise). The sampler has another model, stale weights or a stale "
            "prefix cache, or reports log-probabilities before temperature (--logprobs-mode processed_logprobs)."
        )
    return found


def tolerance_of(model: nn.Module) -> float:
    """The default tolerance for a model: that of the coarsest dtype among its matrices."""
    return max(TOLERANCES[parameter.dtype] for parameter in model.parameters() if parameter.is_floating_point())


@contextmanager
def loud_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the adapter holds large random numbers; afterwards its very tensors of before are back.

    A fresh adapter does nothing, so nobody would notice that it binds to nothing. Each B A has about half its base matrix's norm.
    """
    saved: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        for number, (_, _, layer) in enumerate(adapted_layers(model)):
            base = layer.get_base_layer().weight
            for adapter in (a for a in layer.active_adapters if a in layer.lora_A):
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                generator = torch.Generator().manual_seed(derive_seed("loud adapter", number, adapter))
                size = float(base.detach().float().norm()) / (2 * abs(layer.scaling[adapter]) * a.shape[0] ** 0.5)
                for parameter, scale in ((a, a.shape[1] ** -0.5), (b, size * b.shape[0] ** -0.5)):
                    saved.append((parameter, parameter.data))
                    noise = torch.randn(parameter.shape, generator=generator) * scale
                    parameter.data = noise.to(parameter.data)
        yield
    finally:
        for parameter, before in reversed(saved):
            parameter.data = before


def check_binding(model: nn.Module, prompt: Sequence[int], draw: Callable[[], Drawn], tolerance: float | None) -> None:
    """Load a loud adapter and see it in the sampler's numbers.

    Args:
        model: A PEFT model.
        prompt: The fixed prompt.
        draw: Exports the model's adapter as it is now, loads it and continues the prompt.
        tolerance: As in :func:`compare`.

    Raises:
        DisagreementError: The sampler computes without the adapter, or with another effect.
    """
    limit = tolerance_of(model) if tolerance is None else tolerance
    with loud_adapter(model):
        drawn = draw()
        loud = trainer_log_probs(model, prompt, drawn.ids)
    quiet = trainer_log_probs(model, prompt, drawn.ids)
    sampler = torch.tensor(drawn.log_probs, dtype=torch.float64)
    if float((loud - quiet).abs().mean()) <= 4 * limit:
        raise DisagreementError("An adapter of random numbers changes nothing in the trainer; does lora.target_modules match a layer?")
    # large random matrices amplify rounding, so closeness is judged against the size of the effect, too
    to_loud, to_quiet = (float((sampler - own).abs().mean()) for own in (loud, quiet))
    if not to_loud <= max(2 * limit, 0.1 * to_quiet):
        raise DisagreementError(
            f"The sampler took the adapter, but does not compute with it: its log-probabilities are {to_loud:.2g} from the trainer's with "
            f"the adapter and {to_quiet:.2g} from those without. Are the names of its layers those of the served model, and are "
            "log-probabilities those after temperature (--logprobs-mode processed_logprobs)?"
        )
