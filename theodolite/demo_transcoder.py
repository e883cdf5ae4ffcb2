"""The transcoder demo: a small language model, nested transcoders on the right and the wrong site, and a page that compares them.

``make demo-transcoder``, or::

    python -m theodolite.demo_transcoder --out runs/demo_transcoder

On two idle CPU cores it took 171 s (limit: five minutes). Interrupted, it continues where it was. Everything it runs are ordinary configs
through the ordinary command line: ``configs/transcoder/demo_language_model.yaml``, ``demo.yaml`` and ``arms/*.yaml``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from theodolite.provenance import file_hash
from theodolite.study import Job
from theodolite.study_progress import print_seconds, run_with_progress
from theodolite.sweep import end_with

ARMS = ("corrected", "legacy", "unscaled", "plain")
"""The first is what the others are compared with."""
STEPS, LANGUAGE_MODEL_STEPS = 500, 200
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo; see the module's docstring.

    Raises:
        SystemExit: 1 if a run failed, 2 for wrong arguments, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m theodolite.demo_transcoder", description="Nested transcoders on a small model.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo_transcoder"), help="study folder (default: runs/demo_transcoder)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of data order and weights (default: 0 1 2)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help=f"among {', '.join(ARMS)}")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="runs at once (default: one per core)")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder of the configs (default: configs)")
    options = parser.parse_args(argv)
    if not (options.configs / "transcoder" / "demo.yaml").is_file():
        parser.error(f"there is no {options.configs}/transcoder/demo.yaml; run from a checkout, or say where its configs are: --configs.")
    end_with(lambda: run_demo(options, Console()), options.out)


def run_demo(options: argparse.Namespace, console: Console) -> list[str]:
    """Language model, arms, page. Returns one sentence per failed run."""
    start = time.perf_counter()
    language_model = language_model_job(options.configs, options.out)
    failures = run_with_progress([language_model], 1, console)
    trained = time.perf_counter()
    if failures:
        return failures
    policy = language_model.run_dir / "policy"
    jobs = [arm_job(arm, seed, policy, options) for arm in ARMS if arm in options.arms for seed in options.seeds]
    # one seed of every arm before the next seed: an interrupted demo can already be compared
    failures = run_with_progress(sorted(jobs, key=lambda job: job.record["seed"]), options.processes, console)
    compared = time.perf_counter()
    report(jobs, options.out, console)
    seconds = {"language model": trained - start, "arms": compared - trained, "report": time.perf_counter() - compared}
    print_seconds(seconds, console)
    return failures


def language_model_job(configs: Path, out: Path) -> Job:
    """Training of the language model; another config is another folder, so that no arm goes on with an old model."""
    config = configs / "transcoder" / "demo_language_model.yaml"
    args = ("fit", f"--config={config}", "--seed_everything=0", *QUIET)
    return Job(out / f"language_model_{file_hash(config)[:8]}", args, {"phase": "language model"}, test=False, steps=LANGUAGE_MODEL_STEPS)


def arm_job(arm: str, seed: int, policy: Path, options: argparse.Namespace) -> Job:
    """One arm with one seed: fit, then test on held-out tokens and with the transcoder spliced in."""
    layers = [options.configs / "transcoder" / "demo.yaml", options.configs / "transcoder" / "arms" / f"{arm}.yaml"]
    args = ("fit", *(f"--config={layer}" for layer in layers), f"--seed_everything={seed}", f"--data.model={policy}", *QUIET)
    record = {"arm": arm, "seed": seed, "config": [str(layer) for layer in layers]}
    return Job(options.out / f"{arm}-{seed}", args, record, test=True, steps=STEPS)


def report(jobs: Sequence[Job], out: Path, console: Console) -> None:
    """Compare the runs that are done, and say what differs."""
    from theodolite.reports.compare_transcoders import build_comparison  # imported late: matplotlib is not needed before

    order = {arm: place for place, arm in enumerate(ARMS)}
    done = sorted((job for job in jobs if job.done), key=lambda job: (order[job.record["arm"]], job.record["seed"]))
    if not done:
        return
    summary = build_comparison([job.run_dir for job in done], out / "report")
    for item in summary["comparisons"]:
        interval = "" if item["low"] is None else f" [{item['low']:+.4f}, {item['high']:+.4f}], n={item['n']} seeds"
        if item["mean"] is not None:
            console.print(f"{item['arm']} - {item['against']}, {item['measure']}: {item['mean']:+.4f}{interval}", highlight=False)
    console.print(f"report: {out / 'report' / 'index.html'}", highlight=False)


if __name__ == "__main__":
    main()
