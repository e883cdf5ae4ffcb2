"""Builds the report of a study from its files.

python -m theodolite.reports runs/demo                 # writes runs/demo/report/{index.html,arms.png,summary.json}
python -m theodolite.reports runs/demo --out elsewhere
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from theodolite.reports.build import build_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and build the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m theodolite.reports", description="Build the report of a study from its files.")
    parser.add_argument("study_dir", type=Path, help="directory with one <arm>-<seed> directory per run")
    parser.add_argument("--out", type=Path, default=None, help="where the report goes (default: STUDY_DIR/report)")
    options = parser.parse_args(arguments)
    try:
        summary = build_report(options.study_dir, options.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    target = options.out or options.study_dir / "report"
    print(f"{target / 'index.html'}: {len(summary['runs'])} runs, {len(summary['missing'])} missing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
