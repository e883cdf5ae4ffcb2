"""Bookkeeping on a window of rollouts: who counts, who is computed for whom, and how rollouts are cut into microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from theodolite.functional.advantages import has_signal
from theodolite.protocols import Rollout, Verdict, Window
from theodolite.replay import foreign

TruncatedPolicy = Literal["keep", "mask", "exclude"]
ZeroVariancePolicy = Literal["skip", "drop", "refill"]
REPLAYED = Verdict(False, "ungraded", "replayed", False)
"""What the oracle has to say about a completion that this window did not sample: nothing."""


def counted(window: Window, truncated: TruncatedPolicy, zero_variance: ZeroVariancePolicy) -> list[bool]:
    """Which rollouts are part of the objective and of its denominators: scorable, not masked as truncated, in no dropped group."""
    kept = [not bool(value.isnan()) for value in window.values]
    if truncated != "keep":
        kept = [k and rollout.finish != "length" for k, rollout in zip(kept, window.rollouts, strict=True)]
    if zero_variance == "drop":
        alive = has_signal(window.values, window.group_size).tolist()
        kept = [k and alive[i // window.group_size] for i, k in enumerate(kept)]
    return kept


def check_reported(rollouts: Sequence[Rollout]) -> None:
    """Refuse completions whose ratios would be NaN.

    Raises:
        ValueError: The sampler reported no log-probability for a token.
    """
    for rollout in rollouts:
        if any(value != value for value in rollout.sampler_log_probs):
            raise ValueError(
                f"The sampler reported no log-probability for a token of problem {rollout.problem!r}, and ratios are taken against what it "
                "reports; set model.overlap_sampling and model.reuse_sampler_log_probs to false."
            )


def part_of(window: Window, i: int) -> str:
    """Name of the gradient part that a rollout belongs to."""
    return window.parts[i] if window.parts else window.rollouts[i].source


def merged(window: Window, kept: Sequence[bool]) -> Tensor:
    """How often each rollout stands for itself and its identical siblings; ``window.advantages`` becomes their mean.

    Siblings share prompt slot, completion, gradient part and weight, and were sampled by the policy.

    Returns:
        (n,) float64; 0 for those that another stands for.
    """
    repeats = torch.ones(len(window.rollouts), dtype=torch.float64)
    siblings: dict[tuple[object, ...], list[int]] = {}
    for i, rollout in enumerate(window.rollouts):
        if kept[i] and not foreign(rollout):
            weight = tuple(window.weights[i].reshape(-1).tolist()) if window.weights.numel() else ()
            siblings.setdefault((rollout.slot, rollout.tokens.completion_ids, part_of(window, i), weight), []).append(i)
    window.advantages = window.advantages.clone()
    for indices in siblings.values():
        window.advantages[indices] = window.advantages[indices].mean(dim=0)
        repeats[indices] = 0.0
        repeats[indices[0]] = len(indices)
    return repeats


def cut(indices: Sequence[int], lengths: Sequence[int], most_rows: int | None, most_tokens: int | None) -> list[list[int]]:
    """Sort by length, longest first, and cut into microbatches.

    Args:
        indices: What to cut.
        lengths: Completion tokens by index.
        most_rows: Rows per microbatch; None = no bound.
        most_tokens: Rows times longest row per microbatch (what is computed, padding included); None = no bound. A longer row goes alone.
    """
    ordered = sorted(indices, key=lambda i: (-lengths[i], i))
    microbatches: list[list[int]] = []
    for i in ordered:
        open_one = microbatches[-1] if microbatches else []
        rows = len(open_one) + 1
        too_many = most_rows is not None and rows > most_rows
        if not open_one or too_many or (most_tokens is not None and rows * lengths[open_one[0]] > most_tokens):
            microbatches.append([i])
        else:
            open_one.append(i)
    return microbatches


def prefix_runs(
    microbatches: Sequence[Sequence[int]],
    prompts: Sequence[tuple[int, ...]],
    most_tokens: int | None,
    parts: Sequence[str] | None = None,
) -> list[tuple[list[tuple[int, ...]], list[int]]]:
    """Consecutive microbatches whose distinct prompts are computed together.

    Args:
        microbatches: Rollout indices.
        prompts: Prompt ids by rollout.
        most_tokens: Distinct prompts times the longest of them; None = no bound. A microbatch is never split.
        parts: Name of every microbatch whose runs are to keep to one name; None = runs do not ask.

    Returns:
        Per run: its distinct prompts and the positions of its microbatches.
    """
    runs: list[tuple[list[tuple[int, ...]], list[int]]] = []
    for k, indices in enumerate(microbatches):
        own = list(dict.fromkeys(prompts[i] for i in indices))
        together = list(dict.fromkeys([*runs[-1][0], *own])) if runs else []
        fits = most_tokens is None or (bool(together) and len(together) * max(map(len, together)) <= most_tokens)
        if runs and fits and (parts is None or parts[k] == parts[k - 1]):
            runs[-1] = (together, [*runs[-1][1], k])
        else:
            runs.append((own, [k]))
    return runs


def pad_rows(rows: Sequence[Sequence[float] | Tensor], like: Tensor) -> Tensor:
    """Ragged rows as (B, T), 0 beyond their ends."""
    padded = torch.zeros_like(like)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.as_tensor(values, dtype=like.dtype)
    return padded


def per_token(values: Tensor, indices: Sequence[int], width: int, name: str) -> Tensor:
    """Rows of (n,) or (n, T) values as (B, 1) or (B, width).

    Raises:
        ValueError: The values have fewer columns than the longest completion has tokens.
    """
    rows = values[list(indices)]
    if rows.ndim == 1:
        return rows[:, None]
    if rows.shape[1] < width:
        raise ValueError(f"window.{name} has {rows.shape[1]} columns, but a completion has {width} tokens; give one column per token.")
    return rows[:, :width]
