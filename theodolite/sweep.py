"""Runs a study: every arm with every seed, from one file. ``theodolite-sweep configs/experiment/act_one.yaml --out runs/act_one``.

::

    theodolite-sweep STUDY.yaml --out DIR                       # here, one run per core at a time
    theodolite-sweep STUDY.yaml --out DIR --gpus 4              # here, one run per GPU at a time
    theodolite-sweep STUDY.yaml --out DIR --executor slurm --slurm "--gpus 1 --time 12:00:00 --partition gpu"
    theodolite-sweep STUDY.yaml --out DIR --seeds 20 --arms vanilla oracle -- --trainer.max_steps=2

The warm start comes first, then the runs; ``DIR/runs.json`` says of every run whether it is done, failed, interrupted
or missing; on SLURM also queued or running.
What is finished is not repeated, so the same command continues an interrupted study; a changed config, option or warm start is another run
and is repeated. Options after ``--`` go to every run. Every run of one seed sees the same prompts in the same order.

Before anything runs the study's ``report`` and its hypotheses are read as the report will read them, with the arms and measures they name,
and every arm's configs and options as its runs will.

On SLURM the warm start is a job of its own that is waited for, then every run is one, of a single process on at most one GPU. The same
command shows how far they are, leaves alone what is queued or running (``DIR/jobs.json``) and submits the rest. A run that was preempted or
interrupted goes on at its last checkpoint (``theodolite/study_restart.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from theodolite.config_layers import ConfigError, closest
from theodolite.launch import LaunchError, parse_request
from theodolite.provenance import write_json_atomic
from theodolite.study import RUN_RECORD, Job, visible_gpus
from theodolite.study_file import Arm, StudyFile, read_study_file
from theodolite.study_progress import run_with_progress
from theodolite.study_queue import StudyQueue
from theodolite.study_restart import BEGUN
from theodolite.study_timings import Timings
from theodolite.warm_start import QUIET, cached_phases, policy_folder, warm_start

PLAN, RUNS = "study.json", "runs.json"
"""What the study is, and what became of every run: in the study's folder."""
WARM_START = "warm start"


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
) -> tuple[list[str], Timings]:
    """Warm start and runs, in this terminal; all that can be checked beforehand is.

    Returns:
        One sentence per failure, and what the study's phases took.

    Raises:
        ValueError: The study's report, hypotheses or an arm's configs cannot be read, or there are fewer GPUs than asked for.
    """
    alone = not (part or only_warm_start)
    visible_gpus(options.gpus)
    if alone:
        write_plan(study, options.out)
    jobs = study_jobs(study, options.configs, options.out, policy_folder(study.warm_start, options.configs, options.cache))
    todo = {job.run_dir for job in jobs if not job.done}
    check_runs([job for job in jobs if job.run_dir in todo])
    timings = Timings(options.out, any(path.parent not in todo for path in options.out.glob(f"*/{RUN_RECORD}")), alone)
    cached = cached_phases(study.warm_start, options.configs, options.cache)
    with timings.phase("warm start", work=cached < len(study.warm_start), kept=cached > 0):
        _, failures = warm_start(study.warm_start, options.configs, options.cache, console)
    if failures or only_warm_start:
        return failures, timings
    processes = options.processes or options.gpus or len(os.sched_getaffinity(0))
    try:
        with timings.phase("runs", work=bool(todo)) as note:
            failures = run_with_progress(jobs, processes, console, options.gpus, note)
    finally:
        if not part:
            console.print(table_of(write_table(jobs, options.out), study))
    return failures, timings


def study_jobs(study: StudyFile, configs: Path, out: Path, policy: Path | None) -> list[Job]:
    """One run per arm and seed, seed after seed: fit, then the test protocol."""
    return [_job(study, arm, seed, configs, out, policy) for seed in study.seeds for arm in study.arms]


def _job(study: StudyFile, arm: Arm, seed: int, configs: Path, out: Path, policy: Path | None) -> Job:
    layers = [str(configs / layer) for layer in (*study.base, *arm.layers)]
    start = [] if policy is None else [f"--model.policy={policy}"]
    args = ("fit", *(f"--config={layer}" for layer in layers), f"--seed_everything={seed}", *start, *study.options, *arm.options, *QUIET)
    record: dict[str, Any] = {"arm": arm.name, "seed": seed, "arm_title": arm.title, "note": arm.note, "config": layers}
    return Job(out / f"{arm.name}-{seed}", args, record, test=study.test, steps=study.steps, resume=True)


def check_runs(jobs: Sequence[Job]) -> None:
    """Check one run's command line per arm, before a warm start is trained for them; what a constructor refuses is seen later, by the run.

    Raises:
        ValueError: A class, key or value of a config or an option does not exist.
    """
    from theodolite.cli import check_args  # imported late: a study whose runs are all done needs no Lightning

    for job in {job.record["arm"]: job for job in reversed(jobs)}.values():
        try:
            check_args(job.args)
        except ConfigError as error:
            raise ValueError(f"arm {job.record['arm']}: {error}") from error


def write_plan(study: StudyFile, out: Path) -> None:
    """Write what the report must know (of all the file's arms, chosen or not), and the hypotheses, before anything runs.

    Raises:
        ValueError: The report could not read them, or the folder holds other hypotheses: what was written down before earlier runs must
            not change under them.
    """
    check_plan(study)
    out.mkdir(parents=True, exist_ok=True)
    if study.hypotheses is not None:
        target, content = out / "hypotheses.yaml", study.hypotheses.read_bytes()
        if target.is_file() and target.read_bytes() != content:
            raise ValueError(f"{target} differs from {study.hypotheses}: hypotheses are written before the runs; choose another --out.")
        shutil.copyfile(study.hypotheses, target)
    write_json_atomic(out / PLAN, dict(study.plan))


def check_plan(study: StudyFile) -> None:
    """Read the study's report and hypotheses as its report will, and look for the arms that they name.

    Raises:
        ValueError: They cannot be read, or name an arm that the study does not have.
    """
    from theodolite.reports.hypotheses import read_hypotheses  # imported late: a part of a sweep needs no matplotlib
    from theodolite.reports.plan import read_plan

    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / PLAN
        write_json_atomic(written, dict(study.plan))
        try:
            plan = read_plan(Path(folder))
        except ValueError as error:
            raise ValueError(str(error).replace(str(written), f"{study.path}, report")) from error
    entries = [] if study.hypotheses is None else read_hypotheses(study.hypotheses)
    named: list[tuple[object, object]] = [(study.hypotheses, arm) for entry in entries for arm in (entry.arm, entry.against)]
    named += [(f"{study.path}: comparisons", arm) for pair in plan.comparisons or () for arm in pair]
    if plan.claim is not None:
        named += [(f"{study.path}: claim", arm) for arm in (plan.claim.arm, plan.claim.against, plan.claim.reference)]
    for where, arm in named:
        if isinstance(arm, str) and arm not in plan.arms:
            raise ValueError(f"{where} names the arm {arm!r}, which the study does not have{closest(arm, plan.arms)}.")


def write_table(jobs: Sequence[Job], out: Path, unfinished: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Write ``runs.json``: of every run its arm, seed, state, seconds, folder, and the last line of a failed one's log.

    Args:
        jobs: The runs.
        out: The study's folder.
        unfinished: State by name of runs that wait in a queue or run elsewhere.

    Returns:
        The records of these jobs; the file keeps those of other jobs that it already had.
    """
    records = []
    for job in jobs:
        log, record_file = job.run_dir / "log.txt", job.run_dir / RUN_RECORD
        left = "interrupted" if (job.run_dir / BEGUN).is_file() else "failed" if log.is_file() else "missing"
        state = "done" if job.done else (unfinished or {}).get(job.name, left)
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
    """Submit the warm start and wait for it, then submit every run that is neither done nor in the queue; or say how far they are."""
    asked = shlex.split(options.slurm)
    if parse_request(asked, ["-"], "theodolite.sweep").gpus > 1:
        raise LaunchError("--slurm asks for several GPUs per run, but a run of a sweep is one process: ask for --gpus 1.")
    shared = ["--cache", str(options.cache), "--configs", str(options.configs), "--out", str(options.out)]
    tail = ["--", *extra] if extra else []
    write_plan(study, options.out)
    check_runs(study_jobs(study, options.configs, options.out, policy_folder(study.warm_start, options.configs, options.cache)))
    queue = StudyQueue(options.out, options.executor)

    def send(name: str, *arguments: str) -> None:
        sent = queue.send(name, parse_request(asked, [str(options.study), *shared, *arguments, *tail], "theodolite.sweep"))
        console.print(f"{name}: job {sent.job_id}, log {sent.paths.stdout}", highlight=False)

    if not _trained(study, options):
        if WARM_START not in queue.unfinished():
            send(WARM_START, "--only-warm-start")
        queue.wait(WARM_START)
        if not _trained(study, options, patience_s=30.0):
            return [f"The job of the warm start ended without a policy; see {queue.log(WARM_START)}."]
    if options.only_warm_start:
        return []
    jobs = study_jobs(study, options.configs, options.out, policy_folder(study.warm_start, options.configs, options.cache))
    there = queue.unfinished()
    for job in jobs:
        if not job.done and job.name not in there:
            send(job.name, "--arms", job.record["arm"], "--seeds", str(job.record["seed"]), "--processes", "1", "--part")
    console.print(table_of(write_table(jobs, options.out, queue.unfinished()), study))
    return []


def _trained(study: StudyFile, options: argparse.Namespace, patience_s: float = 0.0) -> bool:
    """Whether the cache holds the whole warm start; files of another machine may take a while to be seen here."""
    deadline = time.monotonic() + patience_s
    while cached_phases(study.warm_start, options.configs, options.cache) < len(study.warm_start):
        if time.monotonic() >= deadline:
            return False
        time.sleep(1.0)
    return True


if __name__ == "__main__":
    main()
