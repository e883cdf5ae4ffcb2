"""Turns packed token rows into rows of paired activations, of the positions that count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from theodolite.out_of_memory import FittingParts
from theodolite.protocols import ActivationBatch
from theodolite.sites import ActivationSite, collect_sites

from ..text.packing import TokenRow

Drop: TypeAlias = Literal["first", "begins", "separators", "padding"]
DROPS = ("first", "begins", "separators", "padding")


@dataclass(slots=True)
class PairedRows:
    """Rows of activations and where they come from; fields as in :class:`~theodolite.protocols.ActivationBatch`.

    ``input`` and ``target`` are None for rows of other ranks, of which only the numbers are known.
    """

    row: Tensor
    position: Tensor
    token: Tensor
    input: Tensor | None = None
    target: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row)

    def select(self, index: Tensor | slice) -> PairedRows:
        """Some of the rows, as new tensors or views."""
        parts = {}
        for field in fields(self):
            value = getattr(self, field.name)
            chosen = index.to(value.device) if isinstance(index, Tensor) and value is not None else index
            parts[field.name] = None if value is None else value[chosen]
        if self.target is self.input:
            parts["target"] = parts["input"]
        return PairedRows(**parts)

    def batch(self) -> ActivationBatch:
        """As a module gets it."""
        assert self.input is not None, "another rank's rows have no activations here"
        device = self.input.device
        numbers = {name: getattr(self, name).to(device) for name in ("row", "position", "token")}
        return cast(ActivationBatch, {"input": self.input, "target": self.target} | numbers)


def join_rows(parts: Sequence[PairedRows]) -> PairedRows:
    """The rows of all parts, in order."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for field in fields(PairedRows):
        values = [getattr(part, field.name) for part in parts]
        joined[field.name] = None if any(value is None for value in values) else torch.cat(values)
    if all(part.target is part.input for part in parts):
        joined["target"] = joined["input"]
    return PairedRows(**joined)


def kept_positions(row: TokenRow, drop: Sequence[Drop]) -> Tensor:
    """(T,) bool: positions that count. The first token's state is an attention sink that can be far larger than the others."""
    kept = torch.ones_like(row.attends)
    kept[0] = "first" not in drop
    masks: dict[Drop, Tensor] = {"begins": row.begins, "separators": row.separates, "padding": ~row.attends}
    for name, mask in masks.items():
        if name in drop:
            kept &= ~mask
    return kept


def numbers_of(rows: Sequence[TokenRow], drop: Sequence[Drop]) -> PairedRows:
    """Which rows of activations token rows give, without the activations."""
    parts = []
    for row in rows:
        position = kept_positions(row, drop).nonzero()[:, 0]
        parts.append(PairedRows(row.number * len(row.tokens) + position, position, row.tokens[position]))
    return join_rows(parts)


class PairProducer:
    """Runs the model on token rows, on as many at once as fit into memory.

    Args:
        model: The language model, on its device and in evaluation mode.
        sites: Source and target.
        batch_rows: Token rows per forward pass; halved where memory runs out.
        drop: Positions that do not count.
        keep_on: Device of the activations; None = the model's.
    """

    def __init__(
        self, model: nn.Module, sites: tuple[ActivationSite, ActivationSite], batch_rows: int, drop: Sequence[Drop],
        keep_on: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        self.model, self.sites, self.drop, self.keep_on = model, sites, drop, keep_on
        self.parts = FittingParts(batch_rows)

    def __call__(self, rows: Sequence[TokenRow]) -> PairedRows:
        """Activations of the positions that count, in the order of the token rows and their positions."""
        return join_rows(self.parts.map(lambda part: self._forward(rows[part]), len(rows)))

    def _forward(self, rows: Sequence[TokenRow]) -> PairedRows:
        device = next(self.model.parameters()).device
        tokens, attends = (torch.stack([getattr(row, name) for row in rows]) for name in ("tokens", "attends"))
        inputs = {"input_ids": tokens.to(device), "use_cache": False}
        if not bool(attends.all()):
            inputs["attention_mask"] = attends.to(device, torch.int64)
        found = collect_sites(self.model, list(dict.fromkeys(self.sites)), **inputs)
        kept = torch.stack([kept_positions(row, self.drop) for row in rows]).to(device)
        source = self._kept(found[self.sites[0]], kept)
        target = source if self.sites[0] == self.sites[1] else self._kept(found[self.sites[1]], kept)
        numbers = numbers_of(rows, self.drop)
        return PairedRows(numbers.row, numbers.position, numbers.token, source, target)

    def _kept(self, states: Tensor, kept: Tensor) -> Tensor:
        rows = states[kept]
        return rows if self.keep_on is None else rows.to(self.keep_on)
