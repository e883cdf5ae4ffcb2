"""Whether a direction means what its name says, found out before training: separation of held-out pairs, and steering."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from theodolite.callbacks.completion_states import layer_modules
from theodolite.callbacks.pair_sets import PairSet, require_completer
from theodolite.callbacks.sequence_gradients import weighted_gradient, without_trace
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.separation import separation_report
from theodolite.protocols import Chat, TokenSequence


@dataclass(frozen=True)
class DirectionChecks:
    """What a direction has to show before it is used.

    Attributes:
        held_out: Pairs that extraction does not see; 0 skips the separation check.
        min_accuracy: Refuse a direction that ranks no more than this share of them right; null only reports. Controls are never refused.
        steering_alphas: Strengths at which the direction is added at inference; empty skips the check (it generates).
        steering_prompts: Held-out prompts completed per strength.
        detector: Regular expression or dotted path of a callable on text that recognises the concept in a steered completion.
    """

    held_out: int = 20
    min_accuracy: float | None = 0.9
    steering_alphas: list[float] = field(default_factory=list)
    steering_prompts: int = 16
    detector: str = r"def run_tests"

    def __post_init__(self) -> None:
        if self.held_out < 0 or self.steering_prompts < 1 or (self.min_accuracy is not None and not 0 <= self.min_accuracy < 1):
            raise ValueError(
                f"held_out={self.held_out} must be at least 0, steering_prompts={self.steering_prompts} at least 1 and "
                f"min_accuracy={self.min_accuracy} in [0, 1)."
            )


DEFAULT_CHECKS = DirectionChecks()
"""20 held-out pairs, of which more than 90 % must be ranked right."""


def check_separation(checks: DirectionChecks, scores: Callable[[list[TokenSequence]], Tensor], pairs: PairSet) -> dict[str, Any]:
    """Score held-out pairs and refuse a direction that does not tell their sides apart.

    Args:
        checks: What is asked.
        scores: (n,) concept scores of sequences, higher towards the concept.
        pairs: With their control.

    Returns:
        :func:`~theodolite.functional.separation.separation_report`, empty where nothing is held out.

    Raises:
        ValueError: Too low an accuracy; the number is in the message.
    """
    if not pairs.held_out:
        return {}
    sequences = [side for pair in pairs.held_out for side in pair]
    values = scores(sequences).double().cpu()
    lengths = torch.tensor([len(sequence.completion_ids) for sequence in sequences])
    report = separation_report(values[0::2], values[1::2], lengths[0::2], lengths[1::2])
    accuracy = report["accuracy"]
    assert accuracy is not None
    if pairs.facts["control"] == "none" and checks.min_accuracy is not None and accuracy <= checks.min_accuracy:
        raise ValueError(
            f"The direction ranks {accuracy:.0%} of {len(pairs.held_out)} held-out pairs right and more than {checks.min_accuracy:.0%} are "
            "asked for: look at the pairs, the layers and the denoising, or set checks.min_accuracy to null."
        )
    return dict(report)


def gradient_scores(trainer: Any, module: nn.Module, direction: ConceptDirection, sequences: list[TokenSequence]) -> Tensor:
    """``<grad NLL(sequence), sum of rows>`` for each sequence, one backward pass each.

    Higher for the concept: the rows point where ``NLL(concept) - NLL(clean)`` grows.
    """
    names = list(direction.vectors)
    result = []
    for sequence in sequences:
        gradients = weighted_gradient(trainer, module, {sequence: 1.0}, names, 1)
        result.append(sum((gradients[name] * direction.vectors[name].sum(0).to(gradients[name])).sum() for name in names))
    return torch.stack([torch.as_tensor(score) for score in result])


def steering_rates(
    module: Any,
    checks: DirectionChecks,
    prompts: Sequence[str | Chat],
    detect: Callable[[str], bool],
    steered: Callable[[float, bool], AbstractContextManager[None]],
    seed: int,
) -> dict[str, Any]:
    """Rate at which completions show the concept, by strength, for the direction and for a random one of the same norm.

    Args:
        module: A :class:`~theodolite.protocols.Completer`.
        checks: Strengths and number of prompts.
        prompts: Prompts to complete.
        detect: Recognises the concept in a text.
        steered: Context in which the module is steered, by strength and whether at random.
        seed: Of sampling.

    Returns:
        ``alphas``, ``direction`` and ``random`` (rates), ``prompts``; empty without strengths. A direction that at no strength exceeds both
        the unsteered rate and the random direction is warned about.
    """
    if not checks.steering_alphas:
        return {}
    used = list(prompts)[: checks.steering_prompts]

    def rate(alpha: float, random: bool) -> float:
        with without_trace(module), steered(alpha, random):
            texts = require_completer(module).complete(used, 1, seed, greedy=False)
        return sum(detect(text) for group in texts for text in group) / len(used)

    alphas = [0.0, *checks.steering_alphas]
    concept, chance = [[rate(alpha, random) for alpha in alphas] for random in (False, True)]
    if all(one <= max(other, concept[0]) for one, other in zip(concept[1:], chance[1:], strict=True)):
        rank_zero_warn(
            f"Steering along the direction shows the concept in {concept} of completions at alpha {alphas}, a random one in {chance}."
        )
    return {"alphas": alphas, "direction": concept, "random": chance, "prompts": len(used)}


@contextmanager
def added_to_layers(module: nn.Module, vectors: dict[int, Tensor], alpha: float) -> Iterator[None]:
    """``alpha * vector`` added to the output of decoder layers, which are counted from 1.

    Raises:
        ValueError: The module samples with another engine than its own layers, which would go unsteered.
    """
    if getattr(getattr(module, "engine", None), "own_numerics", False):
        raise ValueError(
            "Steering adds vectors inside the model's own layers, and the sampler that model.rollout names does not run those; set "
            "checks.steering_alphas to [], or model.rollout to null."
        )
    layers = layer_modules(module)

    def hook_of(vector: Tensor) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            moved = states + alpha * vector.to(states)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    handles = [layers[layer - 1].register_forward_hook(hook_of(vector)) for layer, vector in vectors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stepped_towards(module: nn.Module, direction: ConceptDirection, alpha: float) -> Iterator[None]:
    """Weights moved by ``-alpha |w| v`` (a descent step along the rows, towards the concept), and exactly as before on the way out."""
    parameters = dict(module.named_parameters())
    before = {name: parameters[name].detach().clone() for name in direction.vectors}
    with torch.no_grad():
        for name, rows in direction.vectors.items():
            middle = rows.sum(0).to(parameters[name])
            parameters[name].sub_(alpha * parameters[name].norm() * middle / middle.norm().clamp_min(1e-30))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weights in before.items():
                parameters[name].copy_(weights)
