"""Nested prefixes of a dictionary, from whichever of three forms a config gives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def resolve_prefixes(
    latents: int, prefixes: Sequence[int] | None = None, fractions: Sequence[float] | None = None, blocks: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Ends of the nested prefixes.

    Args:
        latents: M.
        prefixes: Cumulative sizes, ``[256, 1024, 4096]``.
        fractions: Cumulative sizes as fractions of M, ``[0.0625, 0.25, 1]``.
        blocks: Sizes of the blocks between prefixes, ``[256, 768, 3072]``.

    Returns:
        Increasing sizes, the last one M; ``(M,)`` where nothing is given.

    Raises:
        ValueError: If several forms are given, or they do not increase to M.
    """
    given = [name for name, value in (("prefixes", prefixes), ("prefix_fractions", fractions), ("prefix_blocks", blocks)) if value]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} both say how latents nest; give one of them.")
    if fractions:
        ends = tuple(round(fraction * latents) for fraction in fractions)
    elif blocks:
        ends = tuple(accumulate(blocks))
    else:
        ends = tuple(prefixes or (latents,))
    if ends[-1] != latents or ends[0] < 1 or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(f"{given[0] if given else 'prefixes'} gives the prefixes {list(ends)}; they must increase to {latents} latents.")
    return ends
