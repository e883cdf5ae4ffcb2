"""The sandbox: a pool of zygotes behind one call."""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from .jobs import Call, Job, Limits, Outcome
from .messages import encode_calls, encode_job
from .worker import Worker, WorkerDied

_TIER = "zygote+seccomp"

_PROBE = """
import ctypes, os, signal, socket

def refused(attack):
    try:
        return attack() == -1
    except PermissionError:
        return True
    except OSError:
        return False

def broken_out():
    attacks = {
        "open": lambda: os.open("/proc/self/status", os.O_RDONLY),
        "write": lambda: os.open("/dev/null", os.O_WRONLY),
        "stat": lambda: os.stat("/"),
        "socket": lambda: socket.socket(),
        "fork": lambda: os.fork() or os._exit(9),
        "exec": lambda: os.execv("/theodolite-probe", ["probe"]),
        "kill": lambda: os.kill(os.getppid(), 0),
        "ptrace": lambda: ctypes.CDLL(None).ptrace(0, 0, 0, 0),
        "ignore the CPU timer": lambda: signal.signal(signal.SIGPROF, signal.SIG_IGN),
    }
    return [name for name, attack in attacks.items() if not refused(attack)]
"""


class Sandbox:
    """Runs untrusted programs on given calls, one fresh locked-down process each, and returns what they answered.

    A job that is lost to the infrastructure (a stalled machine, a killed worker) is repeated once; after that its outcome is
    ``infra_error``. Not to be shared with forked processes.

    Args:
        workers: Zygotes, and so jobs at a time. One per core is right.
        limits: What one job may use.
        preload: Offer programs most of the standard library; ``False`` offers ``zygote.LEAN_MODULES`` only (collections, math, re, ...)
            and makes a job about 15 % cheaper. A program can import nothing else.
    """

    def __init__(self, workers: int = 1, limits: Limits | None = None, preload: bool = True) -> None:
        if workers < 1:
            raise ValueError(f"Sandbox.workers is {workers}; it must be at least 1")
        self.limits = limits or Limits()
        self._workers = [Worker(preload) for _ in range(workers)]
        self._lock = threading.Lock()
        self._owner: int | None = None
        self.retries = 0
        """Jobs repeated because of the infrastructure since the start."""

    @property
    def tier(self) -> str:
        """The isolation in force, for manifests; raises ``RuntimeError`` before :meth:`start`."""
        self._require_started()
        return _TIER

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the zygotes."""
        return [worker.pid for worker in self._workers]

    def start(self) -> None:
        """Start the zygotes and try the lock-down with real attacks; idempotent.

        Raises:
            RuntimeError: The isolation cannot be established here. There is no weaker fall-back.
        """
        if self._owner == os.getpid():
            return
        try:
            for worker in self._workers:
                worker.spawn()
            for worker in self._workers:
                worker.wait_ready()
            self._owner = os.getpid()
            self._probe()
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Run all jobs over the workers; ``result[i]`` belongs to ``jobs[i]``.

        Raises:
            RuntimeError: Not started, or started by another process.
            ValueError: A call holds a value that cannot be passed.
        """
        return self._run(jobs, self.limits)

    def close(self) -> None:
        """End all zygotes; idempotent."""
        for worker in self._workers:
            worker.kill()
        self._owner = None

    def __enter__(self) -> Sandbox:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self, jobs: Sequence[Job], limits: Limits) -> list[Outcome]:
        self._require_started()
        with self._lock:
            batch = _Batch(jobs, limits, self._workers)
            try:
                outcomes = batch.run()
            except BaseException:
                for worker in self._workers:
                    if worker.busy:
                        worker.kill()
                raise
            self.retries += batch.retries
            return outcomes

    def _probe(self) -> None:
        """Every worker must answer a job that tries a handful of attacks, and none of them may get through."""
        probe = Job(_PROBE, entry="broken_out", calls=(Call(),))
        for outcome in self._run([probe] * len(self._workers), Limits()):
            if outcome.status != "ok":
                raise RuntimeError(
                    f"the sandbox cannot isolate programs here, it needs seccomp filters ({outcome.status}: {outcome.error})"
                )
            if outcome.outputs != ([],):
                raise RuntimeError(f"the sandbox does not hold here: {outcome.outputs} got through; refusing to run untrusted programs")

    def _require_started(self) -> None:
        if self._owner is None:
            raise RuntimeError("the sandbox is not started; call start() or use it as a context manager")
        if self._owner != os.getpid():
            raise RuntimeError("the sandbox was started by another process; make one Sandbox per process")


class _Batch:
    """One call of :meth:`Sandbox.run`: an event loop over the workers' control sockets, without threads."""

    def __init__(self, jobs: Sequence[Job], limits: Limits, workers: list[Worker]) -> None:
        texts: dict[int, str] = {}  # completions of one problem share their calls
        self._jobs = [encode_job(job, _cached_calls(job, texts)) for job in jobs]
        self._sizes = [len(job.calls) if job.entry is not None else None for job in jobs]
        self._limits, self._workers = limits, workers
        self._outcomes: list[Outcome | None] = [None] * len(jobs)
        self._waiting = deque((index, 1) for index in range(len(jobs)))
        self._given: dict[int, tuple[int, int]] = {}
        self.retries = 0

    def run(self) -> list[Outcome]:
        while self._waiting or self._given:
            for number, worker in enumerate(self._workers):
                if self._waiting and not worker.busy:
                    self._hand_over(number, worker)
            self._collect()
        return [outcome for outcome in self._outcomes if outcome is not None]

    def _hand_over(self, number: int, worker: Worker) -> None:
        if not worker.alive:
            worker.spawn()
            worker.wait_ready()
        index, attempt = self._waiting.popleft()
        self._given[number] = (index, attempt)
        try:
            worker.submit(self._jobs[index], self._sizes[index], self._limits)
        except WorkerDied as death:
            self._lost(number, worker, str(death))

    def _collect(self) -> None:
        """Wait until a worker has something, then take all that is there."""
        poll = select.poll()
        numbers: dict[int, int] = {}
        for number in self._given:
            numbers[self._workers[number].fileno()] = number
            poll.register(self._workers[number], select.POLLIN)
        deadline = min((self._workers[number].deadline for number in self._given), default=0.0)
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000 + 1) if numbers else []
        for descriptor, _ in ready:
            number = numbers[descriptor]
            try:
                self._settle(number, self._workers[number].collect())
            except WorkerDied as death:
                self._lost(number, self._workers[number], str(death))
        for number in [n for n in self._given if self._workers[n].deadline < time.monotonic()]:
            self._lost(number, self._workers[number], "the fork server is stuck")

    def _lost(self, number: int, worker: Worker, why: str) -> None:
        worker.kill()
        self._settle(number, Outcome("infra_error", error=why))

    def _settle(self, number: int, outcome: Outcome) -> None:
        index, attempt = self._given.pop(number)
        if outcome.status == "infra_error" and attempt == 1:
            self.retries += 1
            self._waiting.append((index, 2))
        else:
            self._outcomes[index] = outcome


def _cached_calls(job: Job, texts: dict[int, str]) -> str:
    """``encode_calls`` once per tuple of calls; the jobs keep the tuples alive, so their ids are unique."""
    if id(job.calls) not in texts:
        texts[id(job.calls)] = encode_calls(job.calls)
    return texts[id(job.calls)]
