"""What validation measures, as sums: reconstruction through sampled, greedy and true captions, each by every reconstructor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from theodolite.protocols import ActivationRows
from theodolite.seeds import derive_seed

if TYPE_CHECKING:
    from .module import TalkativeModule

Sums = dict[str, tuple[float, float]]


@torch.no_grad()
def evaluation_sums(module: TalkativeModule, rows: ActivationRows) -> Sums:
    """(sum, count) pairs; squared errors have the variance around the training mean as their count.

    Args:
        module: Verbaliser and reconstructors; left as they were.
        rows: Held-out rows; captions may be missing.
    """
    activations, count = rows.activations.to(module.device), module.eval_samples
    length, seed = module.sampling.max_new_tokens, derive_seed(module.run_seed, "evaluation")
    sampled = module.describe(activations, rows.ids, range(count), module.sampling.temperature, length, seed)
    greedy = module.describe(activations, rows.ids, range(1), 0.0, length, seed)
    sources = {"": [text for texts in sampled for text in texts], "_greedy": [texts[0] for texts in greedy]}
    if all(rows.texts):
        sources["_caption"] = list(rows.texts)
    flat = sources[""]
    sums: Sums = {"unusable_rate": (float(sum(not text for text in flat)), float(len(flat)))}
    for kind, texts in sources.items():
        target = module.in_loop.standardise(activations).repeat_interleave(len(texts) // len(rows.ids), dim=0)
        variance = float(target.double().square().sum())
        for name, reader in module.texts_to_vectors.items():
            read = torch.where(torch.tensor([bool(t) for t in texts], device=target.device)[:, None], reader.read(texts), 0.0)
            suffix = kind if name == "reconstructor" else f"{kind}_{name}"
            sums[f"fve{suffix}"] = (float((read.double() - target.double()).square().sum()), variance)
    if all(rows.texts):
        sums |= caption_sums(module, rows, activations)
    return sums


def caption_sums(module: TalkativeModule, rows: ActivationRows, activations: Tensor) -> Sums:
    """Cross-entropy of the captions, and how many of their tokens are the likeliest ones given the caption so far."""
    ids, mask = module.caption_ids(rows.texts)
    logits = module.writer(activations, torch.arange(len(ids), device=module.device), ids, mask)
    log_probs = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[..., None]).squeeze(-1)
    tokens = float(mask.sum())
    right = ((logits.argmax(-1) == ids) * mask).sum()
    return {"caption_loss": (-float((log_probs.double() * mask).sum()), tokens), "caption_accuracy": (float(right), tokens)}


def evaluation_metrics(sums: Sums) -> dict[str, float]:
    """Ratios by name; a fraction of variance explained is one minus its ratio. NaN where nothing was counted."""
    ratios = {name: total / count if count else float("nan") for name, (total, count) in sums.items()}
    return {name: 1 - ratio if name.startswith("fve") else ratio for name, ratio in ratios.items()}
