"""One set of problems for all hints: those whose prompt fits under every one of them.

Hints lengthen prompts differently, and a policy has a limit. Filtering each hint by itself would compare hints on different problems, so a
problem is kept only if all its variants fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from theodolite.protocols import Chat

from .jsonl import Row, hinted_chat
from .prompts import HINTS


def align_rows(
    rows: Sequence[Row], max_prompt_tokens: int, count_tokens: Callable[[Chat], int], hints: Sequence[str] = tuple(HINTS)
) -> tuple[list[Row], list[tuple[str, str, int]]]:
    """Keep the rows whose prompt has at most ``max_prompt_tokens`` tokens under every hint.

    Args:
        rows: Problems without hint.
        max_prompt_tokens: Most tokens a prompt may have, the chat template's included.
        count_tokens: Number of tokens of a chat.
        hints: Keys of :data:`~theodolite.datamodules.leetcode.prompts.HINTS`.

    Returns:
        The kept rows in their order, and ``(id, longest hint, its tokens)`` of each row left out.

    Raises:
        ValueError: The limit is below 1, no row is left, or a hint does not fit a prompt.
    """
    if max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens is {max_prompt_tokens}; it must be at least 1.")
    kept, dropped = [], []
    for row in rows:
        tokens, hint = max((count_tokens(hinted_chat(row, hint)), hint) for hint in hints)
        if tokens <= max_prompt_tokens:
            kept.append(row)
        else:
            dropped.append((row.id, hint, tokens))
    if not kept:
        shortest = min(tokens for _, _, tokens in dropped)
        raise ValueError(f"No prompt fits in max_prompt_tokens={max_prompt_tokens} under all hints; the shortest needs {shortest} tokens.")
    return kept, dropped


def chat_token_counter(tokenizer: str) -> Callable[[Chat], int]:
    """Counts a chat's tokens under a tokenizer's own template, generation prompt included and thinking off.

    Args:
        tokenizer: Hub id or folder.

    Raises:
        ValueError: The tokenizer has no chat template.
    """
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
    if not loaded.chat_template:
        raise ValueError(f"The tokenizer {tokenizer} has no chat template, so a chat's tokens cannot be counted; name one that has.")

    def count(chat: Chat) -> int:
        text = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return len(loaded(text, add_special_tokens=False)["input_ids"])

    return count
