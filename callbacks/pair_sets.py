"""Pairs for extraction: as given, with the base model's own completions as the clean side, or made into a control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from theodolite.binding import model_identity
from theodolite.callbacks.sequence_gradients import TokenPair, contrast_pairs, encode_pairs, pair_set_hash, require_scorer
from theodolite.functional.extraction import check_control, swap_sides
from theodolite.protocols import Completer, ContrastPair

CleanSide: TypeAlias = Literal["given", "base"]


@dataclass(frozen=True, slots=True)
class PairSet:
    """Encoded pairs, those to fit on and those held out.

    Attributes:
        fit: (concept, clean) in token ids.
        held_out: Likewise, on other prompts or at least other pairs.
        held_out_text: The held-out pairs as text.
        facts: Metadata: sources, numbers and hashes of the pairs, and the model that was asked.
    """

    fit: list[TokenPair]
    held_out: list[TokenPair]
    held_out_text: list[ContrastPair]
    facts: dict[str, Any]


def pair_set(
    trainer: Any, module: Any, path: str | None, n: int, held_out: int, seed: int, clean_side: CleanSide = "given", control: str = "none"
) -> PairSet:
    """``n`` pairs to fit and ``held_out`` more to validate on.

    Args:
        trainer: Whose datamodule offers pairs.
        module: A :class:`~theodolite.protocols.SequenceScorer`; a :class:`~theodolite.protocols.Completer` too for base completions.
        path: JSONL file of pairs; None asks the datamodule.
        n: Pairs to fit on.
        held_out: Pairs to validate on.
        seed: Of the pairs and of a control's draws.
        clean_side: ``given``, or ``base``: the module's own greedy completion of the prompt, so that the two sides differ in what the
            base model would not have written.
        control: ``shuffled`` swaps the sides of each fit pair by a coin; ``placebo`` puts two samples of the base model in both sides'
            place.

    Raises:
        ValueError: Too few pairs, or an unknown control.
        TypeError: Base completions from a module that cannot complete.
    """
    check_control(control)
    pairs = contrast_pairs(trainer, path, n + held_out, seed)
    if clean_side == "base":
        pairs = _with_base_completions(module, pairs, seed)
    fit_text, held_out_text = pairs[:n], pairs[n:]
    if control == "placebo":
        fit_text = _placebo(module, fit_text, seed)
    scorer = require_scorer(module)
    fit = encode_pairs(scorer, fit_text)
    if control == "shuffled":
        fit = [(b, a) if swap else (a, b) for (a, b), swap in zip(fit, swap_sides(n, seed), strict=True)]
    model, revision = model_identity(module)
    facts = {"n_pairs": n, "pair_set_sha256": pair_set_hash(fit), "clean_side": clean_side, "model": model, "model_revision": revision}
    return PairSet(fit, encode_pairs(scorer, held_out_text), held_out_text, facts | {"control": control, "seed": seed})


def require_completer(module: Any) -> Completer:
    """The module as a :class:`Completer`, or ``TypeError`` in one sentence."""
    if not isinstance(module, Completer):
        raise TypeError(f"{type(module).__name__} cannot complete prompts: this needs a module with complete(prompts, n, seed, greedy).")
    return module


def _with_base_completions(module: Any, pairs: list[ContrastPair], seed: int) -> list[ContrastPair]:
    """Pairs whose clean side is the greedy completion; where that is the concept side itself, the given clean side stays."""
    completions = require_completer(module).complete([pair.prompt for pair in pairs], 1, seed, greedy=True)
    return [
        ContrastPair(pair.prompt, pair.concept, pair.clean if texts[0] == pair.concept else texts[0])
        for pair, texts in zip(pairs, completions, strict=True)
    ]


def _placebo(module: Any, pairs: list[ContrastPair], seed: int) -> list[ContrastPair]:
    """Two samples per prompt, neither of them chosen."""
    completions = require_completer(module).complete([pair.prompt for pair in pairs], 2, seed, greedy=False)
    return [ContrastPair(pair.prompt, *texts) for pair, texts in zip(pairs, completions, strict=True)]
