"""Binds a concept direction to the parameters of a model: spaces become rows of parameters, and whatever does not fit is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from theodolite.functional.directions import ConceptDirection, match_names
from theodolite.functional.projection_rule import ProjectionRule
from theodolite.functional.spaces import residual_to_output, singular_to_parameter, writer_site
from theodolite.residual_writers import is_writer, residual_writers

Target: TypeAlias = Literal["all", "residual_writers", "lora_B", "flattened"]


def bind_direction(
    direction: ConceptDirection,
    parameters: Mapping[str, nn.Parameter],
    rule: ProjectionRule,
    target: Target = "all",
    patterns: Sequence[str] | None = None,
) -> ConceptDirection:
    """Orthonormal rows of trainable parameters.

    Args:
        direction: In any space. ``residual`` acts on the output side of the trainable residual-writing matrices.
        parameters: The module's named parameters.
        rule: What will be done with it.
        target: ``all`` parameters that the direction has rows for, only ``residual_writers``, only ``lora_B`` matrices, or all of them
            ``flattened`` into one vector.
        patterns: Glob patterns of parameter names that narrow it further.

    Returns:
        A direction in space ``parameter`` or ``lora_B``.

    Raises:
        ValueError: Unknown names or patterns, wrong shapes, nothing left, or a gate that needs a sign where there is none.
    """
    if target not in ("all", "residual_writers", "lora_B", "flattened"):
        raise ValueError(f"target={target!r} is unknown: use 'all', 'residual_writers', 'lora_B' or 'flattened'.")
    if direction.space == "residual":
        direction = _on_writers(direction, parameters, patterns)
    else:
        direction = direction.select(patterns) if patterns is not None else direction
        direction.check_against({name: parameter.shape for name, parameter in parameters.items()})
    if direction.space == "singular_coordinate":
        direction = singular_to_parameter(direction, {name: _whole(parameters[name]) for name in direction.vectors})
    if target in ("residual_writers", "lora_B"):
        direction = _only(direction, target)
    if direction.space == "lora_B":
        if rule.gate == "one_sided" or rule.push > 0:
            raise ValueError(
                "A direction on the output side of matrices has no sign for a one-sided gate or a push: use gate='two_sided' or 'reverse', "
                "or extract it with act_on='reference'."
            )
        if target == "flattened" or rule.gate_scope != "tensor":
            raise ValueError("A direction on the output side of matrices acts matrix by matrix: use target='all' and gate_scope='tensor'.")
    return direction.orthonormal(jointly=target == "flattened")


def model_identity(module: nn.Module) -> tuple[str | None, str | None]:
    """Id and revision of the ``transformers`` model inside a module, as far as it knows them; None otherwise."""
    for part in module.modules():
        config = getattr(part, "config", None)
        model = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
        if isinstance(model, str) and model:
            revision = getattr(config, "_commit_hash", None)
            return model, revision if isinstance(revision, str) else None
    return None, None


def _on_writers(direction: ConceptDirection, parameters: Mapping[str, nn.Parameter], patterns: Sequence[str] | None) -> ConceptDirection:
    """A residual-stream direction on the output side of the trainable matrices that write to it."""
    layers = residual_writers(name for name, parameter in parameters.items() if parameter.requires_grad)
    sites = {name: writer_site(layer, direction) for name, layer in layers.items()}
    writers = {name: site for name, site in sites.items() if site is not None}
    if not writers:
        raise ValueError(
            f"No trainable matrix writes to the residual stream at {', '.join(direction.vectors)}: train o_proj or down_proj "
            "(or their LoRA B) in these layers."
        )
    writers = {name: writers[name] for name in match_names(writers, patterns)}
    bound = residual_to_output(direction, writers)
    bound.check_against({name: parameter.shape for name, parameter in parameters.items()})
    return bound


def _only(direction: ConceptDirection, target: str) -> ConceptDirection:
    """The part on one kind of matrix."""
    kept = [name for name in direction.vectors if (is_writer(name) if target == "residual_writers" else ".lora_B" in name)]
    if not kept:
        raise ValueError(
            f"target={target!r} matches none of the direction's parameters, the first of which is {next(iter(direction.vectors))!r}."
        )
    return ConceptDirection({name: direction.vectors[name] for name in kept}, direction.space, direction.metadata)


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor().detach() if isinstance(parameter, DTensor) else parameter.detach()
