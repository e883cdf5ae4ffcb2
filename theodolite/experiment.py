"""The experiment: two studies on evaluation seeds that nothing was tuned on, with all controls, statistics and a report.

``make experiment``, or::

    python -m theodolite.experiment --out runs/experiment

Act one asks what every arm does when its detector sees every hack; act two has two families of hacks, and detectors that were shown one of
them only. Both are studies for ``theodolite-sweep`` in ``configs/experiment``; their hypotheses lie beside them and are copied into the
study's folder before anything runs. Interrupted, the same command continues. ``--arms`` are taken from every act that has them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from theodolite.study_file import read_study_file
from theodolite.study_progress import print_seconds
from theodolite.study_timings import Timings
from theodolite.sweep import chosen, end_with, run_study, sweep_parser, write_plan

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
    acts, console = _acts(options), Console()
    for path, own in acts:  # what cannot work in either is said before the first run of both
        write_plan(chosen(path, own, extra), own.out)
    return [failure for path, own in acts for failure in study_and_report(path, own, console, extra)]


def _acts(options: argparse.Namespace) -> list[tuple[Path, argparse.Namespace]]:
    """Study file and options of every act that has any of the arms asked for.

    Raises:
        ValueError: No act has one of them.
    """
    found, known = [], set[str]()
    for act in dict.fromkeys(options.acts):
        study = read_study_file(options.configs / "experiment" / f"{act}.yaml", options.configs)
        known |= set(study.arm_names)
        arms = None if options.arms is None else [arm for arm in options.arms if arm in study.arm_names]
        if arms is None or arms:
            found.append((study.path, argparse.Namespace(**vars(options) | {"out": options.out / act, "arms": arms})))
    unknown = [arm for arm in options.arms or () if arm not in known]
    if unknown:
        raise ValueError(f"no arm is named {unknown[0]!r} in {' and '.join(options.acts)}; there are {', '.join(sorted(known))}.")
    return found


def study_and_report(path: Path, options: argparse.Namespace, console: Console, extra: tuple[str, ...] = ()) -> list[str]:
    """Run a study and write its report; returns one sentence per failed run."""
    study = chosen(path, options, extra)
    failures, timings = run_study(study, options, console)
    if failures and not any(options.out.glob("*/run.json")):
        return failures
    summary = report(options.out, timings)
    _print_results(summary, timings.seconds, options.out, console)
    return failures


def report(out: Path, timings: Timings) -> dict[str, Any]:
    """Write the report; returns its summary. A call that did nothing else leaves the timings, and so the report's bytes, as they were."""
    from theodolite.reports import build_report  # imported late: what cannot work is said without matplotlib

    if timings.changed:
        with timings.phase("report"):
            build_report(out, pdf=True)
    return build_report(out, pdf=True)  # after the other, so that the page states its own cost too


def _print_results(summary: dict[str, Any], seconds: dict[str, float], out: Path, console: Console) -> None:
    for finding in summary.get("findings", []):
        console.print(f"- {finding['text']}", highlight=False, markup=False)
    print_seconds(seconds, console)
    console.print(f"report: {out / 'report' / 'index.html'}", highlight=False)


if __name__ == "__main__":
    main()
