"""Adversarial evaluation and decomposition training beside SPD's own (goodfire-ai/spd), on the same weights and batches.

    make bench-pgd [JSON=FILE] [SPD=checkout]
    python benchmarks/pgd.py --spd-root checkout --json result.json

Needs SPD's dependencies and Python >= 3.12 (``make`` sets that up). One process, one thread: SPD and we take turns, after one warm-up each;
a case is the median of ``--repeats`` CPU times, ``ratio`` is SPD's over ours. Losses of both are compared before anything is timed.
Memory is the rise of a process of its own over its size before the attack: the same attack batch for SPD, and for us 64 rows against 8,
both in microbatches of 8.

Aims: PGD evaluation 1.5, memory of 64 rows at most 1.25 times that of 8 (a ``ratio`` of at least 0.8), training steps 1.3.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from theodolite.evaluation_rows import RowStore
from theodolite.functional.pgd import MaskScope
from theodolite.reconstruction_attack import AttackSettings, attack_reconstruction

sys.path.insert(0, str(Path(__file__).resolve().parent))

from spd_peer import OurTraining, Pair, PeerTraining, llama, tms

ROWS, POSITIONS = 8, 64
CURVE = (1, 5, 20)


def our_attack(pair: Pair, scope: MaskScope, steps: tuple[int, ...], micro: int | None = None) -> dict[int, float]:
    """Losses by number of steps, from one attack; target output and causal importances included."""
    store = RowStore()
    store.add(pair.batch, len(pair.batch))
    settings = AttackSettings(steps, 0.1, "zeroes", scope, len(pair.batch), micro)
    outcomes, _ = attack_reconstruction(pair.ours, store, settings)
    ((label, outcome),) = outcomes.items()
    return {n: outcome.row(label, n, settings)["loss"] for n in steps}


def peer_attack(pair: Pair, scope: str, steps: tuple[int, ...]) -> dict[int, float]:
    """The same with SPD: one attack per number of steps, as its evaluation runs several configurations."""
    from spd.configs import PGDReconLossConfig  # pyright: ignore[reportMissingImports]
    from spd.metrics import PGDReconLoss  # pyright: ignore[reportMissingImports]

    losses = {}
    with torch.no_grad():
        deltas = pair.peer.calc_weight_deltas()
        found = pair.peer(pair.batch, cache_type="input")
        ci = pair.peer.calc_causal_importances(pre_weight_acts=found.cache, sampling="continuous")
        for n in steps:
            config = PGDReconLossConfig(init="zeroes", step_size=0.1, n_steps=n, mask_scope=scope)
            metric = PGDReconLoss(model=pair.peer, device="cpu", output_loss_type=pair.kind, pgd_config=config, use_delta_component=True)
            metric.update(batch=pair.batch, target_out=found.output, ci=ci, weight_deltas=deltas)
            losses[n] = float(metric.compute())
    return losses


def alternate(case: str, ours: Callable[[], Any], peer: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Median CPU seconds of both, taken in turn."""
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(repeats + 1):
        for name, run in (("peer", peer), ("ours", ours)):
            start = time.process_time()
            run()
            if turn:  # the first is the warm-up
                seconds[name].append(time.process_time() - start)
    ours_s, peer_s = statistics.median(seconds["ours"]), statistics.median(seconds["peer"])
    spread = [round(p / o, 3) for p, o in zip(seconds["peer"], seconds["ours"], strict=True)]
    row = {"case": case, "ours": ours_s, "peer": peer_s, "ratio": peer_s / ours_s, "unit": "CPU s", "n": repeats}
    print(
        f"{case:58s} SPD {peer_s:8.3f} s, ours {ours_s:8.3f} s, ratio {row['ratio']:.2f} (turns {min(spread)} to {max(spread)})", flush=True
    )
    return row


def check_losses(pair: Pair, scope: MaskScope, steps: tuple[int, ...]) -> None:
    """Stop if the two do not compute the same."""
    ours, peer = our_attack(pair, scope, steps), peer_attack(pair, scope, steps)
    for n in steps:
        # signs near zero may differ with the order of summation: first in single rows, and after some steps in sums over rows
        if abs(ours[n] - peer[n]) > (1e-5 if n <= 1 else 1e-4 if n <= 5 else 2e-3) * peer[n]:
            raise SystemExit(f"{scope}, {n} steps: SPD finds {peer[n]} and we {ours[n]}, so there is nothing to compare.")
    print(f"{scope}: " + ", ".join(f"n={n} SPD {peer[n]:.6f} ours {ours[n]:.6f}" for n in steps), flush=True)


def evaluation_cases(repeats: int) -> list[dict[str, Any]]:
    """PGD evaluations on LlamaSimpleMLP-2L shapes."""
    pair, rows = llama(ROWS, POSITIONS), []
    scopes: tuple[MaskScope, ...] = ("shared_across_batch", "unique_per_datapoint")
    for scope in scopes:
        check_losses(pair, scope, CURVE)
        cases = [("20 steps", CURVE[-1:]), (f"curve of {', '.join(map(str, CURVE))} steps", CURVE)]
        for name, steps in cases if scope == "shared_across_batch" else cases[:1]:
            ours, peer = partial(our_attack, pair, scope, steps), partial(peer_attack, pair, scope, steps)
            rows.append(alternate(f"PGD evaluation, {scope}, {name}", ours, peer, repeats))
    return rows


def training_cases(repeats: int) -> list[dict[str, Any]]:
    """Training steps with the losses of SPD's own configurations."""
    from spd import configs  # pyright: ignore[reportMissingImports]

    minimality = {"classname": "ImportanceMinimalityLoss", "pnorm": 2.0, "beta": 0}
    toy = [
        minimality | {"coeff": 1e-4},
        {"classname": "StochasticReconLayerwiseLoss", "coeff": 1.0},
        {"classname": "StochasticReconLoss", "coeff": 1.0},
    ]
    our_toy: list[dict[str, Any]] = [
        {"name": "importance_minimality", "coeff": 1e-4, "pnorm": 2.0},
        {"name": "stochastic_recon", "scope": "layerwise", "coeff": 1.0},
        {"name": "stochastic_recon", "coeff": 1.0},
    ]
    subset = {"routing": {"type": "uniform_k_subset"}, "coeff": 0.5}
    schedule = {"start_val": 0.1, "warmup_pct": 0.0, "final_val_frac": 1.0, "fn_type": "constant"}
    adam = {"type": "adam", "lr_schedule": schedule, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    text = [
        minimality | {"coeff": 1e-3},
        {"classname": "StochasticReconSubsetLoss"} | subset,
        {"classname": "PersistentPGDReconSubsetLoss", "optimizer": adam, "scope": {"type": "repeat_across_batch", "n_sources": 8}} | subset,
        {"classname": "FaithfulnessLoss", "coeff": 1e6},
    ]
    our_text: list[dict[str, Any]] = [
        {"name": "importance_minimality", "coeff": 1e-3, "pnorm": 2.0},
        {"name": "stochastic_recon", "scope": "subset", "coeff": 0.5},
        {"name": "persistent_pgd_recon", "scope": "subset", "coeff": 0.5, "source_scope": "repeat_across_batch", "n_sources": 8, "lr": 0.1},
        {"name": "faithfulness", "coeff": 1e6},
    ]
    rows = []
    for case, pair, peer, ours in (
        ("training step, TMS 40-10, 4096 rows", tms(4096), toy, our_toy),
        (f"training step, LlamaSimpleMLP-2L, {ROWS} x {POSITIONS} tokens", llama(ROWS, POSITIONS), text, our_text),
    ):
        peer_losses = [getattr(configs, f"{spec['classname']}Config")(**spec) for spec in peer]
        rows.append(alternate(case, OurTraining(pair, ours).step, PeerTraining(pair, peer_losses).step, repeats))
    return rows


def peak_rise(who: str, rows: int) -> float:
    """MiB that one attack of 2 steps adds to a process of its own; called in that process."""
    pair = llama(rows, POSITIONS)
    with torch.no_grad():
        pair.ours.prepare(pair.batch[:1])
    before = _resident()
    if who == "ours":
        our_attack(pair, "shared_across_batch", (2,), micro=8)
    else:
        peer_attack(pair, "shared_across_batch", (2,))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def memory_cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of attacks, each measured in processes of its own."""

    def measured(who: str, rows: int) -> float:
        command = [sys.executable, __file__, "--spd-root", str(options.spd_root), "--memory", who, str(rows)]
        found = [
            float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout) for _ in range(options.repeats)
        ]
        return statistics.median(found)

    # nothing is timed here, so processes may run beside one another
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        small, large, peer = pool.map(lambda case: measured(*case), [("ours", 8), ("ours", 64), ("peer", 64)])
    cases = [
        {"case": "memory of an attack on 64 rows against 8 of ours", "ours": large, "peer": small, "ratio": small / large},
        {"case": "memory of an attack on 64 rows against SPD's", "ours": large, "peer": peer, "ratio": peer / large},
    ]
    for case in cases:
        case |= {"unit": "MiB", "n": options.repeats}
        print(f"{case['case']:58s} {case['peer']:.0f} MiB, ours {case['ours']:.0f} MiB, ratio {case['ratio']:.2f}", flush=True)
    return cases


def main() -> None:
    """Measure every case and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--spd-root", type=Path, required=True, help="checkout of goodfire-ai/spd")
    parser.add_argument("--repeats", type=int, default=5, help="turns per case, at least 5")
    parser.add_argument("--only", choices=["evaluation", "training", "memory"], help="one kind of case")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--memory", nargs=2, metavar=("WHO", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(options.spd_root))
    torch.set_num_threads(1)
    if options.memory:
        print(peak_rise(options.memory[0], int(options.memory[1])))
        return
    if options.repeats < 5:
        parser.error("--repeats must be at least 5.")
    results: list[dict[str, Any]] = []
    kinds = {"evaluation": lambda: evaluation_cases(options.repeats), "training": lambda: training_cases(options.repeats)}
    kinds["memory"] = lambda: memory_cases(options)
    for kind, measure in kinds.items():
        if options.only in (None, kind):
            results += measure()
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
