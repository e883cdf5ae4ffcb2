"""Every loss, gradient and measure is the same on 1, 2 and 4 ranks and for every microbatch; evaluation leaves no trace."""

from __future__ import annotations

import copy
import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from tiny_decomposition import MEASURES, numbers, tiny, tokens  # noqa: E402
from warm_processes import finish, start  # noqa: E402

from theodolite.lightning_modules.decomposition.evaluation import Evaluation, build_measures  # noqa: E402


@lru_cache
def alone(dtype: torch.dtype, sampling: str = "continuous") -> dict[str, Any]:
    return numbers(0, 1, None, dtype, sampling)


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for part in ("losses", "measures"):
        assert found[part] == pytest.approx(expected[part], rel=tolerance, abs=tolerance * 1e-2, nan_ok=True), part
    for name, gradient in expected["gradients"].items():
        reference = torch.tensor(gradient, dtype=torch.float64)
        difference = (torch.tensor(found["gradients"][name], dtype=torch.float64) - reference).abs().max()
        assert difference <= tolerance * max(1e-3, reference.abs().max()), name


@pytest.mark.parametrize("micro", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_microbatches_change_nothing(micro: int) -> None:
    assert_same(numbers(0, 1, micro, torch.float64), alone(torch.float64), 1e-9)


@pytest.mark.slow
def test_microbatches_change_nothing_under_binomial_sampling_and_in_float32() -> None:
    assert_same(numbers(0, 1, 2, torch.float64, "binomial"), alone(torch.float64, "binomial"), 1e-9)
    assert_same(numbers(0, 1, 2, torch.float32), alone(torch.float32), 1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_change_nothing(ranks: int, tmp_path: Path) -> None:
    script, logs = str(HERE / "tiny_decomposition.py"), [tmp_path / f"rank-{rank}.txt" for rank in range(ranks)]
    codes = finish([start([script, str(tmp_path), str(rank), str(ranks)], log) for rank, log in enumerate(logs)])
    assert codes == [0] * ranks, logs[-1].read_text()[-3000:]
    for name, dtype, tolerance in (
        ("float64", torch.float64, 1e-9),
        ("float64-micro", torch.float64, 1e-9),
        ("float32", torch.float32, 1e-5),
    ):
        found = json.loads((tmp_path / f"{ranks}-{name}.json").read_text())
        assert_same(found, json.loads(json.dumps(alone(dtype))), tolerance)


def test_training_and_evaluation_log_the_same_importance_minimality() -> None:
    found = alone(torch.float64)
    parts = tiny(torch.float64)
    evaluation = Evaluation(parts, build_measures([{"name": "importance_minimality", "pnorm": 0.9, "beta": 0.5,
                                                    "p_anneal_final_p": 0.4, "p_anneal_start_frac": 0.0}]), 0, 0.3, None)  # fmt: skip
    with torch.no_grad():
        evaluation.add(tokens(), 0, 0, 1)
        measured = evaluation.compute(None)
    assert measured["loss/importance_minimality"] == pytest.approx(found["losses"]["importance_minimality"], rel=1e-12)


def test_evaluation_leaves_no_trace() -> None:
    parts = tiny(torch.float32).train()
    before, random_state = copy.deepcopy(parts.state_dict()), torch.get_rng_state()
    modes = [module.training for module in parts.modules()]
    evaluation = Evaluation(parts, build_measures(MEASURES), 0, 0.5, 4)
    with torch.inference_mode(False), torch.no_grad():
        evaluation.add(tokens(), 0, 0, 1)
        first = evaluation.compute(None)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in parts.parameters())
    assert [module.training for module in parts.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in parts.state_dict().items())
    again = Evaluation(parts, build_measures(MEASURES), 0, 0.5, 4)
    with torch.no_grad():
        again.add(tokens(), 0, 0, 1)
        assert again.compute(None) == pytest.approx(first, rel=0, abs=0, nan_ok=True)
