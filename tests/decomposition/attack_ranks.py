"""Run as a script: the same attacks on 1, 2 and 4 gloo ranks; writes one JSON object of results by setting and number of ranks."""

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

from tiny_reconstruction import TinyNet

from theodolite.evaluation_rows import RowStore
from theodolite.reconstruction_attack import AttackSettings, attack_reconstruction

SETTINGS: dict[str, dict[str, Any]] = {
    "shared": {"attack_batch_size": 8, "legacy_ranks": 4, "micro_batch_size": 2},
    "per_position": {"attack_batch_size": 4, "mask_scope": "shared_across_batch_per_position"},
    # fewer rows than ranks: some have none of an attack batch
    "few_rows": {"attack_batch_size": 3, "micro_batch_size": 1},
    "unique": {"attack_batch_size": 8, "mask_scope": "unique_per_datapoint", "micro_batch_size": 1},
}
ROWS = 19


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
    Path(folder, f"{ranks}-{rank}.json").write_text(json.dumps(results(rank, ranks)))
    dist.destroy_process_group()


if __name__ == "__main__":
    for ranks in (1, 2, 4):
        # forked before anything was differentiated: one import for all
        start_processes(work, (ranks, sys.argv[1]), nprocs=ranks, start_method="fork")
