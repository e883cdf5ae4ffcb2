"""The warm start: a verbaliser learns to write captions, reconstructors learn to read them.

Run it (CPU; the toy system, after its target model)::

    theodolite fit --config configs/talkative/sft.yaml

On several processes the same config computes the same numbers::

    torchrun --nproc_per_node=2 train.py fit --config configs/talkative/sft.yaml --trainer.devices=2 --trainer.strategy=ddp
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from theodolite.distributed import gather_objects
from theodolite.protocols import ActivationRows

from ..evaluation import add_sums
from ..scoring import selected_log_probs
from .module import Sums, TalkativeModule


class TalkativeSFT(TalkativeModule):
    """Cross-entropy of captions given activations, and regression of activations from captions, for every reconstructor.

    The parts share no parameter, so each minimises its own loss. The held-out reconstructor learns here and nowhere else.

    Args:
        module_args: Everything: see :class:`~theodolite.lightning_modules.talkative.module.TalkativeModule`.
    """

    def __init__(self, **module_args: Any) -> None:
        super().__init__(**module_args)
        self.save_hyperparameters(ignore=["verbaliser", "reconstructor", "held_out"])

    def freeze_parts(self) -> None:
        """Everything learns that the settings let learn."""

    def accumulate(self, rows: ActivationRows) -> Sums:
        """One pass over this rank's captions; losses have the global denominators."""
        if not all(rows.texts):
            missing = next(name for name, text in zip(rows.ids, rows.texts, strict=True) if not text)
            raise ValueError(f"Row {missing} has no caption to learn from; give one for every training row.")
        activations = rows.activations.to(self.device)
        ids, mask = self.caption_ids(rows.texts)
        tokens, count = torch.tensor(gather_objects((float(mask.sum()), float(len(ids))))).sum(dim=0).tolist()
        sums: list[Sums] = []
        with self.timed("gradients"):
            for part in self.microbatches(len(ids)):
                loss, found = self._microbatch(activations[part], rows.texts[part], ids[part], mask[part], tokens, count)
                self.backward_part(loss)
                sums.append(found)
        return add_sums(sums)

    def _microbatch(
        self, activations: Tensor, texts: Sequence[str], ids: Tensor, mask: Tensor, tokens: float, count: float
    ) -> tuple[Tensor, Sums]:
        sums: Sums = {}
        losses: list[Tensor] = []
        if any(p.requires_grad for p in self.writer.parameters()):
            logits = self.writer(activations, torch.arange(len(ids), device=ids.device), ids, mask)
            losses.append(-(selected_log_probs(logits, ids) * mask).sum() / tokens)
            sums["caption_loss"] = (float(losses[-1].detach()), 0.0)
        for name, reader in self.texts_to_vectors.items():
            losses.append(self.row_errors(reader(*reader.encode(texts)), activations).sum() / count)
            sums[f"{name}_loss"] = (float(losses[-1].detach()), 0.0)
        loss = torch.stack(losses).sum()
        return loss, sums | {"loss": (float(loss.detach()), 0.0)}
