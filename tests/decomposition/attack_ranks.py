"""Run as a script: the same attacks on several numbers of gloo ranks; every rank writes one JSON object of results by setting."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_decomposition import tiny, tokens
from tiny_reconstruction import TinyNet

from theodolite.distributed import sum_over_ranks
from theodolite.evaluation_rows import RowStore
from theodolite.lightning_modules.decomposition.persistent_pgd import PersistentPGDRecon
from theodolite.lightning_modules.decomposition.step import StepBatch, microbatches, step_gradients
from theodolite.reconstruction_attack import AttackSettings, attack_reconstruction

SETTINGS: dict[str, dict[str, Any]] = {
    "shared": {"attack_batch_size": 8, "legacy_ranks": 4, "micro_batch_size": 2},
    "per_position": {"attack_batch_size": 4, "mask_scope": "shared_across_batch_per_position"},
    # fewer rows than ranks: some have none of an attack batch
    "few_rows": {"attack_batch_size": 3, "micro_batch_size": 1},
    "unique": {"attack_batch_size": 8, "mask_scope": "unique_per_datapoint", "micro_batch_size": 1},
}
ROWS = 19
PERSISTENT: dict[str, dict[str, Any]] = {
    "repeat": {"source_scope": "repeat_across_batch", "n_sources": 4, "warmup_steps": 1},
    "each": {"source_scope": "per_batch_per_position", "scope": "subset", "warmup_steps": 1},
    "single": {"ascent": "sign", "logits": True},
}


def persistent(rank: int, ranks: int) -> dict[str, dict[str, float]]:
    """Losses of four steps and a digest of the sources they lead to."""
    found: dict[str, dict[str, float]] = {}
    for name, settings in PERSISTENT.items():
        parts, objective = tiny(torch.float64), PersistentPGDRecon(coeff=0.5, lr=0.05, **settings)
        objective.plan(4)
        values: dict[str, float] = {}
        for step in range(4):
            own = microbatches(tokens()[rank::ranks], rank, ranks, 3)
            shares = step_gradients(
                parts, [objective], StepBatch(own, len(tokens()), (0, "train", step), step, step / 4), torch.Tensor.backward
            )
            values[f"loss {step}"] = float(sum_over_ranks(shares["total"].clone()))
        sources = objective.state_dict()["tensors"]["values"]
        for site, tensor in sources.items():
            weights = torch.arange(tensor.numel(), dtype=torch.float64).cos()
            values[f"digest of {site}"] = float((tensor.flatten() * weights).sum())
        found[f"float64/persistent {name}"] = values
    return found


def results(rank: int, ranks: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for dtype in ("float64", "float32"):
        net = TinyNet(kind="kl", dtype=dtype)
        drawn = torch.randn(ROWS, 3, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        data = drawn.to(torch.float64 if dtype == "float64" else torch.float32)[rank::ranks]
        for name, settings in SETTINGS.items():
            attack = AttackSettings(n_steps=(0, 1, 5, 20) if dtype == "float64" else (0, 1, 5), **settings)
            store = RowStore(rank, ranks)
            for batch in data.split(5):
                store.add(batch, len(batch))
            outcomes, left_out = attack_reconstruction(net, store, attack)
            rows = [outcome.row(label, n, attack) for label, outcome in outcomes.items() for n in attack.n_steps]
            found[f"{dtype}/{name}"] = {f"{row['attack']}/{row['n_steps']}": row["loss"] for row in rows}
            found[f"{dtype}/{name}"]["left_out"] = left_out
    return found


def work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/group-{ranks}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    Path(folder, f"{ranks}-{rank}.json").write_text(json.dumps(results(rank, ranks) | persistent(rank, ranks)))
    dist.destroy_process_group()


if __name__ == "__main__":
    for ranks in map(int, sys.argv[2:]):
        # forked before anything was differentiated: one import for all
        start_processes(work, (ranks, sys.argv[1]), nprocs=ranks, start_method="fork")
