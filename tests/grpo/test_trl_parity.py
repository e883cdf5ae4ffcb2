"""Losses and gradients of TRL 1.16 on the same tensors: ``make test-peers`` (TRL lives in an environment of its own)."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from theodolite.functional.importance import sequence_log_ratio
from theodolite.functional.policy_loss import WindowTotals, cispo_surrogate, clipped_surrogate, kl_penalty, log_ratio, token_weights

pytestmark = pytest.mark.peers

LENGTHS, WIDTH = [3, 7, 1, 5, 8, 2], 8
MASK = torch.tensor([[float(t < n) for t in range(WIDTH)] for n in LENGTHS], dtype=torch.float64)
BETA = 0.3


def noise(seed: int) -> Tensor:
    return torch.randn(len(LENGTHS), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


OLD, ADVANTAGES = noise(0) - 2, noise(1)[:, 0]
REFERENCE = OLD + 0.3 * noise(2)


def policy() -> Tensor:
    """Log-probabilities off policy enough that every clip acts."""
    return (OLD + 0.3 * noise(3)).requires_grad_()


class Accelerator:
    """One process."""

    num_processes = 1

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.flatten()


def theirs(log_probs: Tensor, loss_type: str, level: str = "token", beta: float = 0.0, epsilon_high: float = 0.2) -> Tensor:
    """TRL's own ``_compute_loss``, called on tensors instead of a model."""
    trainer: Any = pytest.importorskip("trl").GRPOTrainer
    args = {"delta": None, "use_bias_correction_kl": True, "steps_per_generation": 1}
    fields: dict[str, Any] = {
        "_get_per_token_logps_and_entropies": lambda *a, **k: (log_probs, torch.zeros_like(log_probs), None),
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": level,
        "beta": beta,
        "loss_type": loss_type,
        "epsilon_low": 0.2,
        "epsilon_high": epsilon_high,
        "use_vllm": False,
        "max_completion_length": WIDTH,
        "model": SimpleNamespace(training=True),
        "current_gradient_accumulation_steps": 1,
        "accelerator": Accelerator(),
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "args": SimpleNamespace(**args),
    }
    ids = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.long)
    inputs = {"prompt_ids": ids, "prompt_mask": torch.ones_like(ids), "completion_ids": ids, "completion_mask": MASK}
    inputs |= {"advantages": ADVANTAGES, "old_per_token_logps": OLD, "ref_per_token_logps": REFERENCE, "num_items_in_batch": MASK.sum()}
    return trainer._compute_loss(SimpleNamespace(**fields), None, inputs)


def ours(log_probs: Tensor, aggregation: str, surrogate: str = "clip", level: str = "token", beta: float = 0.0) -> Tensor:
    difference = log_ratio(log_probs, OLD, MASK)
    ratio = (sequence_log_ratio(difference, MASK) if level == "sequence" else difference).exp()
    advantages = ADVANTAGES[:, None]
    if surrogate == "cispo":
        token_loss = cispo_surrogate(log_probs, ratio, advantages, ratio_cap=1.1)
    else:
        token_loss = clipped_surrogate(ratio, advantages)
    if beta:
        token_loss = token_loss + beta * kl_penalty(log_probs, REFERENCE, ratio, MASK, "k3_is")
    totals = WindowTotals(sum(LENGTHS), len(LENGTHS), len(LENGTHS), WIDTH)
    return (token_weights(MASK, aggregation, totals) * token_loss).sum()  # pyright: ignore[reportArgumentType]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dapo": ({"aggregation": "dapo"}, {"loss_type": "dapo"}),
    "dr_grpo": ({"aggregation": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    "grpo": ({"aggregation": "grpo"}, {"loss_type": "grpo"}),
    "gspo": ({"aggregation": "grpo", "level": "sequence"}, {"loss_type": "grpo", "level": "sequence"}),
    "cispo": ({"aggregation": "dapo", "surrogate": "cispo"}, {"loss_type": "cispo", "epsilon_high": 1.1}),
    "k3_is": ({"aggregation": "dapo", "beta": BETA}, {"loss_type": "dapo", "beta": BETA}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_trl_s(case: str) -> None:
    mine, peer = CASES[case]
    found = []
    for function, arguments in ((ours, mine), (theirs, peer)):
        log_probs = policy()
        loss = function(log_probs, **arguments)
        (gradient,) = torch.autograd.grad(loss, log_probs)
        found.append((float(loss.detach()), gradient * MASK))
    (our_loss, our_gradient), (their_loss, their_gradient) = found
    assert our_loss == pytest.approx(their_loss, rel=1e-6, abs=1e-9)
    assert float((our_gradient - their_gradient).norm() / their_gradient.norm()) < 1e-6
