"""Nested prefixes of a dictionary, from whichever form a config gives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def resolve_prefixes(latents: int, prefixes: Sequence[float] | None = None, blocks: Sequence[int] | None = None) -> tuple[int, ...]:
    """Ends of the nested prefixes.

    Args:
        latents: M.
        prefixes: Cumulative sizes, ``[256, 1024, 4096]``, or fractions of M that end in 1, ``[0.0625, 0.25, 1]``.
        blocks: Sizes of the blocks between prefixes, ``[256, 768, 3072]``.

    Returns:
        Increasing sizes, the last one M; ``(M,)`` where nothing is given.

    Raises:
        ValueError: If both forms are given, or they do not increase to M.
    """
    if prefixes and blocks:
        raise ValueError("prefixes and prefix_blocks both say how latents nest; give one of them.")
    if blocks:
        ends = tuple(accumulate(blocks))
    elif prefixes and prefixes[-1] == 1:
        ends = tuple(round(fraction * latents) for fraction in prefixes)
    else:
        ends = tuple(int(end) for end in prefixes or (latents,))
    if ends[-1] != latents or ends[0] < 1 or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(f"The prefixes come to {list(ends)}; they must increase to the {latents} latents.")
    return ends
