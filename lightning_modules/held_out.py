"""A held-out evaluation from its first batch to its numbers: sample, grade, count, compare with the policy that training began with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from theodolite.distributed import gather_objects, on_every_rank
from theodolite.out_of_memory import FittingParts
from theodolite.protocols import TokenSequence

from .decoding import Sampling
from .evaluation import add_sums, completion_row, outcome_sums, rates, write_completions
from .rollouts import Sample

if TYPE_CHECKING:
    from .policy_module import PolicyModule

Sums = dict[str, tuple[float, float]]


def drift_sums(log_probs: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> Sums:
    r"""(sum, count) over tokens of two estimates of the divergence from a reference, :math:`KL(\pi\,\|\,\pi_0)`, on samples of the policy.

    With :math:`r_t = \log \pi_0(y_t) - \log \pi(y_t)`: :math:`k_1 = -r_t` (unbiased, may be negative) and
    :math:`k_3 = e^{r_t} - 1 - r_t` (unbiased, never negative). Where ``top_p`` or ``top_k`` truncate what is sampled, both are means over
    the truncated samples and no longer unbiased.

    Args:
        log_probs: Of every sampled token, under the policy.
        reference: Under the reference, of the same shapes.
    """
    gaps = [b - a for own, other in zip(log_probs, reference, strict=True) for a, b in zip(own, other, strict=True)]
    return {
        "kl_k1": (-math.fsum(gaps), float(len(gaps))),
        "kl_k3": (math.fsum(math.expm1(gap) - gap for gap in gaps), float(len(gaps))),
    }


def final_protocol(settings: Mapping[str, float] | None, samples: int, sampling: Sampling) -> tuple[int, Sampling]:
    """How ``test`` samples: as validation does, with what ``model.test_sampling`` changes.

    Args:
        settings: ``samples``, ``temperature`` and ``top_p``, each only where it differs; None = nothing does.
        samples: Validation's completions per problem.
        sampling: Validation's sampling.

    Raises:
        ValueError: An unknown key, or a value that cannot be sampled with.
    """
    unknown = sorted(set(settings or {}) - {"samples", "temperature", "top_p"})
    if unknown:
        raise ValueError(f"model.test_sampling has the unknown key {unknown[0]!r}; choose among samples, temperature, top_p.")
    changed = dict(settings or {})
    n = changed.pop("samples", samples)
    if n != int(n) or n < 1:
        raise ValueError(f"model.test_sampling.samples is {n}; it must be a whole number of at least 1.")
    return int(n), replace(sampling, **changed)


class HeldOutEvaluation:
    """One evaluation over any number of loaders. Its numbers depend neither on the batches nor on the number of ranks.

    Args:
        module: Whose policy is evaluated.
    """

    def __init__(self, module: PolicyModule) -> None:
        self.module = module
        self._rows: dict[int, list[dict[str, Any]]] = {}
        self._sums: dict[int, list[Sums]] = {}
        self._graded: dict[int, int] = {}

    def step(self, batch: Sequence[Any], loader: int, n: int, sampling: Sampling, drift: bool) -> None:
        """Sample ``n`` completions of every problem and grade them; ``batch`` may be empty on a rank that has run out of rows."""
        module = self.module
        prompts, groups = module.sample(batch, n, sampling, "evaluation")
        problems = [row for row in batch for _ in range(n)]
        samples = [sample for group in groups for sample in group]
        texts = [module.decode(sample.ids) for sample in samples]
        grades = on_every_rank(lambda: module.environment.grade(problems, texts))
        sums = outcome_sums(grades, [sample.finish for sample in samples])
        if drift:
            sums = sums | self._drift([prompts[i // n] for i in range(len(samples))], samples, sampling.temperature)
        self._sums.setdefault(loader, []).append(sums)
        first_slot = self._graded.get(loader, 0)
        self._graded[loader] = first_slot + sum(gather_objects(len(batch)))
        for i, (row, text, sample, grade) in enumerate(zip(problems, texts, samples, grades, strict=True)):
            slot = first_slot + module.slot(i // n)
            prompt = module.render_prompt(row.prompt)
            found = completion_row(row.id, slot, i % n, prompt, text, sample.finish, len(sample.ids), grade)
            self._rows.setdefault(loader, []).append(found)

    @torch.no_grad()
    def _drift(self, prompts: Sequence[tuple[int, ...]], samples: Sequence[Sample], temperature: float) -> Sums:
        module = self.module
        sequences = [TokenSequence(prompt, sample.ids) for prompt, sample in zip(prompts, samples, strict=True)]
        reference = self._scored(sequences, lambda part: module.base_log_probs(part, temperature))
        own: Sequence[Sequence[float]] = [sample.log_probs for sample in samples]
        if module.engine.own_numerics:  # its numbers are of other kernels, and under top_p or top_k those of the kept tokens alone
            own = self._scored(sequences, lambda part: module._log_probs(module.causal_lm, part, temperature)[0])
        return drift_sums(own, reference)

    def _scored(self, sequences: Sequence[TokenSequence], score: Callable[[Sequence[TokenSequence]], Tensor]) -> list[list[float]]:
        def rows(part: slice) -> list[list[float]]:
            padded = score(sequences[part]).double().cpu().tolist()
            return [row[: len(sequence.completion_ids)] for row, sequence in zip(padded, sequences[part], strict=True)]

        parts = FittingParts(self.module.micro_batch_size or max(1, len(sequences)))
        return [row for found in parts.map(rows, len(sequences)) for row in found]

    def report(self, stage: str, names: Sequence[str] | None) -> None:
        """Log rates over all ranks and write the completions; all ranks call it.

        Args:
            stage: ``val`` or ``test``.
            names: Of the loaders, in order; None = their numbers.
        """
        trainer = self.module.trainer
        loaders = sorted(set().union(*gather_objects(set(self._sums))))
        for loader in loaders:
            sums = add_sums([part for parts in gather_objects(self._sums.get(loader, [])) for part in parts])
            rows = [row for part in gather_objects(self._rows.get(loader, [])) for row in part]
            name = names[loader] if names else str(loader)
            prefix = stage if stage == "val" and len(loaders) == 1 else f"{stage}/{name}"
            if trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf"):
                continue  # a part of the data: numbers of it would be taken for the whole
            self._log({f"{prefix}/{key}": value for key, value in rates(sums).items()})
            if self.module.global_rank == 0:
                path = Path(trainer.default_root_dir) / "rollouts" / f"step_{trainer.global_step:06d}_{stage}_{name}.parquet"
                write_completions(rows, path)

    def _log(self, metrics: dict[str, float]) -> None:
        module, trainer = self.module, self.module.trainer
        step = trainer.global_step // module.updates_per_window
        if trainer.state.fn != TrainerFn.FITTING:
            module.log_dict(metrics | {"step": float(step)}, rank_zero_only=False, sync_dist=False)
            return
        for logger in trainer.loggers:  # straight to the loggers: a metric called "step" would rename the checkpoints of the fit
            logger.log_metrics(metrics, step=step)
        if not trainer.sanity_checking:
            module.log_dict(metrics, logger=False, rank_zero_only=False, sync_dist=False)
