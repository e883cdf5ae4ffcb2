"""Do masked components attend where the target attends? KL between attention patterns, computed against the true weights."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from theodolite.functional.attention_patterns import attention_log_pattern, pattern_kl_sum

from .component_model import importances_as_masks
from .decomposition import Decomposition, Prepared
from .draws import Draws
from .measures import Sums, ratios
from .objectives import sampled_masks


@dataclass(frozen=True, kw_only=True)
class AttentionPatterns:
    """KL of attention patterns under masks to those of the target, mean over positions and heads, by attention module.

    Queries and keys are what the projections put out in the forward pass; the target's come from its own weights in a clean pass.

    Attributes:
        n_heads: Query heads.
        n_key_value_heads: Key heads; None = ``n_heads``.
        q_proj_path: Glob pattern of query projections, with ``k_proj_path``.
        k_proj_path: Glob pattern of key projections. A projection that is not decomposed contributes its own output.
        c_attn_path: Glob pattern of joint projections (queries, keys and values in thirds), instead of the two.
        masks: ``ci`` (importances, without delta) or ``stochastic``.
        samples: Masks drawn per batch, for ``stochastic``.
        rotary: Rotate queries and keys as the parent module does, if it has a ``rotate`` method.
    """

    name: ClassVar[str] = "attention_patterns"
    n_heads: int = 1
    n_key_value_heads: int | None = None
    q_proj_path: str | None = None
    k_proj_path: str | None = None
    c_attn_path: str | None = None
    masks: Literal["ci", "stochastic"] = "stochastic"
    samples: int = 1
    rotary: bool = True

    def __post_init__(self) -> None:
        """Check that the paths are one of the two forms."""
        if (self.c_attn_path is None) == (self.q_proj_path is None or self.k_proj_path is None):
            raise ValueError("attention_patterns needs either q_proj_path and k_proj_path, or c_attn_path.")
        if self.masks not in ("ci", "stochastic"):
            raise ValueError(f"attention_patterns: there are no masks {self.masks!r}; choose ci or stochastic.")

    @property
    def label(self) -> str:
        """Name in logs."""
        return f"{self.masks}_attention_patterns"

    def update(self, parts: Decomposition, prepared: Prepared, draws: Draws) -> Sums:
        """Summed KL by attention module, and the number of (row, head, query position) triples.

        Raises:
            ValueError: If a pattern matches no decomposed module, or queries and keys do not pair up.
        """
        pairs = self.pairs(parts.names)
        sums: Sums = {}
        for sample in range(self.samples if self.masks == "stochastic" else 1):
            stochastic = self.masks == "stochastic"
            masks = sampled_masks(parts, prepared, draws, sample) if stochastic else importances_as_masks(prepared.lower)
            masked = parts.model(prepared.batch, masks, keep=("outputs",)).outputs
            for parent, (query, key) in pairs.items():
                target, found = (self.log_pattern(parts, parent, query, key, outputs) for outputs in (prepared.outputs, masked))
                total = pattern_kl_sum(target, found).to(torch.float64)
                before = sums.get(parent, (torch.zeros_like(total), 0.0))
                sums[parent] = (before[0] + total, before[1] + target[..., 0].numel())
        return sums

    def compute(self, totals: Sums) -> dict[str, float]:
        """By attention module, and over all."""
        total, count = sum(float(value) for value, _ in totals.values()), sum(count for _, count in totals.values())
        return ratios(totals) | {"mean": total / count if count else float("nan")}

    def pairs(self, names: list[str]) -> dict[str, tuple[str, str]]:
        """(query, key) projections by attention module; the same joint one twice."""
        if self.c_attn_path is not None:
            found = {name.rpartition(".")[0]: (name, name) for name in fnmatch.filter(names, self.c_attn_path)}
        else:
            queries, keys = (
                {name.rpartition(".")[0]: name for name in fnmatch.filter(names, str(path))}
                for path in (self.q_proj_path, self.k_proj_path)
            )
            if set(queries) != set(keys):
                raise ValueError("attention_patterns: queries and keys must both be decomposed in the same attention modules.")
            found = {parent: (queries[parent], keys[parent]) for parent in queries}
        if not found:
            raise ValueError("attention_patterns: the paths match no decomposed module.")
        return found

    def log_pattern(self, parts: Decomposition, parent: str, query: str, key: str, outputs: dict[str, Tensor]) -> Tensor:
        """(B, heads, S, S) log-probabilities."""
        q, k = outputs[query], outputs[key]
        if query == key:
            q, k, _ = q.chunk(3, dim=-1)
        rotate = getattr(parts.model.target.get_submodule(parent), "rotate", None) if self.rotary else None
        return attention_log_pattern(q, k, self.n_heads, self.n_key_value_heads or self.n_heads, rotate)
