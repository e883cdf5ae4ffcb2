"""Do decompositions of toy models recover the known ground truth, over seeds, and how long does it take?

``make bench-recovery`` or::

    python benchmarks/decomposition_recovery.py --cases tms_5-2 tms_40-10 --seeds 0 1 2 --json recovery.json

Prints, for every case, the identity error (0 = recovered), the mean max cosine similarity and the wall seconds of each seed. No peer:
``ours`` is the number of seeds that recovered (error 0 and every mean cosine above 0.99) out of ``n``. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from theodolite.demo_decomposition import last_test
from theodolite.provenance import write_json_atomic
from theodolite.study import RUN_RECORD, Job
from theodolite.study_progress import run_with_progress

LAYERS = {
    "tms_5-2": ["tms_5-2.yaml"],
    "tms_5-2-id": ["tms_5-2.yaml", "tms_5-2-id.yaml"],
    "tms_40-10": ["tms_5-2.yaml", "tms_40-10.yaml"],
    "tms_40-10-id": ["tms_5-2.yaml", "tms_40-10.yaml", "tms_40-10-id.yaml"],
    "resid_mlp_1": ["tms_5-2.yaml", "resid_mlp_1.yaml"],
    "resid_mlp_2": ["tms_5-2.yaml", "resid_mlp_1.yaml", "resid_mlp_2.yaml"],
    "resid_mlp_3": ["tms_5-2.yaml", "resid_mlp_1.yaml", "resid_mlp_2.yaml", "resid_mlp_3.yaml"],
}
LONG = ("resid_mlp_2", "resid_mlp_3")  # only where they are asked for
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "decomposition"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases and print what they recovered.

    Raises:
        SystemExit: 1 if a run failed.
    """
    parser = argparse.ArgumentParser(description="Ground-truth recovery of toy decompositions.")
    parser.add_argument("--cases", nargs="+", default=[case for case in LAYERS if case not in LONG], choices=list(LAYERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(argv)
    jobs = {case: [_job(case, seed, options.out) for seed in options.seeds] for case in options.cases}
    failures = run_with_progress([job for each in jobs.values() for job in each], options.processes, Console())
    for failure in failures:
        print(failure, file=sys.stderr)
    if failures:
        sys.exit(1)
    rows = [_row(case, [_outcome(job.run_dir) for job in each]) for case, each in jobs.items()]
    for row in rows:
        print(json.dumps(row))
    if options.json is not None:
        write_json_atomic(options.json, rows)


def _job(case: str, seed: int, out: Path) -> Job:
    layers = [f"--config={CONFIGS / layer}" for layer in LAYERS[case]]
    quiet = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
    return Job(out / f"{case}-{seed}", ("fit", *layers, f"--seed_everything={seed}", *quiet), {"seed": seed}, test=True, steps=3000)


def _outcome(run: Path) -> dict[str, Any]:
    test = last_test(run)
    similarities = [value for key, value in test.items() if key.endswith("/mmcs")]
    seconds = json.loads((run / RUN_RECORD).read_text())["seconds"]
    return {"error": test["test/identity_ci_error/total"], "mmcs": min(similarities), "seconds": seconds}


def _row(case: str, outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    recovered = sum(outcome["error"] == 0 and outcome["mmcs"] > 0.99 for outcome in outcomes)
    return {
        "case": case,
        "ours": recovered,
        "peer": None,
        "ratio": None,
        "unit": "seeds recovered",
        "n": len(outcomes),
        "errors": [outcome["error"] for outcome in outcomes],
        "mmcs": [round(outcome["mmcs"], 5) for outcome in outcomes],
        "seconds": [outcome["seconds"] for outcome in outcomes],
    }


if __name__ == "__main__":
    main()
