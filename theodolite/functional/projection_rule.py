"""What is done with the component of a gradient along a basis: the settings, and which of them contradict one another.

The equations are in :mod:`theodolite.functional.projection`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Gate: TypeAlias = Literal["one_sided", "two_sided", "reverse"]
GateScope: TypeAlias = Literal["tensor", "module", "global"]
DEFAULT_MAX_MAGNITUDE_FACTOR = 2.0
"""Largest rescaling of a projected gradient. Removal at cosine ``cos`` asks for ``1/sqrt(1 - cos^2)``: 2 is reached at ``cos = 0.87``, and
beyond it the residual is a small part of the gradient that should not be blown up to the size of the whole."""


@dataclass(frozen=True, slots=True)
class ProjectionRule:
    """What is done with the component along a basis (equations in the module's docstring).

    Attributes:
        gate: Which components go.
        gate_scope: Who decides.
        overshoot: ``o``, dimensionless.
        push: ``b``, a fraction of ``|g|``; above 0 it replaces the gated removal.
        preserve_magnitude: Rescale the result to ``|g|``.
        max_magnitude_factor: Upper bound of that rescaling. A result of exactly 0 stays 0: it has no direction that could be kept.
        flattened: One coefficient vector for all tensors.
        measure_only: Return the gradients as they are, with the statistics of what they hold.

    Raises:
        ValueError: Settings that contradict one another.
    """

    gate: Gate = "one_sided"
    gate_scope: GateScope = "tensor"
    overshoot: float = 1.0
    push: float = 0.0
    preserve_magnitude: bool = False
    max_magnitude_factor: float = DEFAULT_MAX_MAGNITUDE_FACTOR
    flattened: bool = False
    measure_only: bool = False

    def __post_init__(self) -> None:
        check_projection_settings(self.gate, self.overshoot, self.push, self.max_magnitude_factor)
        if self.gate_scope not in ("tensor", "module", "global"):
            raise ValueError(f"gate_scope={self.gate_scope!r} is unknown: use 'tensor', 'module' or 'global'.")
        if self.gate_scope != "tensor" and (self.push > 0 or self.flattened):
            what = f"push={self.push}" if self.push > 0 else "a flattened gradient"
            raise ValueError(f"gate_scope={self.gate_scope!r} has nothing to decide for {what}: leave gate_scope='tensor'.")


def check_projection_settings(gate: str, overshoot: float, push: float, max_magnitude_factor: float) -> None:
    """Refuse settings that contradict one another.

    Raises:
        ValueError: One sentence naming the setting, its value and what would work.
    """
    if gate not in ("one_sided", "two_sided", "reverse"):
        raise ValueError(f"gate={gate!r} is unknown: use 'one_sided', 'two_sided' or 'reverse'.")
    if overshoot <= 0:
        raise ValueError(f"overshoot={overshoot} removes nothing: use 1 for removal or 2 for reflection.")
    if gate == "reverse" and overshoot != 1.0:
        raise ValueError(f"overshoot={overshoot} with gate='reverse' is an overshoot of {2 * overshoot}: leave overshoot=1.0.")
    if push < 0:
        raise ValueError(f"push={push} points towards the concept: use a positive fraction of the gradient norm, e.g. 0.3.")
    if push > 0 and (gate != "one_sided" or overshoot != 1.0):
        raise ValueError(f"push={push} replaces the gated removal: leave gate='one_sided' and overshoot=1.0 (got {gate!r}, {overshoot}).")
    if max_magnitude_factor < 1:
        raise ValueError(f"max_magnitude_factor={max_magnitude_factor} would shrink every projected gradient: use 1 or more.")
