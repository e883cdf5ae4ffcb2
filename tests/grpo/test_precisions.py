"""What a precision plugin changes around a window: its default dtype reaches no number, and autocast neither sampler nor self-check."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_fits import TINY, PlainDescent, fit
from tiny_policies import ragged, tiny_model

from theodolite.lightning_modules.grpo.self_check import TOLERANCES, tolerance_of
from theodolite.lightning_modules.merged_adapter import check_merging
from theodolite.lightning_modules.rollouts import HFRollout
from theodolite.lightning_modules.split_prefix import SplitPrefix, take_apart
from theodolite.protocols import Reward, Window


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As a plugin such as ``bf16-true`` sets it around every training step."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def at_rest(**settings: Any) -> PlainDescent:
    module = PlainDescent(**(TINY | settings))
    stub: Any = SimpleNamespace(max_steps=1000, world_size=1, global_rank=0)
    module._trainer = stub
    return module


def split_scores() -> tuple[torch.Tensor, torch.Tensor]:
    sequences = ragged([(9, 4), (9, 12), (3, 7)])
    backbone = take_apart(tiny_model("qwen3"))
    assert backbone is not None
    prefix = SplitPrefix(backbone, list(dict.fromkeys(s.prompt_ids for s in sequences)), 0, torch.device("cpu"))
    log_probs, _, mask = prefix.score(sequences)
    return log_probs.detach(), mask


def advantages() -> torch.Tensor:
    parts = [{"exact": float(i % 2), "short": float(i % 3)} for i in range(8)]
    rewards = [Reward(0.0, True, True, own) for own in parts]
    module = at_rest(reward_weights={"exact": 1.0, "short": 0.1}, reward_mix="gdpo")
    return module.window_advantages(Window(0, [], [], rewards, 4, torch.zeros(8, dtype=torch.float64)))


def test_a_coarse_default_dtype_reaches_neither_masks_nor_advantages_nor_the_learning_rate() -> None:
    plain, expected = split_scores(), advantages()
    rates = [at_rest(schedule="cosine")._lr_factor(step) for step in range(0, 1000, 37)]
    assert rates == pytest.approx([(1 + math.cos(math.pi * step / 1000)) / 2 for step in range(0, 1000, 37)], abs=1e-6)
    with default_dtype(torch.bfloat16):
        found, (log_probs, mask) = advantages(), split_scores()
        assert [at_rest(schedule="cosine")._lr_factor(step) for step in range(0, 1000, 37)] == rates
    assert torch.equal(found, expected)
    assert mask.dtype == torch.float32
    assert torch.equal(mask, plain[1])
    torch.testing.assert_close(log_probs, plain[0])


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_folding_adapters_is_refused_where_the_trainer_computes_in_less_than_float32(precision: str) -> None:
    with pytest.raises(ValueError, match=f"rounds the merged weights under trainer.precision={precision}"):
        check_merging(HFRollout(merge_adapter=True), precision)
    check_merging(HFRollout(), precision)
    for exact in ("32-true", "64-true"):
        check_merging(HFRollout(merge_adapter=True), exact)


def test_a_fit_that_would_fold_under_autocast_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use 32-true, or set merge_adapter to false"):
        fit(tmp_path, precision="bf16-mixed", merge_adapter=True, lora={"r": 2})


def test_self_check_allows_what_the_coarser_of_parameters_and_autocast_rounds() -> None:
    def tolerance(dtype: torch.dtype, plugin: Precision) -> float:
        model = torch.nn.Linear(2, 2).to(dtype)
        trainer = SimpleNamespace(precision_plugin=plugin)
        return tolerance_of(SimpleNamespace(causal_lm=model, device=torch.device("cpu"), trainer=trainer))

    assert tolerance(torch.float32, Precision()) == TOLERANCES[torch.float32]
    assert tolerance(torch.float32, MixedPrecision("bf16-mixed", "cpu")) == TOLERANCES[torch.bfloat16]
    assert tolerance(torch.bfloat16, Precision()) == TOLERANCES[torch.bfloat16]


def test_a_right_path_passes_its_self_check_under_autocast(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, precision="bf16-mixed", split_backward=True)
    assert module._checked
    assert module.backbone is not None
