"""Completions that a window did not sample itself: whose they are, and how they get into it."""

from __future__ import annotations

from typing import Literal

from theodolite.protocols import Reward, Rollout, TokenSequence, Window

POLICY = "policy"
"""Source of the rollouts that the policy sampled itself."""


def foreign(rollout: Rollout) -> bool:
    """Whether something else than the policy wrote it."""
    return rollout.source != POLICY


def replace_rollout(
    window: Window,
    i: int,
    tokens: TokenSequence,
    text: str,
    log_probs: tuple[float, ...],
    reward: Reward,
    source: str,
    finish: str = "stop",
) -> None:
    """Put a replayed or teacher's completion in the place of rollout ``i``, in an ``on_rollouts`` hook.

    Its importance ratios are taken against ``log_probs``, so they must be what its author really assigned to the tokens.

    Args:
        window: Changed in place.
        i: Index on this rank; the prompt stays that of its group.
        tokens: Prompt and completion ids.
        text: The decoded completion.
        log_probs: Log-probability of every completion token under its author, at the training temperature.
        reward: Enters the group's advantages like any other.
        source: A name other than ``policy``; it flags the rollout in metrics, tables and gradient parts.
        finish: ``stop`` or ``length``.

    Raises:
        ValueError: The prompt is another, log-probabilities are missing, or the source is the policy.
    """
    old = window.rollouts[i]
    if tokens.prompt_ids != old.tokens.prompt_ids:
        raise ValueError(f"A completion of another prompt cannot replace rollout {i} of problem {old.problem!r}; keep it in its group.")
    if len(log_probs) != len(tokens.completion_ids):
        raise ValueError(f"{len(tokens.completion_ids)} tokens came with {len(log_probs)} log-probabilities; each needs its author's.")
    if source == POLICY:
        raise ValueError("A replaced rollout needs a source other than 'policy'; name who wrote it.")
    kept: Literal["stop", "length"] = "length" if finish == "length" else "stop"
    window.rollouts[i] = Rollout(tokens, text, tuple(log_probs), kept, old.problem, old.slot, old.sample, old.weight_version, source)
    window.rewards[i] = reward
    window.values[i] = reward.value
