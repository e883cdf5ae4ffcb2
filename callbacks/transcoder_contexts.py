"""Where each latent of a transcoder is most active: density and top-activating contexts, from one pass over held-out tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from theodolite.distributed import gather_objects, sum_over_ranks
from theodolite.protocols import ActivationSource, NestedCoder
from theodolite.provenance import write_json_atomic


class TopContexts(Callback):
    """Writes ``latents.json`` at the end of ``test``: for every latent its density, largest activation and strongest contexts.

    Contexts are ``{"value", "row", "tokens", "at"}``: activation, number of the token in the held-out stream, the token ids around it
    and which of them it is. Kept by a running merge over all latents at once; the same whatever the number of ranks or the batches,
    equal activations in order of their rows. ``text`` is added where the datamodule's model has a tokenizer.

    Args:
        contexts: Kept per latent.
        window: Tokens before and after.
        sequences: Held-out sequences that contexts are cut from; rows beyond are left out.

    Raises:
        ValueError: Numbers that make no sense.
    """

    def __init__(self, contexts: int = 8, window: int = 16, sequences: int = 64) -> None:
        if min(contexts, sequences) < 1 or window < 0:
            raise ValueError(f"TopContexts: contexts={contexts} and sequences={sequences} must be at least 1, window={window} at least 0.")
        self.contexts, self.window, self.sequences = contexts, window, sequences
        self._best = _Entries.empty()
        self._counts = torch.zeros(0, dtype=torch.int64)
        self._tokens = 0

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier evaluations."""
        self._best, self._counts, self._tokens = _Entries.empty(), torch.zeros(0, dtype=torch.int64), 0

    @torch.no_grad()
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Merge one batch."""
        coder = getattr(pl_module, "coder", None)
        if not isinstance(coder, NestedCoder):
            raise TypeError(f"{type(pl_module).__name__} has no coder; TopContexts works on TranscoderModule.")
        codes = coder.encode(batch["input"])
        new = _Entries(codes.latents.cpu(), codes.values.float().cpu(), batch["row"].to(codes.rows.device)[codes.rows].cpu())
        self._best = self._best.joined(new.where(new.values > 0)).strongest(self.contexts)
        counts = codes.counts().cpu()
        self._counts = counts if not len(self._counts) else self._counts + counts
        self._tokens += len(batch["input"])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the ranks and write."""
        parts = gather_objects((self._best.latents, self._best.values, self._best.rows))
        best = _Entries(*(torch.cat(column) for column in zip(*parts, strict=True))).strongest(self.contexts)
        total = sum_over_ranks(torch.cat([self._counts, torch.tensor([self._tokens])]).to(pl_module.device)).cpu()
        if not trainer.is_global_zero:
            return
        source = getattr(trainer, "datamodule", None)
        assert isinstance(source, ActivationSource)
        tokens = source.held_out_tokens(self.sequences, "test")
        tokenizer = getattr(getattr(source, "model", None), "tokenizer", None)
        content = {
            "tokens": int(total[-1]),
            "latents": [
                {"density": int(total[latent]) / max(1, int(total[-1])), "contexts": self._contexts(best, latent, tokens, tokenizer)}
                for latent in range(len(total) - 1)
            ],
        }
        write_json_atomic(Path(trainer.default_root_dir) / "latents.json", content)

    def _contexts(self, best: _Entries, latent: int, tokens: Tensor, tokenizer: Any) -> list[dict[str, Any]]:
        low, high = torch.searchsorted(best.latents, torch.tensor([latent, latent + 1])).tolist()
        found = []
        for value, row in zip(best.values[low:high].tolist(), best.rows[low:high].tolist(), strict=True):
            sequence, position = divmod(row, tokens.shape[1])
            if sequence >= len(tokens):
                continue
            first = max(0, position - self.window)
            ids = tokens[sequence, first : position + self.window + 1].tolist()
            context = {"value": value, "row": row, "tokens": ids, "at": position - first}
            found.append(context | ({"text": tokenizer.decode(ids)} if tokenizer is not None else {}))
        return found


class _Entries:
    """Activations of latents: (n,) latent, value and row of each."""

    def __init__(self, latents: Tensor, values: Tensor, rows: Tensor) -> None:
        self.latents, self.values, self.rows = latents, values, rows

    @staticmethod
    def empty() -> _Entries:
        return _Entries(torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, dtype=torch.int64))

    def where(self, chosen: Tensor) -> _Entries:
        return _Entries(self.latents[chosen], self.values[chosen], self.rows[chosen])

    def joined(self, other: _Entries) -> _Entries:
        pairs = zip((self.latents, self.values, self.rows), (other.latents, other.values, other.rows), strict=True)
        return _Entries(*(torch.cat(pair) for pair in pairs))

    def strongest(self, count: int) -> _Entries:
        """The ``count`` largest of every latent, by latent and then by falling value; equal values by row."""
        order = self.rows.argsort(stable=True)
        order = order[self.values[order].argsort(descending=True, stable=True)]
        order = order[self.latents[order].argsort(stable=True)]
        latents = self.latents[order]
        place = torch.arange(len(latents)) - torch.searchsorted(latents, latents)
        return self.where(order[place < count])
