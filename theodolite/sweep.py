"""Runs a study: every arm with every seed, from one file. ``theodolite-sweep configs/experiment/act_one.yaml --out runs/act_one``.

::

    theodolite-sweep STUDY.yaml --out DIR                       # here, one run per core at a time
    theodolite-sweep STUDY.yaml --out DIR --gpus 4              # here, one run per GPU at a time
    theodolite-sweep STUDY.yaml --out DIR --executor slurm --slurm "--gpus 1 --time 12:00:00 --partition gpu"
    theodolite-sweep STUDY.yaml --out DIR --seeds 20 --arms vanilla oracle -- --trainer.max_steps=2

The warm start comes first, then the runs; ``DIR/runs.json`` says of every run whether it is done, failed or missing, and where its log is.
What is finished is not repeated, so the same command continues an interrupted study; a changed config, option or warm start is another run
and is repeated. Options after ``--`` go to every run. Every run of one seed sees the same prompts in the same order.

On SLURM the warm start is a job of its own that is waited for, then every run is one; the same command shows how far they are.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from theodolite.launch import LaunchError, parse_request, submit
from theodolite.provenance import write_json_atomic
from theodolite.study import RUN_RECORD, Job
from theodolite.study_file import Arm, StudyFile, read_study_file
from theodolite.study_progress import run_with_progress
from theodolite.warm_start import QUIET, warm_start

PLAN, RUNS, TIMINGS = "study.json", "runs.json", "timings.json"
"""What the study is, what became of every run, and what it cost: in the study's folder."""


def main(argv: Sequence[str] | None = None) -> None:
    """The console script.

    Raises:
        SystemExit: 1 if a run failed, 2 for arguments that cannot work, 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    split = given.index("--") if "--" in given else len(given)
    parser = sweep_parser("theodolite-sweep", "Run every arm of a study with every seed.")
    parser.add_argument("study", type=Path, help="the study's YAML file")
    parser.add_argument("--out", type=Path, required=True, help="the study's folder")
    parser.add_argument(
        "--executor", choices=("here", "slurm", "local"), default="here", help="local = submitit's processes, in the background"
    )
    parser.add_argument("--slurm", default="--gpus 1", help="options of theodolite-launch for every job, as one text (default: '--gpus 1')")
    parser.add_argument("--only-warm-start", action="store_true", help="train the warm start and stop")
    parser.add_argument("--part", action="store_true", help="leave study.json and runs.json to the sweep that this is a part of")
    options = parser.parse_args(given[:split])
    end_with(lambda: _main(options, tuple(given[split + 1 :])), options.out)


def _main(options: argparse.Namespace, extra: tuple[str, ...]) -> list[str]:
    console, study = Console(), chosen(options.study, options, extra)
    if options.executor != "here":
        return _queue(study, options, extra, console)
    failures, _ = run_study(study, options, console, options.only_warm_start, options.part)
    return failures


def sweep_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser with what every command that runs studies knows: seeds, arms, processes, folders."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these (default: all)")
    parser.add_argument("--processes", type=int, help="runs at once (default: one per core, or per GPU with --gpus)")
    parser.add_argument("--gpus", type=int, default=0, help="give each run one of so many GPUs (default 0: what the configs say)")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where warm starts are kept (default: runs/cache)")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder of the configs (default: configs)")
    return parser


def end_with(work: Any, out: Path) -> None:
    """Run ``work`` and leave as a command should: failures and what cannot work on stderr, one sentence each.

    Raises:
        SystemExit: 0, 1 if something failed, 2 for a study that cannot work, 130 after Ctrl-C.
    """
    try:
        failures = work()
    except (ValueError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"interrupted; finished runs are kept in {out}, the same command continues.", file=sys.stderr)
        sys.exit(130)
    for failure in failures:
        print(failure, file=sys.stderr)
    sys.exit(1 if failures else 0)


def chosen(path: Path, options: argparse.Namespace, extra: tuple[str, ...] = ()) -> StudyFile:
    """The study with the arms and seeds that were asked for.

    Raises:
        ValueError: The file cannot work, or has no such arm.
    """
    study = read_study_file(path, options.configs)
    unknown = [name for name in options.arms or () if name not in study.arm_names]
    if unknown:
        raise ValueError(f"{path} has no arm {unknown[0]!r}; there are {', '.join(study.arm_names)}.")
    if any(not option.startswith("--") or "=" not in option for option in extra):
        raise ValueError(f"options for the runs are written --key=value, got {shlex.join(extra)}.")
    arms = tuple(arm for arm in study.arms if options.arms is None or arm.name in options.arms)
    return replace(study, arms=arms, seeds=tuple(options.seeds or study.seeds), options=(*study.options, *extra))


def run_study(
    study: StudyFile, options: argparse.Namespace, console: Console, only_warm_start: bool = False, part: bool = False
) -> tuple[list[str], dict[str, float]]:
    """Warm start and runs, in this terminal.

    Returns:
        One sentence per failure, and wall seconds by phase.
    """
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    policy, failures = warm_start(study.warm_start, options.configs, options.cache, console)
    seconds["warm start"] = time.perf_counter() - start
    if failures or only_warm_start:
        return failures, seconds
    if not part:
        write_plan(study, options.out)
    jobs = study_jobs(study, options.configs, options.out, policy)
    processes = options.processes or options.gpus or len(os.sched_getaffinity(0))
    start = time.perf_counter()
    try:
        failures = run_with_progress(jobs, processes, console, options.gpus)
    finally:
        if not part:
            console.print(table_of(write_table(jobs, options.out), study))
    seconds["runs"] = time.perf_counter() - start
    return failures, seconds


def study_jobs(study: StudyFile, configs: Path, out: Path, policy: Path | None) -> list[Job]:
    """One run per arm and seed, seed after seed: fit, then the test protocol."""
    return [_job(study, arm, seed, configs, out, policy) for seed in study.seeds for arm in study.arms]


def _job(study: StudyFile, arm: Arm, seed: int, configs: Path, out: Path, policy: Path | None) -> Job:
    layers = [str(configs / layer) for layer in (*study.base, *arm.layers)]
    start = [] if policy is None else [f"--model.policy={policy}"]
    args = ("fit", *(f"--config={layer}" for layer in layers), f"--seed_everything={seed}", *start, *study.options, *arm.options, *QUIET)
    record: dict[str, Any] = {"arm": arm.name, "seed": seed, "arm_title": arm.title, "note": arm.note, "config": layers}
    return Job(out / f"{arm.name}-{seed}", args, record, test=study.test, steps=study.steps)


def write_plan(study: StudyFile, out: Path) -> None:
    """Write what the report must know (of all the file's arms, chosen or not), and the hypotheses, before anything runs.

    Raises:
        ValueError: The folder holds other hypotheses: what was written down before earlier runs must not change under them.
    """
    out.mkdir(parents=True, exist_ok=True)
    if study.hypotheses is not None:
        target, content = out / "hypotheses.yaml", study.hypotheses.read_bytes()
        if target.is_file() and target.read_bytes() != content:
            raise ValueError(f"{target} differs from {study.hypotheses}: hypotheses are written before the runs; choose another --out.")
        shutil.copyfile(study.hypotheses, target)
    write_json_atomic(out / PLAN, dict(study.plan))


def write_table(jobs: Sequence[Job], out: Path) -> list[dict[str, Any]]:
    """Write ``runs.json``: of every run its arm, seed, state, seconds, folder, and the last line of a failed one's log.

    Returns:
        The records of these jobs; the file keeps those of other jobs that it already had.
    """
    records = []
    for job in jobs:
        log, record_file = job.run_dir / "log.txt", job.run_dir / RUN_RECORD
        state = "done" if job.done else "failed" if log.is_file() else "missing"
        record: dict[str, Any] = {"arm": job.record["arm"], "seed": job.record["seed"], "state": state, "folder": job.name}
        record["seconds"] = json.loads(record_file.read_text(encoding="utf-8"))["seconds"] if state == "done" else None
        record["error"] = _last_line(log) if state == "failed" else None
        records.append(record)
    here = {record["folder"] for record in records}
    before = json.loads((out / RUNS).read_text(encoding="utf-8"))["runs"] if (out / RUNS).is_file() else []
    write_json_atomic(out / RUNS, {"runs": [*records, *(record for record in before if record["folder"] not in here)]})
    return records


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "killed before it said anything"


def table_of(records: Sequence[dict[str, Any]], study: StudyFile) -> Table:
    """What ran and what failed: a row per arm, a column per seed."""
    table = Table("arm", *(f"seed {seed}" for seed in study.seeds), title=study.title)
    found = {(record["arm"], record["seed"]): record for record in records}
    for arm in study.arms:
        row = [found[arm.name, seed] for seed in study.seeds]
        table.add_row(arm.name, *(f"{one['seconds']:.0f} s" if one["state"] == "done" else one["state"].upper() for one in row))
    return table


def _queue(study: StudyFile, options: argparse.Namespace, extra: tuple[str, ...], console: Console) -> list[str]:
    """Submit the warm start and wait for it, then submit every run that is not done; or say how far they are."""
    shared = ["--cache", str(options.cache), "--configs", str(options.configs), "--out", str(options.out)]
    tail = ["--", *extra] if extra else []

    def send(*arguments: str) -> Any:
        command = [str(options.study), *shared, *arguments, *tail]
        return submit(parse_request(shlex.split(options.slurm), command, module="theodolite.sweep"), options.executor)

    if study.warm_start:
        send("--only-warm-start").result()
    policy, failures = warm_start(study.warm_start, options.configs, options.cache, console)  # from the cache
    if failures:
        return failures
    write_plan(study, options.out)
    jobs = study_jobs(study, options.configs, options.out, policy)
    for job in jobs:
        if not job.done:
            sent = send("--arms", job.record["arm"], "--seeds", str(job.record["seed"]), "--processes", "1", "--part")
            console.print(f"{job.name}: job {sent.job_id}, log {sent.paths.stdout}", highlight=False)
    console.print(table_of(write_table(jobs, options.out), study))
    return []


if __name__ == "__main__":
    main()
