"""Global batch sizes, split over ranks in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class BatchArithmetic:
    """How a global batch is made up: ``global = ranks x micro x accumulation``, in sequences.

    Attributes:
        prompts: Global number of prompts (or plain examples) per optimizer step.
        generations: Completions per prompt; 1 where nothing is generated.
        ranks: Number of processes.
        micro: Sequences per forward pass on one rank.
        accumulation: Microbatches per rank and step.
    """

    prompts: int
    generations: int
    ranks: int
    micro: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step over all ranks."""
        return self.prompts * self.generations

    @property
    def prompts_per_rank(self) -> int:
        """Prompts that one rank handles per optimizer step."""
        return self.prompts // self.ranks

    def __str__(self) -> str:
        """The one line that is printed at start."""
        line = f"global batch {self.global_batch} = {self.ranks} ranks x {self.micro} micro x {self.accumulation} accumulation"
        return line + (f" (= {self.prompts} prompts x {self.generations} generations)" if self.generations > 1 else "")

    def as_dict(self) -> dict[str, int]:
        """For manifests and logs."""
        return asdict(self) | {"global_batch": self.global_batch}


def split_batch(prompts: int, ranks: int, generations: int = 1, micro: int | None = None) -> BatchArithmetic:
    """Split a global batch over ranks and microbatches.

    Args:
        prompts: Global prompts per optimizer step.
        ranks: Number of processes.
        generations: Completions per prompt.
        micro: Sequences per forward pass on one rank; ``None`` = all of the rank's at once.

    Raises:
        ValueError: If a size does not divide; the message names the nearest sizes that do.
    """
    for name, value in (("prompts", prompts), ("ranks", ranks), ("generations", generations), ("micro", 1 if micro is None else micro)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if prompts % ranks:
        below, above = prompts // ranks * ranks, -(-prompts // ranks) * ranks
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"A global batch of {prompts} prompts does not split over {ranks} ranks; {nearest} would.")
    local = prompts // ranks * generations
    micro = local if micro is None else micro
    if local % micro:
        divisors = [d for d in range(1, local + 1) if local % d == 0]
        nearest_micro = min(divisors, key=lambda d: (abs(d - micro), d))
        raise ValueError(f"{local} sequences per rank do not split into microbatches of {micro}; {nearest_micro} would.")
    return BatchArithmetic(prompts, generations, ranks, micro, local // micro)
