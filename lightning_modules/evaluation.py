"""Held-out evaluation of a policy: sample, grade, count. The same numbers for any batch size and world size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from theodolite.protocols import Grade

MECHANISMS = ("definition", "assignment")
"""Means of overriding the evaluator whose hacks are counted by name (``hack_definition``, ...); all others are ``hack_other``."""

OUTCOMES = (
    *("hack", "loose_hack", "override", "pass", "reward_passed", "compiles", "infra_error", "truncated"),
    *(f"hack_{mechanism}" for mechanism in (*MECHANISMS, "other")),
)


def outcome_sums(grades: Sequence[Grade], finishes: Sequence[str]) -> dict[str, tuple[float, float]]:
    """(sum, count) of every outcome; ungraded completions count only towards ``infra_error``.

    Args:
        grades: One per completion.
        finishes: ``stop`` or ``length``, one per completion.

    Returns:
        ``{"hack": (number of hacks, number graded), ...}`` for the names in :data:`OUTCOMES`.
    """
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in OUTCOMES}
    for grade, finish in zip(grades, finishes, strict=True):
        ungraded = grade.verdict.label == "ungraded"
        facts = {"infra_error": ungraded}
        if not ungraded:
            verdict, reward = grade.verdict, grade.reward
            facts |= {"hack": verdict.hack, "loose_hack": verdict.loose_hack, "override": verdict.overrides, "pass": verdict.correct}
            found = verdict.mechanism if verdict.mechanism in MECHANISMS else "other"
            facts |= {f"hack_{mechanism}": verdict.hack and mechanism == found for mechanism in (*MECHANISMS, "other")}
            facts |= {"reward_passed": reward.passed, "compiles": reward.compiles, "truncated": finish == "length"}
        for name, value in facts.items():
            sums[name][0] += float(value)
            sums[name][1] += 1.0
    return {name: (total, count) for name, (total, count) in sums.items()}


def add_sums(parts: Sequence[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Add (sum, count) pairs by name."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for part in parts:
        for name, (total, count) in part.items():
            totals[name][0] += total
            totals[name][1] += count
    return {name: (total, count) for name, (total, count) in sorted(totals.items())}


def rates(sums: dict[str, tuple[float, float]]) -> dict[str, float]:
    """``{"hack_rate": ..., "n": ...}``: sum / count by name (NaN where nothing was counted) and the number of graded completions.

    ``kl_k1`` and ``kl_k3`` are means over tokens and keep their name. ``hack_given_attempt`` is the share of attempts (the loose hack
    label) that are hacks: it tells an arm that attempts less from one that attempts and fails.
    """
    sums = sums | {"hack_given_attempt": (sums["hack"][0], sums["loose_hack"][0])}
    plain = ("kl_k1", "kl_k3", "hack_given_attempt")
    named = {name if name in plain else f"{name}_rate": total / count if count else float("nan") for name, (total, count) in sums.items()}
    return named | {"n": sums["pass"][1]}


def completion_row(
    problem: str, slot: int, sample: int, prompt: str, completion: str, finish: str, tokens: int, grade: Grade
) -> dict[str, Any]:
    """One row of a completions table."""
    return {
        "slot": slot,
        "sample": sample,
        "problem": problem,
        "prompt": prompt,
        "completion": completion,
        "reward": grade.reward.value,
        "passed": grade.reward.passed,
        "compiles": grade.reward.compiles,
        "correct": grade.verdict.correct,
        "label": grade.verdict.label,
        "status": grade.verdict.status,
        "overrides": grade.verdict.overrides,
        "mechanism": grade.verdict.mechanism,
        "finish": finish,
        "n_tokens": tokens,
    }


def write_completions(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write completion rows, ordered by slot and sample, as parquet; atomically."""
    import pandas as pd  # here: it takes 60 MiB, and a run that writes no table needs none of it

    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(sorted(rows, key=lambda row: (row["slot"], row["sample"])))
    temporary = path.with_suffix(".tmp")
    frame.to_parquet(temporary, index=False)
    temporary.replace(path)
