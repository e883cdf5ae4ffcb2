"""Two ranks have one rank's gradient under every aggregation, and where memory runs out on one of them alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_fits import PlainDescent
from test_two_ranks import command, difference, log_of, rows_of, two_ranks, written

from theodolite.cli import main

AGGREGATIONS = ("dr_grpo", "grpo", "seq_mean_token_sum")


class CrampedOnOneRank(PlainDescent):
    """Rank 1 has memory for two rows at once."""

    def microbatch_loss(self, window: Any, indices: Any, *arguments: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss, sums = super().microbatch_loss(window, indices, *arguments)
        if len(indices) > 2 and self.global_rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return loss, sums


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_learn_what_one_does_under_every_aggregation_and_when_memory_runs_out_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain: dict[str, dict[str, Any]] = {name: {"aggregation": name, "beta": 0.1} for name in AGGREGATIONS} | {"cramped": {}}
    two = {name: written(tmp_path, name, "nan", **model) for name, model in plain.items()}
    cramped = Path(two["cramped"])
    cramped.write_text(cramped.read_text().replace("grpo_fits.PlainDescent", "test_two_ranks_objectives.CrampedOnOneRank"))
    assert two_ranks(tmp_path, [command(tmp_path, file) for file in two.values()]) == [0, 0], log_of(tmp_path, 0)[-3000:]
    assert "microbatches are halved" in log_of(tmp_path, 1)
    assert "microbatches are halved" not in log_of(tmp_path, 0)
    for name, model in plain.items():
        main(command(tmp_path, written(tmp_path, f"{name}-one", "nan", **model)))
        assert difference(tmp_path, name, f"{name}-one") < 1e-6, name
        for a, b in zip(rows_of(tmp_path, name), rows_of(tmp_path, f"{name}-one"), strict=True):
            assert a == {k: pytest.approx(v, rel=1e-5, abs=1e-6, nan_ok=True) if isinstance(v, float) else v for k, v in b.items()}, name
