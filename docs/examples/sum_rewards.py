"""Reward functions of ``configs/grpo/reward_functions.yaml``: every column of the data is an argument."""

from __future__ import annotations

from typing import Any


def exact(completions: list[str], answer: list[int], **columns: Any) -> list[float]:
    """1 for the sum and nothing else."""
    return [float(text.strip() == str(total)) for text, total in zip(completions, answer, strict=True)]


def digits(completions: list[str], **columns: Any) -> list[float]:
    """Share of characters that are digits: something that also a policy which knows nothing can learn."""
    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in completions]
