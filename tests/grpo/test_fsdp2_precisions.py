"""Layers computed once more and lower precisions, in shards over two gloo ranks, against two ranks with whole weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_fsdp2 import LORA, SHARDS
from test_two_ranks import command, difference, log_of, rows_of, two_ranks
from tiny_policies import callback, config, grpo

AGAIN: dict[str, Any] = {"gradient_checkpointing": True, "micro_batch_size": 4}
COARSE_BASE: dict[str, Any] = {"dtype": "bfloat16", "lora": LORA}
"""In one microbatch per rank: sums in another order differ by 1e-8, which a base in bfloat16 turns into other samples two windows later."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "again": ("32-true", AGAIN | {"lora": LORA, "beta": 0.1, "updates_per_window": 2}),
    "autocast": ("bf16-mixed", {"shared_prefix": False}),
    "autocast_again": ("bf16-mixed", AGAIN),
    "autocast_split": ("bf16-mixed", {"lora": LORA, "split_backward": True}),
    "coarse_base_again": ("32-true", COARSE_BASE | {"gradient_checkpointing": True}),
    "coarse_base_split": ("32-true", COARSE_BASE | {"split_backward": True}),
}
STILL: dict[str, tuple[str, dict[str, Any]]] = {"autocast": ("bf16-mixed", {}), "coarse_base_again": ("32-true", COARSE_BASE)}
"""Runs that learn nothing: how far the others have come is seen beside them."""


def written(folder: Path, name: str, precision: str, grader: str = "one_sided", **model: Any) -> list[str]:
    witness = callback("tiny_policies.Witness", folder=str(folder / f"witness-{name}"))
    own = grpo(lr=0.3, export=False, max_grad_norm=0.3, table_every=0, **model) | {"class_path": "grpo_fits.PlainDescent"}
    data = {"class_path": "test_two_ranks.OddPrompts", "grader": grader}
    limits = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 0, "enable_checkpointing": False, "precision": precision}
    return command(folder, config(folder, name, own, data, callbacks=[witness], **limits))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_in_shards_recomputed_layers_and_lower_precisions_learn_what_they_do_with_whole_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = [written(tmp_path, name, precision, **model) for name, (precision, model) in CASES.items()]
    assert two_ranks(tmp_path, shards, limit_s=500.0, strategy=SHARDS) == [0, 0], log_of(tmp_path, 0)[-2000:] + log_of(tmp_path, 1)[-2000:]
    whole = [written(tmp_path, f"{name}-whole", precision, **model) for name, (precision, model) in CASES.items()]
    whole += [written(tmp_path, f"{name}-still", precision, "all_nan", **model) for name, (precision, model) in STILL.items()]
    assert two_ranks(tmp_path, whole, limit_s=500.0) == [0, 0], log_of(tmp_path, 0)[-2000:] + log_of(tmp_path, 1)[-2000:]
    for name in CASES:
        ranks = [load_file(tmp_path / f"witness-{name}" / f"weights-{rank}.safetensors") for rank in range(2)]
        assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
        print(f"{name}: largest weight difference, over the largest weight, {difference(tmp_path, name, f'{name}-whole'):.1e}")
        assert difference(tmp_path, name, f"{name}-whole") < 1e-6, name
        for a, b in zip(rows_of(tmp_path, name), rows_of(tmp_path, f"{name}-whole"), strict=True):
            assert a == {k: pytest.approx(v, rel=1e-4, abs=2e-6, nan_ok=True) if isinstance(v, float) else v for k, v in b.items()}, name
    for name in STILL:
        assert difference(tmp_path, name, f"{name}-still") > 1e-3, "a run that learns nothing would agree with anything"


def test_loss_scaling_in_shards_is_refused_before_anything_is_built() -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with pytest.raises(ValueError, match=r"ModelParallelStrategy.* does not support .*16-mixed"):
        Trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(), precision="16-mixed", **quiet)
