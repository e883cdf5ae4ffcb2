"""The demo: a small language model learns to cheat, and what projecting the cheating direction out of its updates does about it.

``make demo``, or::

    python -m theodolite.demo --out runs/demo

On two idle CPU cores it takes about nine minutes: a warm start (trained once, then cached), seven arms with three seeds, a
report. Every arm of a seed sees the same prompts in the same order. Interrupted, it continues where it was.

It is the study ``configs/experiment/demo.yaml`` run by ``theodolite-sweep``, and its report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from theodolite.experiment import study_and_report
from theodolite.sweep import end_with, sweep_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo; see the module's docstring.

    Raises:
        SystemExit: 0, 1 if a run failed, 2 for wrong arguments, 130 after Ctrl-C.
    """
    parser = sweep_parser("python -m theodolite.demo", "The cheating demo: arms, seeds, report.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="study folder (default: runs/demo)")
    options = parser.parse_args(argv)
    end_with(lambda: study_and_report(options.configs / "experiment" / "demo.yaml", options, Console()), options.out)


if __name__ == "__main__":
    main()
