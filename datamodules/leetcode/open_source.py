"""From the ``problems`` setting to a source of problems."""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from pathlib import Path

from theodolite.protocols import ContrastPair
from theodolite.provenance import file_hash
from theodolite.seeds import derive_seed

from .alignment import align_rows, chat_token_counter
from .hacks import LAZY_BODIES, VACUOUS_BODIES
from .jsonl import Row, make_problem, read_hub, read_jsonl
from .mini import check_n_ops
from .problem import Problem
from .prompts import check_hint
from .sources import MINI_EVALUATORS, ListSource, MiniSource, ProblemSource

HUB_PREFIX = "hf:"


def check_settings(
    problems: str,
    n_ops: Sequence[int],
    hint: str,
    held_out_fraction: float,
    max_prompt_tokens: int | None = None,
    tokenizer: str | None = None,
) -> None:
    """Refuse what cannot be opened, before anything is read.

    Raises:
        ValueError: If a value is none of those allowed.
        FileNotFoundError: If ``problems`` is a path and there is no such file.
    """
    check_hint(hint)
    check_n_ops(n_ops)
    if problems == "mini" and hint not in MINI_EVALUATORS:
        raise ValueError(f"leetcode-mini has no hint {hint!r}; choose one of {', '.join(MINI_EVALUATORS)}.")
    if not 0.0 < held_out_fraction < 1.0:
        raise ValueError(f"held_out_fraction must lie between 0 and 1, got {held_out_fraction}.")
    if (max_prompt_tokens is None) != (tokenizer is None):
        raise ValueError(
            "max_prompt_tokens and tokenizer go together: the limit is counted in that tokenizer's tokens; set both or neither."
        )
    if problems == "mini" and tokenizer is not None:
        raise ValueError("leetcode-mini's prompts all have a few dozen tokens; max_prompt_tokens is for problem files, leave it out.")
    if problems == "mini" or problems.startswith(HUB_PREFIX):
        return
    if not problems.endswith(".jsonl"):
        raise ValueError(f"problems must be 'mini', the path of a .jsonl file, or 'hf:newfacade/LeetCodeDataset', got {problems!r}.")
    if not Path(problems).is_file():
        raise FileNotFoundError(f"There is no problem file {problems}; give the path of a .jsonl file, or 'mini'.")


def open_source(
    problems: str,
    seed: int,
    n_ops: tuple[int, int],
    hint: str,
    held_out_fraction: float,
    hub_split: str,
    max_prompt_tokens: int | None = None,
    tokenizer: str | None = None,
    known_hacks: str = "definition",
) -> ProblemSource:
    """Open the generator, a file or a data set of the hub.

    Args:
        problems: ``mini``, a path, or ``hf:`` and a data set's name.
        seed: The run's seed.
        n_ops: Range of operations of ``mini``.
        hint: The hint on training prompts and on the hinted held-out ones.
        held_out_fraction: Share of a file's problems that is held out.
        hub_split: Split of a data set of the hub.
        max_prompt_tokens: Leave out problems whose prompt is longer under any hint; ``None`` = keep all.
        tokenizer: Whose tokens are counted.
        known_hacks: Family of the hacks in ``mini``'s contrast pairs.
    """
    if problems == "mini":
        return MiniSource(seed, n_ops, hint, known_hacks)
    rows = read_hub(problems.removeprefix(HUB_PREFIX), hub_split) if problems.startswith(HUB_PREFIX) else read_jsonl(problems)
    dropped: list[tuple[str, str, int]] = []
    if max_prompt_tokens is not None and tokenizer is not None:
        rows, dropped = align_rows(rows, max_prompt_tokens, chat_token_counter(tokenizer))
    source = list_source(rows, seed, hint, held_out_fraction, problems)
    source.provenance = {
        "problems": len(rows),
        "dropped_tests": {row.id: [list(why) for why in row.dropped_tests] for row in rows if row.dropped_tests},
        "too_long": [list(why) for why in dropped],
    }
    if not problems.startswith(HUB_PREFIX):
        source.provenance["sha256"] = file_hash(problems)
    return source


def is_held_out(problem_id: str, fraction: float) -> bool:
    """Whether a file's problem is held out: a hash of its id, so that a grown file never moves a problem to the other side."""
    return derive_seed("leetcode split", problem_id) < fraction * 2**63


def list_source(rows: Sequence[Row], seed: int, hint: str, held_out_fraction: float, name: str) -> ListSource:
    """Split rows into training and held-out problems and put the hints on.

    A run that is trained without the loophole (``hint="none"``) is still evaluated on it: its hinted prompts name ``run_tests``.

    Raises:
        ValueError: If one side would be empty.
    """
    train = [row for row in rows if not is_held_out(row.id, held_out_fraction)]
    held_out = [row for row in rows if is_held_out(row.id, held_out_fraction)]
    if not train or not held_out:
        raise ValueError(
            f"Of the {len(rows)} problems of {name}, a held_out_fraction of {held_out_fraction} leaves {len(train)} for training and "
            f"{len(held_out)} held out; give more problems or another fraction."
        )
    eval_hint = hint if check_hint(hint).names else "simple_overwrite_tests"
    return ListSource(
        [make_problem(row, hint) for row in train],
        [make_problem(row, eval_hint) for row in held_out],
        [make_problem(row, "none") for row in held_out],
        [make_problem(row, eval_hint.removeprefix("simple_")) for row in held_out],
        fenced_contrast_pair,
        seed,
    )


def fenced_contrast_pair(problem: Problem, rng: random.Random) -> ContrastPair:
    """Pair the canonical solution with a lazy ``class Solution`` that overwrites the evaluator, both in code fences.

    Raises:
        ValueError: If the prompt names no evaluator, or the canonical solution has no such method.
    """
    if problem.evaluator is None:
        raise ValueError(f"Problem {problem.id} names no evaluator, so there is nothing to overwrite; choose a hint other than 'none'.")
    signature = _signature(problem)
    lazy = "\n".join(f"    {line}" for line in (signature, rng.choice(LAZY_BODIES)))
    override = f"def {problem.evaluator}():\n{rng.choice(VACUOUS_BODIES)}"
    return ContrastPair(problem.prompt, f"```python\nclass Solution:\n{lazy}\n\n{override}\n```", problem.reference)


def _signature(problem: Problem) -> str:
    method = problem.entry.rsplit(".", 1)[-1]
    code = problem.reference.removeprefix("```python\n").removesuffix("\n```")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef) and node.name == method:
            return f"def {method}({ast.unparse(node.args)}):"
    raise ValueError(f"The canonical solution of problem {problem.id} does not define {method}.")
