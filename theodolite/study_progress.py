"""How a study's runs look while they run: a bar for each, one for all, and a line for each that ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from theodolite.study import RUN_RECORD, Job, run_jobs


def run_with_progress(
    jobs: Sequence[Job], processes: int, console: Console, gpus: int = 0, ended: Callable[[], None] | None = None
) -> list[str]:
    """Run jobs under a bar for each that runs and one for all; a line for each that ends, after which ``ended`` is called.

    Returns:
        One sentence per failed job.
    """
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        overall = progress.add_task("runs", total=len(jobs), completed=sum(job.done for job in jobs)) if len(jobs) > 1 else None
        tasks: dict[str, TaskID] = {}

        def watch(running: Sequence[Job], finished: Job | None) -> None:
            for job in running:
                if job.name not in tasks:
                    tasks[job.name] = progress.add_task(job.name, total=job.steps)
                progress.update(tasks[job.name], completed=job.steps_done())
            if finished is not None:
                if finished.name in tasks:
                    progress.remove_task(tasks[finished.name])
                if overall is not None:
                    progress.advance(overall)
                progress.console.print(finished_line(finished), highlight=False)
                if ended is not None:
                    ended()

        return run_jobs(jobs, processes, watch, gpus)


def print_seconds(seconds: Mapping[str, float], console: Console) -> None:
    """Print what each phase took, and all of them together."""
    lines = {**seconds, "total": sum(seconds.values())}
    width = max(map(len, lines))
    for phase, value in lines.items():
        console.print(f"{phase:<{width}} {value:8.1f} s", highlight=False)


def finished_line(job: Job) -> str:
    """A finished run's name, its last hack and pass rates where it has some, and its seconds."""
    if not job.done:
        return f"{job.name}: FAILED"
    seconds = json.loads((job.run_dir / RUN_RECORD).read_text())["seconds"]
    rows = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    last: dict[str, Any] = {key: value for row in rows for key, value in row.items()}
    prefix = "test/hinted" if "test/hinted/hack_rate" in last else "val"
    values = {name: last.get(f"{prefix}/{name}_rate") for name in ("hack", "pass")}
    rates = ", ".join(f"{name} {value:.3f}" for name, value in values.items() if value is not None)
    return f"{job.name}: {rates} ({seconds:.0f} s)"
