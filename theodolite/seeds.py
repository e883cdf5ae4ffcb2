"""Counter-based seeds: a random draw is named by what it is for, not by how many draws came before it."""

from __future__ import annotations

import hashlib
import os


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts' values, the same on every machine, rank and Python version.

    ``derive_seed(run_seed, step, problem, sample)`` gives each sample its own stream, so a completion does not depend on which others
    share its batch, on the number of ranks, or on where a run was resumed.

    Args:
        parts: Integers and strings; ``1`` and ``"1"`` give different seeds.

    Returns:
        An integer in ``[0, 2**63)``.

    Raises:
        ValueError: If a string holds the control character U+001F, which separates the parts.
    """
    if any(isinstance(part, str) and "\x1f" in part for part in parts):
        raise ValueError(f"The parts {parts!r} of a seed hold the control character U+001F, which separates them; leave it out.")
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def run_seed(seed: int | None) -> int:
    """``seed`` itself, or the run's ``seed_everything`` where it is None (0 outside a seeded run)."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
