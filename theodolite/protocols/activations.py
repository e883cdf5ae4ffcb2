"""Activations: batches for sparse coders, tables of rows for talkative autoencoders, and what sparse coders offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor, nn


@dataclass(slots=True)
class ActivationRows:
    """Rows of an activation bank: what a talkative autoencoder is trained on and measured with.

    Attributes:
        ids: ``"<document>:<position>"``, the same in every subset of the bank and on every rank.
        documents: Each row's document: rows of one document are not independent.
        activations: (R, d) in the producer's own units, never normalised.
        texts: Captions or token contexts where the source has some, else empty strings.
    """

    ids: tuple[str, ...]
    documents: tuple[str, ...]
    activations: Tensor
    texts: tuple[str, ...]


class ActivationBatch(TypedDict):
    """This rank's share of a global batch of paired activations: rows ``r, r + W, ...`` of it on rank r of W.

    Keys:
        input: (B, d_in) at the source site, in the producer's units and dtype, never normalised.
        target: (B, d_out) at the target site, likewise; the same tensor as ``input`` for an autoencoder.
        position: (B,) int64 position of the token in its packed sequence.
        token: (B,) int64 token id.
        row: (B,) int64 number of the token in the stream, ``sequence * length + position``: the same whatever the number of ranks.
    """

    input: Tensor
    target: Tensor
    position: Tensor
    token: Tensor
    row: Tensor


@runtime_checkable
class ActivationSource(Protocol):
    """A datamodule that yields :class:`ActivationBatch`; sizes and sites are known after its constructor."""

    input_site: Any
    """:class:`theodolite.sites.ActivationSite` of ``input``."""
    target_site: Any
    """:class:`theodolite.sites.ActivationSite` of ``target``."""
    global_batch_size: int
    """Rows per training batch over all ranks."""

    @property
    def input_width(self) -> int:
        """d_in, from the model's config: no weights are loaded for it."""
        ...

    @property
    def target_width(self) -> int:
        """d_out, likewise."""
        ...

    @property
    def producer(self) -> nn.Module:
        """The language model, in evaluation mode and without gradients, for evaluations that splice something into it."""
        ...

    def held_out_tokens(self, sequences: int, split: str) -> Tensor:
        """(sequences, length) int64 packed token ids of the ``validation`` or ``test`` stream, the same on every rank."""
        ...


@runtime_checkable
class ActivationTable(Protocol):
    """Rows of activations in a fixed order: a longer table of the same key begins with the rows of a shorter one."""

    @property
    def key(self) -> Mapping[str, Any]:
        """Plain data that decides every row (model, site, corpus, positions), and not how many there are."""
        ...

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def rows(self, indices: Sequence[int]) -> ActivationRows:
        """Rows by number, in the order asked for."""
        ...


@runtime_checkable
class ActivationTables(Protocol):
    """A datamodule with activations of ``train``, ``validation`` and ``test`` documents, no document in two of them."""

    def table(self, split: str) -> ActivationTable:
        """The rows of a split; made first, by all ranks together, where they are not on disk yet. All ranks must call it."""
        ...


@runtime_checkable
class NestedCoder(Protocol):
    """A sparse coder with nested prefixes, as evaluations see it (:class:`theodolite.lightning_modules.transcoder.Transcoder`)."""

    prefixes: Tensor
    """(G,) int64 ends of the prefixes, the last one all latents."""

    def __call__(self, inputs: Tensor, prefix: int | None = None) -> Tensor:
        """(..., d_in) raw inputs to (..., d_out) reconstructions by one of the prefixes (None = all latents), without gradient."""
        ...

    def encode(self, inputs: Tensor) -> Any:
        """:class:`theodolite.functional.sparse_codes.SparseCodes` of (N, d_in) raw inputs, by the inference rule."""
        ...
