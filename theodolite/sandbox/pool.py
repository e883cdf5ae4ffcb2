"""The sandbox: a pool of zygotes behind one call."""

from __future__ import annotations

import logging
import os
import select
import sysconfig
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from types import TracebackType
from typing import cast

from . import zygote
from .jobs import Call, Job, Limits, Outcome
from .messages import Expected, encode_calls, encode_job
from .setup_code import Setups
from .tiers import ATTACKS, CHAIN, PROBE, ConcreteTier, Tier, TierReport, with_reading
from .worker import Worker, WorkerDied

_log = logging.getLogger(__name__)


class Sandbox:
    """Runs untrusted programs on given calls, one fresh locked-down process each, and returns what they answered.

    A job that is lost to the infrastructure (a stalled machine, a killed worker) is repeated once; after that its outcome is
    ``infra_error``. Not to be shared with forked processes.

    Args:
        workers: Zygotes, and so jobs at a time. One per core is right: with more than one, each stays on a core of its own.
        limits: What one job may use.
        preload: Offer programs most of the standard library; ``False`` offers ``zygote.LEAN_MODULES`` only (collections, math, re, ...)
            and makes a job about 15 % cheaper. A program can import nothing else.
        tier: ``auto`` = the strongest that works here, found at start by real attacks; a name = that one or nothing. ``unsafe`` is never
            chosen by ``auto``.
        stdlib_files: Let programs import the whole standard library from disk. Needs Landlock; a program can then also see which files
            exist outside (not read them).
        deadline_s: Seconds of wall time for one :meth:`run`; what has not ended by then is ``infra_error``. ``None`` = four times what the
            batch would take if every job used up its CPU time, and four wall limits.
    """

    def __init__(
        self,
        workers: int = 1,
        limits: Limits | None = None,
        preload: bool = True,
        tier: Tier = "auto",
        stdlib_files: bool = False,
        deadline_s: float | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"Sandbox.workers is {workers}; it must be at least 1")
        if tier not in ("auto", *CHAIN, "unsafe"):
            raise ValueError(f"Sandbox.tier is {tier!r}; choose one of auto, {', '.join(CHAIN)}, unsafe")
        if deadline_s is not None and not deadline_s > 0:
            raise ValueError(f"Sandbox.deadline_s is {deadline_s}; it must be positive")
        self.limits, self.deadline_s = limits or Limits(), deadline_s
        self._size, self._preload, self._asked = workers, preload, tier
        self._reading = _standard_library() if stdlib_files else ()
        self._workers: list[Worker] = []
        self._setups = Setups(zygote.FULL_MODULES if preload else zygote.LEAN_MODULES)
        self._lock, self._encoded = threading.Lock(), _CallBytes()
        self._owner: int | None = None
        self._report: TierReport | None = None
        self.retries = 0
        """Jobs repeated because of the infrastructure since the start."""

    @property
    def report(self) -> TierReport:
        """The isolation in force and its probe, for manifests; raises ``RuntimeError`` before :meth:`start`."""
        if self._report is None:
            raise RuntimeError("the sandbox is not started; call start() or use it as a context manager")
        return self._report

    @property
    def tier(self) -> str:
        """Name of the isolation in force; raises ``RuntimeError`` before :meth:`start`."""
        return self.report.tier

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the zygotes."""
        return [worker.pid for worker in self._workers]

    def start(self) -> None:
        """Find the strongest tier that holds against real attacks and start the zygotes in it; idempotent.

        Raises:
            RuntimeError: No tier works here, or not the one asked for. ``unsafe`` is never fallen back to.
        """
        if self._owner == os.getpid():
            return
        passed_over: dict[str, str] = {}
        for tier in CHAIN if self._asked == "auto" else (self._asked,):
            try:
                self._start(cast(ConcreteTier, tier), passed_over)
                _log.info("%s", self.report)
                return
            except (RuntimeError, OSError) as error:
                self.close()
                passed_over[tier] = str(error)
            except BaseException:
                self.close()
                raise
        reasons = "; ".join(f"{tier}: {why}" for tier, why in passed_over.items())
        raise RuntimeError(f"the sandbox refuses to run untrusted programs, no isolation holds here ({reasons})")

    def _start(self, tier: ConcreteTier, passed_over: dict[str, str]) -> None:
        if tier == "unsafe":
            _log.warning("The sandbox was asked to be unsafe: programs can read files, use the network and leave processes behind.")
        self._workers = [Worker(tier, self._preload, self._reading, cpu) for cpu in _cores(self._size)]
        for worker in self._workers:
            worker.spawn()
        for worker in self._workers:
            worker.wait_ready()
        self._owner = os.getpid()
        held, broke = self._probe(tier)
        landlock = min(worker.in_force["landlock"] for worker in self._workers)
        self._report = TierReport(tier, held, broke, dict(passed_over), landlock, bool(self._reading))

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Run all jobs over the workers; ``result[i]`` belongs to ``jobs[i]``.

        Raises:
            RuntimeError: Not started, or started by another process.
            ValueError: A call holds a value that cannot be passed.
        """
        return self._run(jobs, self.limits, self.deadline_s)

    def close(self) -> None:
        """End all zygotes; idempotent."""
        for worker in self._workers:
            worker.kill()
        self._workers = []
        self._owner = self._report = None

    def __enter__(self) -> Sandbox:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self, jobs: Sequence[Job], limits: Limits, deadline_s: float | None = None) -> list[Outcome]:
        self._require_started()
        with self._lock:
            batch = _Batch(jobs, limits, self._workers, self._encoded, self._setups, deadline_s)
            try:
                outcomes = batch.run()
            except BaseException:
                for worker in self._workers:
                    if worker.busy:
                        worker.kill()
                raise
            self.retries += batch.retries
            return outcomes

    def _probe(self, tier: ConcreteTier) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Every worker tries the attacks; in all tiers but ``unsafe`` none may get through. Returns those that failed and the others."""
        expected = with_reading(ATTACKS) if self._reading else ATTACKS
        probe = Job(PROBE, entry="held", calls=(Call(),))
        through: set[str] = set()
        for outcome in self._run([probe] * len(self._workers), Limits()):
            answers = outcome.outputs[0] if outcome.status == "ok" and outcome.outputs else None
            if not isinstance(answers, list) or len(answers) != len(ATTACKS):
                raise RuntimeError(
                    f"programs cannot be isolated, which needs seccomp filters ({outcome.status}: {outcome.error or answers})"
                )
            through |= {name for name, held in zip(ATTACKS, answers, strict=True) if held is not True and name in expected}
        if through and tier != "unsafe":
            raise RuntimeError(f"the isolation does not hold: {', '.join(sorted(through))} got through")
        return tuple(name for name in expected if name not in through), tuple(name for name in expected if name in through)

    def _require_started(self) -> None:
        if self._owner is None:
            raise RuntimeError("the sandbox is not started; call start() or use it as a context manager")
        if self._owner != os.getpid():
            raise RuntimeError("the sandbox was started by another process; make one Sandbox per process")


class _Batch:
    """One call of :meth:`Sandbox.run`: an event loop over the workers' control sockets, without threads."""

    def __init__(
        self,
        jobs: Sequence[Job],
        limits: Limits,
        workers: list[Worker],
        encoded: _CallBytes,
        setups: Setups,
        deadline_s: float | None,
    ) -> None:
        self._expected = [Expected(os.urandom(8).hex(), _output_count(job)) for job in jobs]
        self._setups = [setups.of(job) for job in jobs]
        self._jobs = [
            encode_job(job, encoded.of(job.calls), expected.token, setup)
            for job, expected, setup in zip(jobs, self._expected, self._setups, strict=True)
        ]
        self._limits, self._workers = limits, workers
        self._outcomes: list[Outcome | None] = [None] * len(jobs)
        self._waiting = deque((index, 1) for index in range(len(jobs)))
        self._given: dict[int, tuple[int, int]] = {}
        self._seconds = deadline_s if deadline_s is not None else 4 * (limits.wall_s + limits.cpu_s * len(jobs) / len(workers))
        self._deadline = time.monotonic() + self._seconds
        self.retries = 0

    def run(self) -> list[Outcome]:
        while self._waiting or self._given:
            if time.monotonic() >= self._deadline:
                self._give_up()
                break
            for number, worker in enumerate(self._workers):
                if self._waiting and not worker.busy:
                    self._hand_over(number, worker)
            self._collect()
        return [outcome for outcome in self._outcomes if outcome is not None]

    def _give_up(self) -> None:
        for number in self._given:
            self._workers[number].kill()
        late = Outcome("infra_error", error=f"the batch's deadline of {self._seconds:g} s")
        for index, _attempt in [*self._given.values(), *self._waiting]:
            self._outcomes[index] = late

    def _hand_over(self, number: int, worker: Worker) -> None:
        if not worker.alive:
            worker.spawn()
            worker.wait_ready()
        index, attempt = self._waiting.popleft()
        self._given[number] = (index, attempt)
        try:
            worker.submit(self._jobs[index], self._expected[index], self._limits, self._setups[index].prelude)
        except WorkerDied as death:
            self._lost(number, worker, str(death))

    def _collect(self) -> None:
        """Wait until a worker has something, then take all that is there."""
        poll = select.poll()
        numbers: dict[int, int] = {}
        for number in self._given:
            numbers[self._workers[number].fileno()] = number
            poll.register(self._workers[number], select.POLLIN)
        deadline = min((self._deadline, *(self._workers[number].deadline for number in self._given)))
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


def _output_count(job: Job) -> int | None:
    return None if job.entry is None else len(job.order or job.calls)


def _cores(workers: int) -> list[int | None]:
    """A core for each of several workers, other ranks of the machine taken into account; ``None`` where there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    first = int(os.environ.get("LOCAL_RANK", "0")) * workers
    if workers == 1 or first + workers > len(cores):
        return [None] * workers
    return [*cores[first : first + workers]]


def _standard_library() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple(sorted({os.path.realpath(paths["stdlib"]), os.path.realpath(paths["platstdlib"])}))


class _CallBytes:
    """``encode_calls`` once per tuple of calls, for the tuples that were used last; completions of one problem share theirs."""

    def __init__(self, size: int = 512) -> None:
        self._encoded: OrderedDict[int, tuple[tuple[Call, ...], bytes]] = OrderedDict()  # holds the tuples, so their ids stay theirs
        self._size = size

    def of(self, calls: tuple[Call, ...]) -> bytes:
        if id(calls) not in self._encoded:
            self._encoded[id(calls)] = (calls, encode_calls(calls))
            if len(self._encoded) > self._size:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(id(calls))
        return self._encoded[id(calls)][1]
