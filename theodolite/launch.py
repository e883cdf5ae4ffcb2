"""Submit any ``theodolite`` command to SLURM, or run it here: ``theodolite-launch --gpus 4 --time 12:00:00 -- test --config FILE ...``.

::

    theodolite-launch --gpus 4 --partition gpu --job-name sweep -- test --config configs/talkative/k_sweep.yaml --data.checkpoint last.ckpt
    theodolite-launch --gpus 1 --direct -- test --config ...         # no SLURM: in this terminal
    theodolite-launch --gpus 1 --executor local -- test --config ... # in the background of this machine

One process per GPU is started and ``--trainer.devices`` set, unless the command names it. A request for all GPUs of a node becomes
exclusive. A job that SLURM preempts or that reaches its time limit is put back into the queue and runs the same command again: a best-of-K
sweep continues where it was, ``theodolite-sweep`` repeats the run that was cut short from its first step, and ``fit`` continues where it is
given ``--ckpt_path last``. The job's id and logs are printed.

``submitit`` hands the command to the job in a file that it pickles in the log folder; the command's own results are never pickled.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS_FOR_REQUEUE = 120
"""Before the time limit, SLURM's signal gives submitit this long to put the job back into the queue."""


class LaunchError(ValueError):
    """A request that cannot work, in one sentence."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to run, and on what.

    Attributes:
        command: Arguments of ``theodolite``.
        gpus: Over all nodes; 0 = CPU only.
        gpus_per_node: Of the cluster's nodes.
        time: ``HH:MM:SS``.
        partition: SLURM partition; None = the cluster's default.
        job_name: Shown in the queue.
        nice: Added to the job's niceness, so that others go first; None = not nice.
        logs: Folder of the jobs' logs.
        cpus_per_gpu: CPU cores per process.
        module: What ``python -m`` runs; devices are only added to ``theodolite`` itself.
    """

    command: tuple[str, ...]
    gpus: int = 1
    gpus_per_node: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    job_name: str = "theodolite"
    nice: int | None = None
    logs: Path = Path("runs/logs")
    cpus_per_gpu: int = 8
    module: str = "theodolite"

    def __post_init__(self) -> None:
        """Refuse what no node could give."""
        if not self.command:
            raise LaunchError("say what to run after --, for example: theodolite-launch --gpus 1 -- test --config FILE.")
        if self.gpus < 0 or self.gpus_per_node < 1 or self.cpus_per_gpu < 1:
            raise LaunchError("--gpus must be at least 0, --gpus-per-node and --cpus-per-gpu at least 1.")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            below = self.gpus // self.gpus_per_node * self.gpus_per_node
            raise LaunchError(f"{self.gpus} GPUs do not fill nodes of {self.gpus_per_node}; {below} or {below + self.gpus_per_node} do.")
        self.minutes()

    def minutes(self) -> int:
        """The time limit, rounded up to whole minutes."""
        found = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", self.time)
        minutes = 0 if found is None else -(-(int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3])) // 60)
        if not minutes:
            raise LaunchError(f"--time is HH:MM:SS and more than nothing, got {self.time!r}.")
        return minutes

    def arguments(self) -> list[str]:
        """The command as a list for a process: this interpreter, and the number of devices unless the command names it."""
        if self.module != "theodolite":
            return [sys.executable, "-m", self.module, *self.command]
        own = (
            []
            if any(part.startswith("--trainer.devices") for part in self.command) or not self.gpus
            else [f"--trainer.devices={self._local()}"]
        )
        nodes = [f"--trainer.num_nodes={self.nodes}"] if self.nodes > 1 else []
        return [sys.executable, "-m", "theodolite", *self.command, *own, *nodes]

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return max(1, self.gpus // self.gpus_per_node)

    def _local(self) -> int:
        return min(self.gpus, self.gpus_per_node)

    def slurm(self) -> dict[str, Any]:
        """Parameters of submitit's SLURM executor."""
        extra: dict[str, Any] = {"requeue": True} | ({} if self.nice is None else {"nice": self.nice})
        parameters: dict[str, Any] = {
            "nodes": self.nodes,
            "tasks_per_node": max(1, self._local()),
            "cpus_per_task": self.cpus_per_gpu,
            "timeout_min": self.minutes(),
            "name": self.job_name,
            "slurm_signal_delay_s": SECONDS_FOR_REQUEUE,
            "slurm_additional_parameters": extra,
        }
        if self.gpus:
            parameters["gpus_per_node"] = self._local()
        if self.gpus >= self.gpus_per_node:
            parameters["slurm_exclusive"] = True
        if self.partition is not None:
            parameters["slurm_partition"] = self.partition
        return parameters


class Command:
    """What a job runs: the command in a process of its own. Put back into the queue, it runs again.

    Args:
        arguments: The process's arguments.
        folder: Its working directory.
    """

    def __init__(self, arguments: Sequence[str], folder: str) -> None:
        self.arguments, self.folder = list(arguments), folder

    def __call__(self) -> int:
        """Run it.

        Raises:
            RuntimeError: If it fails; the job then counts as failed.
        """
        print("running", shlex.join(self.arguments), flush=True)
        code = subprocess.run(self.arguments, cwd=self.folder, check=False).returncode
        if code:
            raise RuntimeError(f"{shlex.join(self.arguments)} ended with exit code {code}.")
        return code

    def checkpoint(self) -> Any:
        """What submitit queues again when the job is preempted or out of time: the same command."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Command(self.arguments, self.folder))


def submit(request: Request, executor: str) -> Any:
    """Hand a request to submitit.

    Args:
        request: What to run.
        executor: ``slurm``, or ``local`` for a process in the background of this machine.

    Returns:
        submitit's job.

    Raises:
        LaunchError: If there is no SLURM here, or ``local`` was asked for more than one node.
    """
    import submitit

    if executor == "slurm" and shutil.which("sbatch") is None:
        raise LaunchError("there is no sbatch on this machine: submit from a login node, or add --direct or --executor local.")
    if executor == "local" and request.nodes > 1:
        raise LaunchError(f"--executor local has one node, and {request.gpus} GPUs are {request.nodes} nodes of {request.gpus_per_node}.")
    queue = submitit.AutoExecutor(folder=request.logs / "%j", cluster=executor)
    if executor == "slurm":
        queue.update_parameters(**request.slurm())
    else:  # one process: Lightning starts the others itself
        queue.update_parameters(timeout_min=request.minutes(), gpus_per_node=request.gpus, tasks_per_node=1, name=request.job_name)
    return queue.submit(Command(request.arguments(), os.getcwd()))


def unfinished_jobs(executor: str, ids: Iterable[str]) -> dict[str, str]:
    """State, ``queued`` or ``running``, of those jobs that have not ended.

    Args:
        executor: What they were submitted to.
        ids: submitit's ids.

    Raises:
        LaunchError: SLURM does not answer.
    """
    wanted = set(ids)
    if executor != "slurm":
        return {job: "running" for job in wanted if "submitit.local._local" in _command_of(job)}
    if not wanted:
        return {}
    if shutil.which("squeue") is None:
        raise LaunchError("there is no squeue on this machine to ask what became of submitted jobs: ask from a login node.")
    question = ["squeue", "--noheader", "--user", str(os.getuid()), "--format", "%A %T"]
    answer = subprocess.run(question, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise LaunchError(f"squeue does not say which jobs are left ({answer.stderr.strip()}): try again when SLURM answers.")
    rows = [line.split() for line in answer.stdout.splitlines() if line.strip()]
    return {job: "running" if state in ("RUNNING", "COMPLETING") else "queued" for job, state in rows if job in wanted}


def _command_of(process: str) -> str:
    """A process's command line; empty if it has ended."""
    folder = Path("/proc", process)
    if not Path("/proc/self/cmdline").exists():
        return subprocess.run(["ps", "-p", process, "-o", "command="], capture_output=True, text=True, check=False).stdout
    command = b""
    try:
        for _ in range(50):  # a process that has only just begun has no arguments yet; one that has ended will never have any
            command = (folder / "cmdline").read_bytes()
            if command or "\nState:\tZ" in (folder / "status").read_text():
                break
            time.sleep(0.01)
    except OSError:
        return ""
    return command.replace(b"\0", b" ").decode(errors="replace")


def main(args: Sequence[str] | None = None) -> None:
    """The console script.

    Raises:
        SystemExit: 2 with one sentence for a request that cannot work; with ``--direct`` or ``--wait`` the command's exit code.
    """
    given, command = _parse(sys.argv[1:] if args is None else list(args))
    try:
        request = _request(given, command, "theodolite")
        if given.direct:
            raise SystemExit(subprocess.run(request.arguments(), check=False).returncode)
        job = submit(request, given.executor)
    except LaunchError as error:
        print(f"theodolite-launch: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"job {job.job_id}: {shlex.join(request.arguments())}")
    print(f"logs {job.paths.stdout}\n     {job.paths.stderr}")
    if given.executor == "slurm":
        print(f"watch squeue -j {job.job_id}, cancel scancel {job.job_id}")
    if given.wait:
        raise SystemExit(0 if job.exception() is None else 1)


def parse_request(options: Sequence[str], command: Sequence[str], module: str) -> Request:
    """A request from this command's own options as text, for another of the package's commands.

    Raises:
        LaunchError: If it cannot work, or the options ask for what only the console script does.
    """
    given, _ = _parse([*options, "--"])
    if given.direct or given.wait or given.executor != "slurm":
        raise LaunchError("--direct, --wait and --executor have no place among the options of a sweep's jobs; leave them out.")
    return _request(given, command, module)


def _request(given: argparse.Namespace, command: Sequence[str], module: str) -> Request:
    return Request(
        tuple(command), given.gpus, given.gpus_per_node, given.time, given.partition, given.job_name, given.nice, given.logs,
        given.cpus_per_gpu, module,
    )  # fmt: skip


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    split = args.index("--") if "--" in args else len(args)
    parser = argparse.ArgumentParser(prog="theodolite-launch", description="Submit a theodolite command to SLURM, or run it here.")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs over all nodes, one process each; 0 = CPU only (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of one node; asking for all makes the job exclusive (default 8)")
    parser.add_argument("--cpus-per-gpu", type=int, default=8, help="CPU cores per process (default 8)")
    parser.add_argument("--time", default="24:00:00", help="time limit HH:MM:SS (default 24:00:00)")
    parser.add_argument("--partition", help="SLURM partition (default: the cluster's)")
    parser.add_argument("--job-name", default="theodolite", help="name in the queue")
    parser.add_argument("--nice", type=int, nargs="?", const=10000, help="let others go first, by this much (10000 without a number)")
    parser.add_argument("--logs", type=Path, default=Path("runs/logs"), help="folder of logs (default runs/logs)")
    parser.add_argument("--executor", choices=("slurm", "local"), default="slurm", help="local = background of this machine, without SLURM")
    parser.add_argument("--direct", action="store_true", help="no job: run in this terminal")
    parser.add_argument("--wait", action="store_true", help="wait for the job and end as it ends")
    return parser.parse_args(args[:split]), args[split + 1 :]


if __name__ == "__main__":
    main()
