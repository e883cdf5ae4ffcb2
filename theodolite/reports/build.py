"""Builds a report from a study directory: ``index.html``, ``arms.png`` and ``summary.json``. The same files give the same bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from theodolite.provenance import write_bytes_atomic
from theodolite.reports.claim import claim_of
from theodolite.reports.figures import render_pdf, render_png
from theodolite.reports.hypotheses import judgement_record, study_judgements
from theodolite.reports.page import render_page
from theodolite.reports.paired_tests import COLUMNS, comparison_tests, tests_record
from theodolite.reports.plan import MEASURES, RATES
from theodolite.reports.records import Run, Study, read_study
from theodolite.reports.statistics_table import arm_spread, compare, comparison_record, measure, n_rollouts
from theodolite.reports.verdict import findings, questions

SCHEMA_VERSION = 1


def build_report(study_dir: Path, out_dir: Path | None = None, more: Sequence[Path] = (), pdf: bool = False) -> dict[str, Any]:
    """Write the report of a study, or of several directories.

    Args:
        study_dir: Directory with one directory per run (see :mod:`theodolite.reports.records`).
        out_dir: Where ``index.html``, ``arms.png`` and ``summary.json`` go; ``<study_dir>/report`` if not given.
            ``summary.json`` is written into ``study_dir`` too, unless it is a run's own.
        more: Further directories of runs, or runs.
        pdf: Also write ``arms.pdf``.

    Returns:
        The summary, as written to ``summary.json``.

    Raises:
        FileNotFoundError: The study directory does not exist.
        ValueError: It holds no run, or one of its files is malformed. Nothing is written then.
    """
    study = read_study(Path(study_dir), *more)
    target = Path(study_dir) / "report" if out_dir is None else Path(out_dir)
    summary = summarise(study)
    text = (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode()
    page, picture = render_page(study).encode(), render_png(study)
    files = {target / "arms.png": picture, target / "summary.json": text, target / "index.html": page}
    if pdf:
        files[target / "arms.pdf"] = render_pdf(study)
    if not more and not (Path(study_dir) / "metrics.jsonl").is_file():
        files[Path(study_dir) / "summary.json"] = text
    target.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        write_bytes_atomic(path, content)
    return summary


def summarise(study: Study) -> dict[str, Any]:
    """The numbers of a study as plain JSON; what was not measured is ``None``."""
    claim = claim_of(study)
    taken = [name for name in MEASURES if any(measure(study, run, name) is not None for run in study.runs)]
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": [_run_record(study, run) for run in study.runs],
        "arms": {arm: _arm_record(study, arm) for arm in study.arms},
        "comparisons": [comparison_record(compare(study, arm, against, name)) for arm, against in questions(study) for name in taken],
        "findings": [{"question": item.question, "status": item.status, "text": item.text} for item in findings(study)],
        "claim": None if claim is None else {"text": claim.text, "mark": claim.mark, "reached": claim.reached},
        "tests": [tests_record(item) for name in COLUMNS for item in comparison_tests(study, questions(study), name)],
        "hypotheses": [judgement_record(item) for item in study_judgements(study)],
        "missing": [{"arm": arm, "seed": seed, "why": why} for arm, seed, why in study.absent],
        "seconds": study.seconds,
        "cpu_count": study.cpu_count,
    }


def _run_record(study: Study, run: Run) -> dict[str, Any]:
    record: dict[str, Any] = {"arm": run.arm, "seed": run.seed}
    record |= {f"base_{name}": run.base(name) for name in RATES}
    record |= {name: measure(study, run, name) for name in MEASURES}
    count = run.final(study.plan.count_key)
    return record | {"n_rollouts": None if count is None else int(count), "seconds": run.seconds}


def _arm_record(study: Study, arm: str) -> dict[str, Any]:
    record: dict[str, Any] = {"title": study.title(arm), "note": study.note(arm), "n_rollouts": n_rollouts(study, arm)}
    for name in MEASURES:
        value = arm_spread(study, arm, name)
        record[name] = {"n": value.n, "mean": value.mean, "sd": value.sd}
    return record
