"""Straight-through training: gradients of the reconstruction flow through sampled tokens into the verbaliser.

Run it (CPU; the toy system, after its warm start)::

    theodolite fit --config configs/talkative/sft.yaml --config configs/talkative/gumbel.yaml --model.weights runs/sft/talkative

Forward, every token is an exact sample at the sampling temperature; backward, its one-hot has the gradient of a Gumbel-softmax at
temperature tau (arXiv 1611.01144). Texts have a fixed length: an end token would have no gradient to what it cuts off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from theodolite.distributed import gather_objects
from theodolite.functional.talkative_losses import gumbel_noise, straight_through_gumbel
from theodolite.protocols import ActivationRows
from theodolite.seeds import derive_seed

from ..decoding import forbid
from ..evaluation import add_sums
from .module import Sums, TalkativeModule
from .regularisers import Regularisers
from .verbaliser import soft_embeddings


class TalkativeGumbel(TalkativeModule):
    """The reconstruction loss, differentiated through the text; verbaliser and in-loop reconstructor learn together.

    Args:
        tau: Temperature of the relaxation at the start and at the end; it shapes the gradient only.
        tau_hold_steps: Steps at the first tau; after them it falls along a cosine to the second at the trainer's ``max_steps``.
        lm_kl: Weight of the KL to the plain language model.
        natural_prefix: The text that the language model continues.
        entropy: Weight of the entropy bonus.
        module_args: Everything else: see :class:`~theodolite.lightning_modules.talkative.module.TalkativeModule`.
    """

    def __init__(
        self,
        tau: tuple[float, float] = (5.0, 0.1),
        tau_hold_steps: int = 0,
        lm_kl: float = 0.0,
        natural_prefix: str = "",
        entropy: float = 0.0,
        **module_args: Any,
    ) -> None:
        super().__init__(**module_args)
        self.save_hyperparameters(ignore=["verbaliser", "reconstructor", "held_out"])
        if min(tau) <= 0:
            raise ValueError(f"model.tau is {list(tau)}; both temperatures of the relaxation must be above 0.")
        if not self.verbaliser_settings.fixed_length:
            raise ValueError("TalkativeGumbel writes texts of a fixed length; set model.verbaliser.fixed_length to true.")
        self.tau, self.tau_hold_steps = tau, tau_hold_steps
        self.regularisers = Regularisers(lm_kl, natural_prefix, entropy)

    def freeze_parts(self) -> None:
        """The in-loop reconstructor learns; a held-out one never does."""
        for name, reader in self.texts_to_vectors.items():
            if name != "reconstructor":
                reader.requires_grad_(False)

    def tau_now(self, step: int) -> float:
        """Temperature of the relaxation before optimizer step ``step`` + 1."""
        if self.trainer.max_steps < 1:
            raise ValueError("model.tau falls over the run; set trainer.max_steps.")
        progress = max(0, step - self.tau_hold_steps) / max(1, self.trainer.max_steps - self.tau_hold_steps)
        first, last = self.tau
        return last + (first - last) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    def accumulate(self, rows: ActivationRows) -> Sums:
        """Write one text per activation with its graph, read it, and differentiate."""
        activations = rows.activations.to(self.device)
        count = float(sum(gather_objects(len(rows.ids))))
        tau = self.tau_now(self.trainer.global_step)
        sums: list[Sums] = [{"tau": (tau, 1.0)}]
        with self.timed("gradients"):
            for part in self.microbatches(len(rows.ids)):
                noise = self.noise(rows.ids[part])
                loss, found = self.microbatch_loss(activations[part], noise, tau, count)
                self.backward_part(loss)
                sums.append(found)
        return add_sums(sums)

    def noise(self, ids: Sequence[str]) -> Tensor:
        """(B, T, V) Gumbel variates; each row's are named by (run seed, step, row)."""
        shape = (self.sampling.max_new_tokens, cast(Any, self.writer.lm).config.get_text_config().vocab_size)
        seeds = [derive_seed(self.run_seed, "gumbel", self.trainer.global_step, name) for name in ids]
        uniforms = np.stack([np.random.Generator(np.random.Philox(key=seed)).random(shape) for seed in seeds])
        return gumbel_noise(torch.from_numpy(uniforms)).float().to(self.device)

    def microbatch_loss(self, activations: Tensor, noise: Tensor, tau: float, count: float) -> tuple[Tensor, Sums]:
        """This microbatch's share of the mean loss over ``count`` rows of all ranks."""
        ids, one_hot, logits = self.write_softly(activations, noise, tau)
        lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
        errors = self.row_errors(self.in_loop(ids, lengths, one_hot), activations)
        mask = torch.ones(ids.shape, device=ids.device)
        extra, terms = self.regularisers(self, logits, activations, torch.arange(len(ids), device=ids.device), ids, mask)
        regular = (extra * mask).sum() / ids.shape[1] / count
        loss = errors.sum() / count + regular
        sums: Sums = {name: (float((value * mask).sum()), float(mask.sum())) for name, value in terms.items()}
        return loss, sums | {"reconstruction_loss": (float(errors.detach().sum()), float(len(ids))), "loss": (float(loss.detach()), 0.0)}

    def write_softly(self, activations: Tensor, noise: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
        """Sample texts and keep the graph.

        Args:
            activations: (B, d).
            noise: (B, T, V) Gumbel variates.
            tau: Temperature of the relaxation.

        Returns:
            (B, T) ids, their (B, T, V) straight-through one-hots, and the (B, T, V) logits at the sampling temperature.
        """
        lm, writer = cast(Any, self.writer.lm), self.writer
        prefix = writer.prefix(activations)
        cache, step_logits, attention, positions = prefix.cache, prefix.logits, prefix.attention, prefix.positions
        hots: list[Tensor] = []
        kept: list[Tensor] = []
        for step in range(noise.shape[1]):
            scaled = forbid(step_logits, writer.forbidden) / self.sampling.temperature
            kept.append(scaled)
            hots.append(straight_through_gumbel(scaled, noise[:, step], tau))
            if step + 1 == noise.shape[1]:
                break
            attention = torch.cat([attention, attention.new_ones(len(attention), 1)], dim=1)
            ids = hots[-1].detach().argmax(-1, keepdim=True)
            with soft_embeddings(lm.get_input_embeddings(), hots[-1][:, None], 0):
                outputs = lm(
                    input_ids=ids, attention_mask=attention, position_ids=positions[:, None], past_key_values=cache, use_cache=True
                )
            cache, step_logits, positions = outputs.past_key_values, outputs.logits[:, -1], positions + 1
        one_hot = torch.stack(hots, dim=1)
        return one_hot.detach().argmax(-1), one_hot, torch.stack(kept, dim=1)
