r"""Concept directions: where training should not go, as an artefact.

**Polarity, stated once.** Gradient descent applies ``-lr * g``, so there are two ways to point at a concept, and they are opposite:

* a *loss-gradient* direction points where ``NLL(concept) - NLL(clean)`` grows. ``<g, v> > 0`` for a loss gradient ``g`` means that the step
  lowers the concept's NLL relative to the clean one: training moves *towards* the concept, and this is what a one-sided gate removes;
* an *activation* direction ``d = h(concept) - h(clean)`` points at the concept itself. A step moves a hidden state along ``d`` where
  ``<dL/dh, d> < 0``, so its loss-gradient direction is ``-d``.

Which of the two a direction has follows from its space (:data:`POLARITY`); activation directions are turned into loss-gradient rows in
:mod:`theodolite.functional.spaces` and nowhere else.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from theodolite import direction_files
from theodolite.functional.subspaces import jointly_orthonormal, null_overlap, orthonormal_rows, subspace_overlap

Space: TypeAlias = Literal["parameter", "residual", "lora_B", "singular_coordinate"]
Polarity: TypeAlias = Literal["loss_gradient", "activation"]

POLARITY: dict[str, Polarity] = {
    "parameter": "loss_gradient",
    "residual": "activation",
    "lora_B": "loss_gradient",
    "singular_coordinate": "loss_gradient",
}
"""What the rows of each space point at: the growth of the concept's loss, or the concept's hidden states."""


@dataclass(frozen=True)
class ConceptDirection:
    """Rows along which a concept is learnt.

    Attributes:
        vectors: ``{name: rows}``; the number of rows ``k`` may differ between names. Finite, at least one row each. What name and row are
            follows from ``space``.
        space: ``parameter``: ``{parameter name: (k, *shape)}``, rows of the parameter's own shape. ``residual``: ``{site: (k, d_model)}``
            with sites ``resid_post.<layer>`` or ``resid_post`` (the same for all layers). ``lora_B``: ``{parameter name: (k, d_out)}``,
            output-side vectors that act on every column of a matrix (d_out, d_in). ``singular_coordinate``: ``{parameter name: (k, r)}``,
            coefficients of the outer products of a matrix's singular vectors, by decreasing singular value.
        metadata: JSON-able facts about where the direction comes from: ``model``, ``model_revision``, ``pair_set_sha256``, ``layers``,
            extraction settings, ``validation``.

    Raises:
        ValueError: No vectors, an unknown space, or a vector that is empty, not floating or not finite.
    """

    vectors: dict[str, Tensor]
    space: Space = "parameter"
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.space not in POLARITY:
            raise ValueError(f"space={self.space!r} is unknown: use one of {', '.join(map(repr, POLARITY))}.")
        if not self.vectors:
            raise ValueError("A concept direction needs at least one parameter with a vector, and it has none.")
        for name, rows in self.vectors.items():
            wanted = "(k, *parameter shape)" if self.space == "parameter" else "(k, d)"
            if rows.ndim < 2 or (self.space != "parameter" and rows.ndim != 2) or rows.numel() == 0 or not rows.is_floating_point():
                raise ValueError(f"The direction of {name} is {rows.dtype} of shape {tuple(rows.shape)}: it must be floating, {wanted}.")
            if not torch.isfinite(rows).all():
                raise ValueError(f"The direction of {name} contains NaN or infinite values: extract it again from finite gradients.")

    @property
    def polarity(self) -> Polarity:
        """What the rows point at (module docstring)."""
        return POLARITY[self.space]

    @property
    def layers(self) -> list[int]:
        """Layer numbers that occur in the names."""
        return sorted({int(number) for name in self.vectors for number in re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)})

    def orthonormal(self, jointly: bool = False) -> ConceptDirection:
        """The same direction with orthonormal rows per name, or ``jointly`` over the concatenation of all names.

        Raises:
            ValueError: A name has nothing but zero rows (jointly: all have), or (jointly) the numbers of rows differ.
        """
        separately = {} if jointly else {name: orthonormal_rows(rows) for name, rows in self.vectors.items()}
        bases = jointly_orthonormal(self.vectors) if jointly else separately
        for name, rows in bases.items():
            if len(rows) == 0:
                raise ValueError(f"The direction of {name} is zero: leave this parameter out, there is nothing to project on.")
        return ConceptDirection(bases, self.space, self.metadata)

    def check_against(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Compare a direction on parameters (every space but ``residual``) with those of a module.

        Args:
            shapes: ``{parameter name: shape}``.

        Raises:
            ValueError: A parameter does not exist (the closest name is given) or has another shape.
        """
        for name, rows in self.vectors.items():
            if name not in shapes:
                raise ValueError(
                    f"The direction has a vector for {name!r}, which the module lacks: the closest is {closest(name, shapes)}."
                )
            shape, given = tuple(shapes[name]), tuple(rows.shape[1:])
            if self.space == "parameter" and given != shape:
                raise ValueError(f"The direction of {name} has rows of shape {given}, the parameter has {shape}.")
            if self.space == "lora_B" and (len(shape) != 2 or given[0] != shape[0]):
                raise ValueError(f"The direction of {name} has output-side rows of {given[0]} numbers, the parameter has shape {shape}.")
            if self.space == "singular_coordinate" and (len(shape) > 2 or given[0] > min(shape)):
                raise ValueError(f"The direction of {name} has {given[0]} singular coordinates, the parameter has shape {shape}.")

    def check_model(self, model: str | None, revision: str | None) -> None:
        """Compare where the direction was extracted with what is trained; what either side does not know is not compared.

        Raises:
            ValueError: Another model, or another revision of it.
        """
        mine, mine_revision = self.metadata.get("model"), self.metadata.get("model_revision")
        if mine and model and mine != model:
            raise ValueError(f"The direction was extracted from the model {mine!r} and {model!r} is trained: extract it again from that.")
        if mine_revision and revision and mine_revision != revision:
            raise ValueError(
                f"The direction was extracted from revision {mine_revision!r} of {mine or 'the model'} and {revision!r} is trained: "
                "extract it again or load that revision."
            )

    def select(self, patterns: Sequence[str]) -> ConceptDirection:
        """The part on names that match any of the glob patterns; raises ``ValueError`` as :func:`match_names` does."""
        return ConceptDirection({name: self.vectors[name] for name in match_names(self.vectors, patterns)}, self.space, self.metadata)

    def reversed(self) -> ConceptDirection:
        """The control that points the other way: a one-sided gate then removes what moves *away* from the concept."""
        facts = {**self.metadata, "control": "reversed"}
        return ConceptDirection({name: -rows for name, rows in self.vectors.items()}, self.space, facts)

    def overlap(self, other: ConceptDirection) -> float:
        r"""How far two directions span the same subspaces: 1 the same, 0 orthogonal; blind to the sign of a row.

        ``sqrt(|A B^T|_F^2 / min(k_A, k_B))`` per shared parameter (the root mean squared cosine of the principal angles; for one row each
        the absolute cosine), averaged over the shared parameters. Two random unit vectors in ``d`` dimensions give about ``sqrt(2 / (pi
        d))``.

        Raises:
            ValueError: No shared parameter, or different shapes.
        """
        shared = [name for name in self.vectors if name in other.vectors]
        if not shared:
            raise ValueError("The two directions share no parameter, so they have no overlap.")
        return sum(subspace_overlap(name, self.vectors[name], other.vectors[name]) for name in shared) / len(shared)

    def compare(self, other: ConceptDirection) -> dict[str, Any]:
        """The overlap of two directions beside its null.

        Returns:
            ``overlap`` (mean over shared names), ``null`` (the same for Haar-random rows of these shapes, root mean square),
            ``by_name`` ``{name: {"overlap", "null"}}``, and the names that only one has, ``only_first`` and ``only_second``.

        Raises:
            ValueError: Different spaces, no shared name, or different shapes.
        """
        if self.space != other.space:
            raise ValueError(f"A direction in space {self.space!r} cannot be compared with one in {other.space!r}.")
        total = self.overlap(other)
        by_name = {}
        for name in (name for name in self.vectors if name in other.vectors):
            a, b = self.vectors[name], other.vectors[name]
            by_name[name] = {"overlap": subspace_overlap(name, a, b), "null": null_overlap(len(a), len(b), a[0].numel())}
        return {
            "overlap": total,
            "null": sum(entry["null"] for entry in by_name.values()) / len(by_name),
            "by_name": by_name,
            "only_first": [name for name in self.vectors if name not in other.vectors],
            "only_second": [name for name in other.vectors if name not in self.vectors],
        }

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and numbers: the same direction whatever its metadata."""
        digest = hashlib.sha256()
        for name in sorted(self.vectors):
            rows = self.vectors[name].detach().cpu().contiguous()
            digest.update(f"{name}{tuple(rows.shape)}{rows.dtype}".encode())
            digest.update(rows.view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def inspect(self) -> dict[str, Any]:
        """What there is to know at a glance: space, polarity, layers, rows and norms per name, and the metadata. JSON-able."""
        parts = {
            name: {"rows": len(rows), "shape": list(rows.shape[1:]), "norms": [round(float(row.norm()), 6) for row in rows]}
            for name, rows in self.vectors.items()
        }
        return {"space": self.space, "polarity": self.polarity, "layers": self.layers, "vectors": parts, "metadata": self.metadata}

    def save(self, folder: str | Path) -> None:
        """Write ``direction.safetensors`` and then ``manifest.json``, which holds its hash; each by renaming a finished file.

        Raises:
            TypeError: ``metadata`` is not JSON (NaN is not).
        """
        try:
            json.dumps(self.metadata, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"The direction's metadata cannot be written as JSON ({error}): keep to strings, numbers, lists and dicts."
            ) from error
        facts = {"space": self.space, "polarity": self.polarity, "layers": self.layers, "metadata": self.metadata}
        direction_files.write(folder, self.vectors, facts)

    @staticmethod
    def load(folder: str | Path) -> ConceptDirection:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: Another schema, or contents that do not belong to the manifest.
        """
        vectors, manifest = direction_files.read(folder)
        space = manifest["space"]
        if manifest.get("polarity", POLARITY.get(space)) != POLARITY.get(space):
            raise ValueError(
                f"The manifest in {folder} gives polarity {manifest['polarity']!r} for space {space!r}, which has {POLARITY.get(space)!r}."
            )
        return ConceptDirection(vectors, space, manifest["metadata"])

    def push(self, repo_id: str, private: bool = True, revision: str | None = None) -> str:
        """Upload to the Hugging Face Hub as a model repository; returns the commit's id. Needs a token that may write."""
        return direction_files.push(self.save, repo_id, private, revision)

    @staticmethod
    def pull(repo_id: str, revision: str | None = None) -> ConceptDirection:
        """Download what :meth:`push` uploaded, checked as by :meth:`load`."""
        return ConceptDirection.load(direction_files.pull(repo_id, revision))


def match_names(names: Mapping[str, Any] | Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    """Names that match any of the glob patterns, in their own order; all of them for ``None``.

    Raises:
        ValueError: A pattern matches nothing; the closest name is given.
    """
    if patterns is None:
        return list(names)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"The parameter pattern {pattern!r} matches nothing: the closest is {closest(pattern, names)}.")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def closest(name: str, names: Mapping[str, Any] | Sequence[str]) -> str:
    """The most similar name, quoted, for an error message."""
    candidates = difflib.get_close_matches(name.strip("*"), list(names), n=1, cutoff=0.0)
    return repr(candidates[0]) if candidates else "none, because there are no candidates"
