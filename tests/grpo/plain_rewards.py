"""Reward functions that tests name by import path; nothing heavy is imported here."""

from __future__ import annotations

import time
from typing import Any


def length(prompts: list[Any], completions: list[Any], target: list[int], **columns: Any) -> list[float]:
    assert prompts == ["Say.", "Say."]
    print("noise on standard output")
    return [float(len(text) == n) for text, n in zip(completions, target, strict=True)]


def silent_on_first(completions: list[Any], **columns: Any) -> list[float | None]:
    return [None, *[0.25] * (len(completions) - 1)]


def never(completions: list[Any], **columns: Any) -> list[None]:
    return [None] * len(completions)


def raises(**columns: Any) -> list[float]:
    raise KeyError("no")


def hangs(**columns: Any) -> list[float]:
    time.sleep(60)
    return []


def too_few(**columns: Any) -> list[float]:
    return [1.0]


def chat(completions: list[Any], **columns: Any) -> list[float]:
    return [float(messages[0]["role"] == "assistant" and messages[0]["content"] == "abc") for messages in completions]


def odd(completions: list[Any], **columns: Any) -> list[bool]:
    return [len(text) % 2 == 1 for text in completions]


def vowels(completions: list[Any], **columns: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]
