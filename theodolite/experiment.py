"""The experiment: two studies on evaluation seeds that nothing was tuned on, with all controls, statistics and a report.

``make experiment``, or::

    python -m theodolite.experiment --out runs/experiment

Act one asks what every arm does when its detector sees every hack; act two has two families of hacks, and detectors that were shown one of
them only. Both are studies for ``theodolite-sweep`` in ``configs/experiment``; their hypotheses lie beside them and are copied into the
study's folder before anything runs. Interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from theodolite.provenance import write_json_atomic
from theodolite.sweep import TIMINGS, chosen, end_with, run_study, sweep_parser

ACTS = ("act_one", "act_two")


def main(argv: Sequence[str] | None = None) -> None:
    """Run both acts; see the module's docstring.

    Raises:
        SystemExit: 0, 1 if a run failed, 2 for wrong arguments, 130 after Ctrl-C.
    """
    parser = sweep_parser("python -m theodolite.experiment", "Arms, baselines, controls and statistics over fresh seeds, in two acts.")
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"), help="folder of both studies (default: runs/experiment)")
    parser.add_argument("--acts", nargs="+", choices=ACTS, default=list(ACTS), metavar="ACT", help="which acts (default: both)")
    options, extra = _split(parser, argv)
    end_with(lambda: _both(options, extra), options.out)


def _split(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, tuple[str, ...]]:
    import sys

    given = list(sys.argv[1:] if argv is None else argv)
    split = given.index("--") if "--" in given else len(given)
    return parser.parse_args(given[:split]), tuple(given[split + 1 :])


def _both(options: argparse.Namespace, extra: tuple[str, ...]) -> list[str]:
    failures: list[str] = []
    console, named = Console(), options.arms
    for act in options.acts:
        path = options.configs / "experiment" / f"{act}.yaml"
        own = argparse.Namespace(**vars(options) | {"out": options.out / act, "arms": named})
        failures += study_and_report(path, own, console, extra)
    return failures


def study_and_report(path: Path, options: argparse.Namespace, console: Console, extra: tuple[str, ...] = ()) -> list[str]:
    """Run a study and write its report; returns one sentence per failed run."""
    study = chosen(path, options, extra)
    failures, seconds = run_study(study, options, console)
    if failures and not any(options.out.glob("*/run.json")):
        return failures
    start = time.perf_counter()
    report(options.out, seconds)
    seconds["report"] = time.perf_counter() - start
    summary = report(options.out, seconds)  # a second time, so that the page states its own cost too
    _print_results(summary, seconds, options.out, console)
    return failures


def report(out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Write timings and the report; returns the summary."""
    from theodolite.reports import build_report  # imported late: matplotlib is not needed before

    rounded = {phase: round(value, 1) for phase, value in seconds.items()}
    write_json_atomic(out / TIMINGS, {"seconds": rounded, "cpu_count": len(os.sched_getaffinity(0))})
    return build_report(out, pdf=True)


def _print_results(summary: dict[str, Any], seconds: dict[str, float], out: Path, console: Console) -> None:
    for finding in summary.get("findings", []):
        console.print(f"- {finding['text']}", highlight=False, markup=False)
    for phase, value in seconds.items():
        console.print(f"{phase:<12} {value:7.1f} s", highlight=False)
    console.print(f"total        {sum(seconds.values()):7.1f} s", highlight=False)
    console.print(f"report: {out / 'report' / 'index.html'}", highlight=False)


if __name__ == "__main__":
    main()
