r"""Concept directions: where training should not go, as an artefact, and the pure maths that makes and compares them.

**Polarity, stated once.** A row ``v`` of a direction in ``space="parameter"`` is a *loss-gradient* direction: it points where
``NLL(concept) - NLL(clean)`` grows. Gradient descent applies ``-lr * g``. Hence ``<g, v> > 0`` for a loss gradient ``g`` means that the
step lowers the concept's NLL relative to the clean one: training moves *towards* the concept, and this is what a one-sided gate removes. An
*activation* difference ``d = h(concept) - h(clean)`` has the opposite sign: a step moves a hidden state towards the concept where
``<dL/dh, d> < 0``, so its loss-gradient direction is ``-d``.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from theodolite.seeds import derive_seed

Space: TypeAlias = Literal["parameter"]
SCHEMA_VERSION = 1
_DEPENDENT = 1e-6  # a row whose part outside the earlier rows is below this share of its length is rounding noise, not a direction


@dataclass(frozen=True)
class ConceptDirection:
    """Rows per parameter along which a concept is learnt.

    Attributes:
        vectors: ``{parameter name: (k, *shape)}``; ``k`` may differ between parameters. Finite, at least one row each.
        space: What the rows live in. ``parameter``: loss-gradient directions of the named parameters (polarity: module docstring).
        metadata: JSON-able facts about where the direction comes from (method, pairs, seed, ...).

    Raises:
        ValueError: No vectors, an unknown space, or a vector that is empty, not floating or not finite.
    """

    vectors: dict[str, Tensor]
    space: Space = "parameter"
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.space != "parameter":
            raise ValueError(f"space={self.space!r} is unknown: use 'parameter'.")
        if not self.vectors:
            raise ValueError("A concept direction needs at least one parameter with a vector, and it has none.")
        for name, rows in self.vectors.items():
            if rows.ndim < 2 or rows.numel() == 0 or not rows.is_floating_point():
                raise ValueError(
                    f"The direction of {name} is {rows.dtype} of shape {tuple(rows.shape)}: it must be floating, (k, *parameter shape)."
                )
            if not torch.isfinite(rows).all():
                raise ValueError(f"The direction of {name} contains NaN or infinite values: extract it again from finite gradients.")

    def orthonormal(self) -> ConceptDirection:
        """The same direction with orthonormal rows (see :func:`orthonormal_rows`).

        Raises:
            ValueError: A parameter has nothing but zero rows.
        """
        bases = {name: orthonormal_rows(rows) for name, rows in self.vectors.items()}
        for name, rows in bases.items():
            if len(rows) == 0:
                raise ValueError(f"The direction of {name} is zero: leave this parameter out, there is nothing to project on.")
        return ConceptDirection(bases, self.space, self.metadata)

    def check_against(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Compare with the parameters of a module.

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
            if tuple(rows.shape[1:]) != tuple(shapes[name]):
                raise ValueError(
                    f"The direction of {name} has rows of shape {tuple(rows.shape[1:])}, the parameter has {tuple(shapes[name])}."
                )

    def select(self, patterns: Sequence[str]) -> ConceptDirection:
        """The part on parameters that match any of the glob patterns; raises ``ValueError`` as :func:`match_names` does."""
        return ConceptDirection({name: self.vectors[name] for name in match_names(self.vectors, patterns)}, self.space, self.metadata)

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
        return sum(_subspace_overlap(name, self.vectors[name], other.vectors[name]) for name in shared) / len(shared)

    def save(self, folder: str | Path) -> None:
        """Write ``direction.safetensors`` and then ``manifest.json``, which holds its hash; each by renaming a finished file.

        Raises:
            TypeError: ``metadata`` is not JSON.
        """
        target = Path(folder)
        try:
            json.dumps(self.metadata)
        except TypeError as error:
            raise TypeError(
                f"The direction's metadata cannot be written as JSON ({error}): keep to strings, numbers, lists and dicts."
            ) from error
        content = save_tensors({name: rows.detach().cpu().contiguous() for name, rows in self.vectors.items()})
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": "concept_direction",
            "space": self.space,
            "shapes": {name: list(rows.shape) for name, rows in self.vectors.items()},
            "metadata": self.metadata,
            "sha256": hashlib.sha256(content).hexdigest(),
            "versions": {"torch": torch.__version__, "safetensors": safetensors.__version__, "python": platform.python_version()},
        }
        target.mkdir(parents=True, exist_ok=True)
        _replace(target / "direction.safetensors", content)
        _replace(target / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())

    @staticmethod
    def load(folder: str | Path) -> ConceptDirection:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: Another schema, or contents that do not belong to the manifest.
        """
        source = Path(folder)
        for name in ("manifest.json", "direction.safetensors"):
            if not (source / name).is_file():
                raise FileNotFoundError(f"{source} holds no {name}: give the folder that ConceptDirection.save wrote.")
        manifest = json.loads((source / "manifest.json").read_text())
        if manifest.get("schema_version") != SCHEMA_VERSION or manifest.get("kind") != "concept_direction":
            raise ValueError(f"{source / 'manifest.json'} is not a concept direction of schema {SCHEMA_VERSION}: extract it again.")
        content = (source / "direction.safetensors").read_bytes()
        if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
            raise ValueError(f"{source / 'direction.safetensors'} does not have the hash that its manifest records: extract it again.")
        return ConceptDirection(load_tensors(content), manifest["space"], manifest["metadata"])


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


def orthonormal_rows(rows: Tensor) -> Tensor:
    """Gram-Schmidt in row order (twice, in float64), which keeps the orientation of every row.

    Args:
        rows: (k, *shape). Zero rows and rows that depend on earlier ones are dropped.

    Returns:
        (k', *shape) with ``k' <= k``, possibly 0, in at least float32.

    Raises:
        ValueError: NaN or infinite values.
    """
    if not torch.isfinite(rows).all():
        raise ValueError("Rows with NaN or infinite values cannot be orthonormalised.")
    flat = rows.flatten(1).double()
    kept = flat[:0]
    for row in flat:
        length = torch.linalg.vector_norm(row)
        if length == 0:
            continue
        unit = row / length
        for _ in range(2):
            unit = unit - kept.T @ (kept @ unit)
        rest = torch.linalg.vector_norm(unit)
        if rest > _DEPENDENT:
            kept = torch.cat([kept, (unit / rest)[None]])
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return kept.to(dtype).view(len(kept), *rows.shape[1:])


def gradient_difference(
    differences: Mapping[str, Tensor], method: Literal["mean", "svd"] = "mean", k: int = 1, metadata: Mapping[str, Any] | None = None
) -> ConceptDirection:
    r"""A direction from per-pair gradient differences ``D_i = grad NLL(concept_i) - grad NLL(clean_i)``.

    ``mean``: ``v = sum_i D_i / |sum_i D_i|``. ``svd``: the top ``k`` right singular vectors of the stack of ``D_i``, found through the
    (n, n) Gram matrix; a singular vector has no sign of its own, so each is turned to agree with the majority of pairs (``<D_i, v> > 0``;
    on a tie with the sum).

    Args:
        differences: ``{parameter: (n, *shape)}``. For ``mean`` one row that already is a sum will do.
        method: ``mean`` or ``svd``.
        k: Rows per parameter for ``svd``; 1 for ``mean``.
        metadata: Facts to keep; the parameters without any gradient are added as ``without_direction``.

    Returns:
        A direction with orthonormal rows. A parameter whose gradient is zero for all pairs (LoRA ``A`` while ``B = 0``) has none and is
        left out; with fewer than ``k`` independent pairs it has fewer rows.

    Raises:
        ValueError: Non-finite gradients, ``k`` out of range, or no parameter with a gradient.
    """
    check_method(method, k)
    vectors: dict[str, Tensor] = {}
    for name, stack in differences.items():
        if not torch.isfinite(stack).all():
            raise ValueError(f"The gradient difference of {name} contains NaN or infinite values: no direction can be taken from it.")
        if method == "svd" and k > len(stack):
            raise ValueError(f"k={k} singular vectors need at least as many pairs, and there are {len(stack)}.")
        rows = orthonormal_rows(stack.double().sum(0, keepdim=True)) if method == "mean" else _top_singular_rows(stack, k)
        if len(rows) > 0:
            vectors[name] = rows.float()
    if not vectors:
        raise ValueError("Every gradient difference is zero, so there is no direction: the pairs' two sides are the same to the model.")
    facts = {**(metadata or {}), "method": method, "k": k, "without_direction": [name for name in differences if name not in vectors]}
    return ConceptDirection(vectors, metadata=facts)


def check_method(method: str, k: int) -> None:
    """Refuse an unknown method or a ``k`` that it cannot give (``ValueError``, one sentence)."""
    if method not in ("mean", "svd"):
        raise ValueError(f"method={method!r} is unknown: use 'mean' or 'svd'.")
    if k < 1 or (method == "mean" and k != 1):
        raise ValueError(f"k={k} is out of range: a mean has k=1, method='svd' takes k >= 1.")


def haar_random_like(like: ConceptDirection | Mapping[str, Sequence[int]], k: int | None = None, seed: int = 0) -> ConceptDirection:
    """Uniformly random orthonormal rows, the control with matched shape and norm.

    Args:
        like: A direction (its number of rows per parameter is the default) or ``{parameter name: shape}``.
        k: Rows per parameter.
        seed: Each parameter's rows are a function of this and its name.

    Raises:
        ValueError: ``k`` is missing, below 1, or larger than a parameter.
    """
    shapes = {n: (len(v), tuple(v.shape[1:])) for n, v in like.vectors.items()} if isinstance(like, ConceptDirection) else None
    if shapes is None:
        if k is None:
            raise ValueError("haar_random_like needs k when it is given shapes instead of a direction.")
        shapes = {name: (k, tuple(shape)) for name, shape in like.items()}  # type: ignore[union-attr]
    vectors = {name: _haar_rows(name, k or own_k, shape, seed) for name, (own_k, shape) in shapes.items()}
    return ConceptDirection(vectors, metadata={"source": "haar_random", "seed": seed, "k": k})


def _haar_rows(name: str, k: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """(k, *shape) orthonormalised Gaussian rows: uniform on the Stiefel manifold."""
    if not 1 <= k <= math.prod(shape):
        raise ValueError(f"k={k} orthonormal rows do not exist in the {math.prod(shape)} dimensions of {name}.")
    generator = torch.Generator().manual_seed(derive_seed("haar", seed, name))
    return orthonormal_rows(torch.randn(k, *shape, generator=generator, dtype=torch.float64)).float()


def _top_singular_rows(stack: Tensor, k: int) -> Tensor:
    """Top ``k`` right singular vectors of (n, *shape), by decreasing singular value, oriented by majority vote."""
    flat = stack.flatten(1).double()
    values, left = torch.linalg.eigh(flat @ flat.T)
    order = torch.argsort(values, descending=True)[:k]
    order = order[values[order] > _DEPENDENT**2 * values.max().clamp_min(0)]
    rows = orthonormal_rows((left[:, order].T @ flat).view(len(order), *stack.shape[1:]))
    scores = flat @ rows.flatten(1).T
    votes = torch.sign(scores).sum(0)
    orientation = torch.sign(torch.where(votes == 0, scores.sum(0), votes))
    return rows * torch.where(orientation == 0, 1.0, orientation).view(-1, *[1] * (stack.ndim - 1))


def _subspace_overlap(name: str, first: Tensor, second: Tensor) -> float:
    """Root mean squared cosine of the principal angles between two row spaces."""
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(f"The two directions of {name} have rows of shape {tuple(first.shape[1:])} and {tuple(second.shape[1:])}.")
    a, b = orthonormal_rows(first).flatten(1), orthonormal_rows(second.to(first.device)).flatten(1)
    if min(len(a), len(b)) == 0:
        return 0.0
    cross = a.double() @ b.double().T
    return math.sqrt(float(cross.square().sum()) / min(len(a), len(b)))


def _replace(path: Path, content: bytes) -> None:
    """Write beside the target, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
