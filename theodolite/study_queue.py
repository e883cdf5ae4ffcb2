"""Which jobs of a study wait or run in a queue: ids are kept in the study's folder, so that no later call submits one a second time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from theodolite.launch import Request, submit, unfinished_jobs
from theodolite.provenance import write_json_atomic

JOBS = "jobs.json"
POLL_S = 5.0
"""Seconds between two questions to SLURM."""


class StudyQueue:
    """A study's jobs by name, in ``jobs.json``.

    Args:
        out: The study's folder.
        executor: ``slurm`` or ``local``.
    """

    def __init__(self, out: Path, executor: str) -> None:
        self._path, self._executor = out / JOBS, executor
        self._jobs: dict[str, dict[str, str]] = {}
        if self._path.is_file():
            self._jobs = json.loads(self._path.read_text(encoding="utf-8"))["jobs"]

    def send(self, name: str, request: Request) -> Any:
        """Submit a job and remember it; returns submitit's job.

        Raises:
            LaunchError: It cannot be submitted here.
        """
        job = submit(request, self._executor)
        self._jobs[name] = {"id": str(job.job_id), "executor": self._executor, "log": str(job.paths.stdout)}
        write_json_atomic(self._path, {"jobs": self._jobs})
        return job

    def unfinished(self) -> dict[str, str]:
        """State (``queued`` or ``running``) by name of the jobs that have not ended, whatever call submitted them.

        Raises:
            LaunchError: SLURM does not answer.
        """
        found: dict[str, str] = {}
        for executor in {job["executor"] for job in self._jobs.values()}:
            names = {job["id"]: name for name, job in self._jobs.items() if job["executor"] == executor}
            found |= {names[job]: state for job, state in unfinished_jobs(executor, names).items()}
        return found

    def wait(self, name: str) -> None:
        """Return when a job has ended, however it did."""
        while name in self.unfinished():
            time.sleep(POLL_S)

    def log(self, name: str) -> str:
        """Where a job's output is."""
        return self._jobs[name]["log"]
