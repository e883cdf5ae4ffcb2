"""Random numbers that belong to rows of the global batch, whatever rank or microbatch a row falls in.

Rows are numbered by their slot in the global batch. Slots are grouped into blocks, each with a generator of its own; a rank draws the
blocks in which it has rows and keeps those rows. Blocks are single rows where a row is large (sequences), and a few thousand where it is
small (toy features), so that neither the number of generators nor the numbers drawn in vain matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from theodolite.seeds import derive_seed

BLOCK_NUMBERS = 1 << 16
"""Numbers per block at least; part of the stream's definition, so changing it changes every draw."""


def uniform_rows(
    slots: Sequence[int], row_shape: Sequence[int], *seed: int | str, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """Numbers uniform on [0, 1), one set per row.

    Args:
        slots: Positions of the rows in the global batch.
        row_shape: Shape of one row's numbers.
        seed: What the draw is for: parts of :func:`~theodolite.seeds.derive_seed`.
        dtype: Of the result. Numbers are drawn in float32 whatever it is, so that precisions can be compared.
        device: Where they are drawn; the streams of different device types differ.

    Returns:
        (len(slots), *row_shape).
    """
    numbers = 1
    for size in row_shape:
        numbers *= size
    block_rows = max(1, BLOCK_NUMBERS // max(1, numbers))
    device = torch.device("cpu") if device is None else device
    parts: list[Tensor] = []
    position = 0
    while position < len(slots):
        block = slots[position] // block_rows
        end = position
        while end < len(slots) and slots[end] // block_rows == block:
            end += 1
        generator = torch.Generator(device).manual_seed(derive_seed(*seed, block))
        wanted = [slot - block * block_rows for slot in slots[position:end]]
        # always the whole block: what a generator gives first may depend on how much is asked for
        drawn = torch.rand((block_rows, *row_shape), generator=generator, device=device)
        if wanted == list(range(wanted[0], wanted[-1] + 1)):
            parts.append(drawn[wanted[0] : wanted[-1] + 1])
        else:
            parts.append(drawn[torch.tensor(wanted, device=device)])
        position = end
    if not parts:
        return torch.empty((0, *row_shape), dtype=dtype, device=device)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)
