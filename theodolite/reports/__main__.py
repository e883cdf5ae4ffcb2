"""Builds the report of a study, or of any runs, from their files: ``theodolite-report``.

::

    theodolite-report runs/experiment/act_one              # writes runs/experiment/act_one/report/
    theodolite-report runs/a-0 runs/a-1 runs/b-0 --out DIR # single runs, of a sweep or of `theodolite fit`
    theodolite-report compare runs/a-0 runs/b-0            # the two runs' configs side by side
    theodolite-report results runs/experiment/act_one runs/experiment/act_two --out docs/results.md

A report is ``index.html`` (self-contained, opens offline), ``arms.png``, ``arms.pdf`` and ``summary.json``: the same bytes from the same
files.
``results`` writes the studies' claims, outcomes and numbers as Markdown, so that no number in a text is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from theodolite.provenance import write_text_atomic
from theodolite.reports.build import build_report
from theodolite.reports.compare_runs import compare_runs
from theodolite.reports.results_text import results_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do it; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["compare"]:
            return _compare(given[1:])
        if given[:1] == ["results"]:
            return _results(given[1:])
        return _report(given)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _report(given: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="theodolite-report", description="Build a report from runs' files.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="a directory with one <arm>-<seed> directory per run, or runs")
    parser.add_argument("--out", type=Path, default=None, help="where the report goes (default: RUNS/report, for one directory of runs)")
    options = parser.parse_args(given)
    single = len(options.runs) == 1 and not (options.runs[0] / "metrics.jsonl").is_file()
    if options.out is None and not single:
        raise ValueError("say with --out where the report of several directories, or of a single run, goes.")
    target = options.out or options.runs[0] / "report"
    summary = build_report(options.runs[0], target, more=options.runs[1:], pdf=True)
    print(f"{target / 'index.html'}: {len(summary['runs'])} runs, {len(summary['missing'])} missing")
    return 0


def _compare(given: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="theodolite-report compare", description="Two runs' configs side by side.")
    parser.add_argument("first", type=Path, help="a run's directory")
    parser.add_argument("second", type=Path, help="another's")
    parser.add_argument("--all", action="store_true", help="also what is the same in both")
    options = parser.parse_args(given)
    print(compare_runs(options.first, options.second, everything=options.all), end="")
    return 0


def _results(given: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="theodolite-report results", description="Studies' outcomes as Markdown.")
    parser.add_argument("studies", type=Path, nargs="+", help="directories of studies")
    parser.add_argument("--out", type=Path, default=None, help="the Markdown file (default: print)")
    options = parser.parse_args(given)
    text = results_text(options.studies)
    if options.out is None:
        print(text, end="")
    else:
        write_text_atomic(options.out, text)
        print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
