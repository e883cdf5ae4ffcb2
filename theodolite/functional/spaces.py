r"""From the space a direction was found in to rows that gradients of parameters can be projected on: the one place where polarity turns.

An activation direction ``d`` (residual stream, pointing at the concept) reaches a matrix ``W`` (d_out, d_in), ``y = W x``, that writes to
the residual stream in one of two ways. With ``G = dL/dW`` a descent step changes the output by ``-lr G x``.

* *Output side* (:func:`residual_to_output`): ``G' = (I - v v^T) G`` with ``v = -d/|d|``. No input whatsoever can then change the output
  along ``d``, at the price of a sign: ``v^T G`` is a row of d_in numbers, not one, so there is nothing that a one-sided gate could look at.
* *Reference input* (:func:`residual_to_parameter`): the single row ``-d u^T / (|d| |u|)`` with ``u`` a typical input of ``W`` (its mean
  over the pairs). ``<G, -d u^T> > 0`` says that the step moves the output of ``u`` along ``+d``: a scalar, so the one-sided gate is
  literal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from theodolite.functional.directions import ConceptDirection


def residual_to_output(direction: ConceptDirection, writers: Mapping[str, str]) -> ConceptDirection:
    """Output-side rows of writing matrices (space ``lora_B``) from a residual-stream direction.

    Args:
        direction: Space ``residual``.
        writers: ``{parameter name: site whose rows it gets}``.

    Raises:
        ValueError: Another space, or a site that the direction lacks.
    """
    sites = _residual_rows(direction, writers)
    return ConceptDirection({name: -sites[name] for name in writers}, "lora_B", {**direction.metadata, "from_space": "residual"})


def residual_to_parameter(direction: ConceptDirection, writers: Mapping[str, str], inputs: Mapping[str, Tensor]) -> ConceptDirection:
    """One row ``-d u^T`` of norm ``|d|`` per direction row and writing matrix (space ``parameter``).

    Args:
        direction: Space ``residual``.
        writers: ``{parameter name: site}``.
        inputs: ``{parameter name: (d_in,) reference input u}``.

    Raises:
        ValueError: Another space, a site that the direction lacks, or a reference input that is missing or zero.
    """
    sites = _residual_rows(direction, writers)
    vectors = {}
    for name in writers:
        if name not in inputs or not float(inputs[name].norm()) > 0:
            raise ValueError(
                f"{name} has no reference input, or a zero one, so a residual direction is no row of it: act on its output side."
            )
        unit = inputs[name].to(sites[name]) / inputs[name].norm().to(sites[name])
        vectors[name] = -sites[name][:, :, None] * unit
    return ConceptDirection(vectors, "parameter", {**direction.metadata, "from_space": "residual"})


def singular_to_parameter(direction: ConceptDirection, weights: Mapping[str, Tensor]) -> ConceptDirection:
    """Rows in singular coordinates as rows of parameters.

    With ``W = U S V^T`` frozen at its present value, coordinates ``s`` (r,) stand for ``U_r diag(s) V_r^T``: orthonormal coordinates give
    orthonormal matrices, and ``<G, U diag(s) V^T> = s . diag(U^T G V)``. A parameter that is itself a vector of coordinates is used as it
    is.

    Raises:
        ValueError: Another space.
    """
    if direction.space != "singular_coordinate":
        raise ValueError(f"Space {direction.space!r} has no singular coordinates.")
    vectors = {}
    for name, rows in direction.vectors.items():
        weight = weights[name].detach()
        if weight.ndim == 1:
            vectors[name] = torch.nn.functional.pad(rows, (0, len(weight) - rows.shape[1]))
            continue
        left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
        r = rows.shape[1]
        vectors[name] = torch.einsum("ar,kr,rb->kab", left[:, :r], rows.to(left), right[:r]).float()
    return ConceptDirection(vectors, "parameter", {**direction.metadata, "from_space": "singular_coordinate"})


def writer_site(layer: int | None, direction: ConceptDirection) -> str | None:
    """The residual site whose rows a writing matrix of a layer gets: its own layer's, else the shared one, else None."""
    own = f"resid_post.{layer}"
    return own if own in direction.vectors else "resid_post" if "resid_post" in direction.vectors else None


def _residual_rows(direction: ConceptDirection, writers: Mapping[str, str]) -> dict[str, Tensor]:
    """The direction's rows per writing matrix."""
    if direction.space != "residual":
        raise ValueError(f"Space {direction.space!r} is not the residual stream.")
    for name, site in writers.items():
        if site not in direction.vectors:
            raise ValueError(f"{name} asks for the site {site!r}, which the direction lacks: it has {', '.join(direction.vectors)}.")
    return {name: direction.vectors[site] for name, site in writers.items()}
