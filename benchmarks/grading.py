"""What isolation costs: our sandbox beside a harness that starts one interpreter per execution, alternating in one process tree.

    make bench-grading [JSON=FILE] [PROBLEMS=FILE.jsonl]
    python benchmarks/grading.py [--json FILE] [--problems FILE.jsonl] [--rounds 5]

The peer is written here, after the public reward-hacking environment: ``python -c HARNESS`` per execution, the job on standard input,
limits on address space and CPU time, an alarm, and then prelude, completion and every test in that one process, the tests as the assert
statements that the data set holds, each compiled and run in turn. It reports JSON as its last line of output, and isolates nothing. Ours
gets the same programs and tests, runs them in a locked-down process, and compares the outputs outside.

Cases, each the median over the rounds after one warm-up round:

* ``throughput``: programs per minute of one core's CPU time, for a fresh two-sum program with 10 inputs;
* ``throughput, wall``: the same by the clock, one program at a time (says more about the machine's other load);
* ``latency``: milliseconds from handing over one such program to its verdict;
* ``overhead``: CPU milliseconds per execution beyond the program's own, over real problems with all their tests. The program times itself
  (``time.thread_time`` around its definition and every call, the cost of reading that clock included; the process-wide clock only moves
  with the scheduler's tick while a CPU timer runs), and that is subtracted from all CPU time that the harness caused. Of each program's
  rounds the median counts.

CPU time is the kernel's account, finer than its ticks, of this process, the fork server and every child. Other load on the machine still
matters: it empties caches, and both sides then take longer. ``ours_range`` and ``peer_range`` are the rounds' least and greatest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theodolite.datamodules.leetcode.asserts import strict_equal
from theodolite.datamodules.leetcode.jsonl import parse_row
from theodolite.sandbox import Call, Job, Limits, Sandbox

HARNESS = """
import json, resource, signal, sys
def alarm(*_):
    raise TimeoutError
job = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (job["cpu_s"], job["cpu_s"]))
signal.signal(signal.SIGALRM, alarm)
signal.alarm(job["cpu_s"])
namespace = {}
passed, error = 0, None
try:
    exec(job["setup"], namespace)
    exec(job["program"], namespace)
    for test in job["tests"]:
        exec(test, namespace)
        passed += 1
except BaseException as caught:
    error = repr(caught)
print(json.dumps({"tests_passed": passed, "error": error, "own": namespace.get("_own", [0.0])[0]}))
"""
"""The peer's program."""

TIMED = """
from time import thread_time as _clock
_started = _clock()
_reading = sorted(_clock() - _clock() for _ in range(25))[12]
{program}
_own = [_clock() - _started]
def _entry(_finish=False, **arguments):
    if _finish:
        return _own[0]
    started = _clock()
    try:
        return {entry}(**arguments)
    finally:
        _own[0] += _clock() - started - _reading
"""


@dataclass(frozen=True)
class Task:
    """One program with its tests, for either side.

    Attributes:
        name: For messages.
        job: For the sandbox; in a timed program the last call returns its own CPU seconds.
        expected: What the calls must return, the last one of a timed program excepted.
        asserts: The tests as the peer runs them.
    """

    name: str
    job: Job
    expected: tuple[Any, ...]
    asserts: tuple[str, ...]


@dataclass(frozen=True)
class Ran:
    """One execution. ``own_s``: what the program measured of itself; ``process_s``: CPU time of its process, start and end included."""

    own_s: float
    process_s: float


Run = Callable[[Sequence[Task]], list[Ran]]
"""Runs tasks, one after the other, and makes sure that every test passes."""


def peer_run(tasks: Sequence[Task], cpu_s: int = 30) -> list[Ran]:
    """One interpreter per task."""
    ran = []
    for task in tasks:
        text = json.dumps({"setup": task.job.setup_code, "program": task.job.program, "tests": task.asserts, "cpu_s": cpu_s})
        before = children_s()
        done = subprocess.run([sys.executable, "-c", HARNESS], input=text, capture_output=True, text=True, timeout=6 * cpu_s, check=True)
        report = json.loads(done.stdout.splitlines()[-1])
        if report["tests_passed"] != len(task.asserts):
            raise RuntimeError(f"peer: {task.name} fails ({report['error']}), so its time means nothing")
        ran.append(Ran(report["own"], children_s() - before))
    return ran


def our_run(sandbox: Sandbox) -> Run:
    """The same through the sandbox, with the comparison that the grader makes."""

    def run(tasks: Sequence[Task]) -> list[Ran]:
        ran = []
        for task, outcome in zip(tasks, sandbox.run([task.job for task in tasks]), strict=True):
            outputs, n = outcome.outputs or (), len(task.expected)
            if len(outputs) < n or not all(map(strict_equal, task.expected, outputs[:n])):
                raise RuntimeError(f"ours: {task.name} fails ({outcome.status}: {outcome.error}), so its time means nothing")
            ran.append(Ran(outputs[n] if len(outputs) > n else 0.0, outcome.cpu_s))
        return ran

    return run


def two_sum_tasks(first: int, n: int) -> list[Task]:
    """``n`` programs that differ in text, each with 10 inputs of 8 numbers."""
    program = (
        "def solve(numbers, target):\n    seen = {{}}\n    for i, x in enumerate(numbers):\n        if target - x in seen:\n"
        "            return [seen[target - x], i]\n        seen[x] = i\n    return []  # {}\n"
    )
    inputs = [(list(range(k, k + 8)), 2 * k + 11) for k in range(10)]
    calls = tuple(Call(arguments) for arguments in inputs)
    asserts = tuple(f"assert solve({numbers}, {target}) == [5, 6]" for numbers, target in inputs)
    return [Task("two sum", Job(program.format(first + k), "solve", calls), ([5, 6],) * 10, asserts) for k in range(n)]


def real_tasks(path: Path) -> list[Task]:
    """Canonical solutions with all their tests, timing themselves."""
    tasks = []
    for line in path.read_text(encoding="utf-8").splitlines():
        raw = json.loads(line)
        row = parse_row(raw)
        calls = (*(Call(test.args, test.kwargs) for test in row.tests), Call((), {"_finish": True}))
        job = Job(TIMED.format(program=row.solution, entry=row.entry), "_entry", calls, row.setup_code)
        dropped = {position for position, _ in row.dropped_tests}
        asserts = [text.replace(f"assert {row.entry}(", "assert _entry(", 1) for k, text in enumerate(raw["gt_answer"]) if k not in dropped]
        tasks.append(Task(f"problem {row.id}", job, tuple(test.expected for test in row.tests), tuple(asserts)))
    return tasks


def children_s() -> float:
    """CPU seconds of this process's ended children, and of theirs."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def servers(sandbox: Sandbox) -> list[int]:
    """The fork servers and what wraps them: every process of the workers' sessions."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.getsid(int(entry.name)) in sandbox.worker_pids:
                found.append(int(entry.name))
    return found


def harness_s(pids: Sequence[int]) -> float:
    """CPU seconds of this process and of the processes ``pids``, without their children; the kernel's count in nanoseconds."""
    return time.process_time() + sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)  # 2: all that the scheduler gave the process


def timed(run: Run, tasks: Sequence[Task], pids: Sequence[int]) -> tuple[float, float, list[Ran]]:
    """``(CPU seconds of the harness, wall seconds, the executions)``."""
    cpu, wall = harness_s(pids), time.perf_counter()
    ran = run(tasks)
    return harness_s(pids) - cpu, time.perf_counter() - wall, ran


class Series:
    """Measurements of one case on both sides."""

    def __init__(self, case: str, unit: str, larger_is_better: bool, n: int) -> None:
        self.case, self.unit, self.larger_is_better, self.n = case, unit, larger_is_better, n
        self.ours: list[float] = []
        self.peer: list[float] = []

    def row(self) -> dict[str, Any]:
        """The case as it is written; the first round was the warm-up. ``ratio`` above 1: ours is better."""
        ours, peer = self.ours[1:], self.peer[1:]
        return self.compared(statistics.median(ours), statistics.median(peer))

    def compared(self, ours: float, peer: float) -> dict[str, Any]:
        """The row for these two values."""
        return {
            "case": self.case,
            "ours": round(ours, 4),
            "peer": round(peer, 4),
            "ratio": round(ours / peer if self.larger_is_better else peer / ours, 3),
            "unit": self.unit,
            "n": self.n,
            "rounds": len(self.ours) - 1,
            "ours_range": [round(min(self.ours[1:]), 4), round(max(self.ours[1:]), 4)],
            "peer_range": [round(min(self.peer[1:]), 4), round(max(self.peer[1:]), 4)],
        }


class Overhead(Series):
    """CPU time that programs did not measure themselves. Each program's is its median over the rounds.

    A round's sum would not do: the programs themselves take ten times what is looked for, and one that is disturbed for 1 % of its time
    shows more than ten others cost.
    """

    def __init__(self, tasks: int) -> None:
        super().__init__("overhead", "CPU ms per execution beyond the program's own", False, tasks)
        self.harness: dict[str, list[float]] = {"ours": [], "peer": []}
        self.beyond: dict[str, list[list[float]]] = {"ours": [], "peer": []}

    def add(self, side: str, harness_s: float, ran: Sequence[Ran]) -> None:
        """One round of one side."""
        beyond = [1e3 * (one.process_s - one.own_s) for one in ran]
        harness = 1e3 * harness_s / len(ran)
        self.beyond[side].append(beyond)
        self.harness[side].append(harness)
        getattr(self, side).append(harness + statistics.mean(beyond))

    def row(self) -> dict[str, Any]:
        """As :meth:`Series.row`; the ranges are those of whole rounds."""
        return self.compared(self._typical("ours"), self._typical("peer"))

    def _typical(self, side: str) -> float:
        programs = zip(*self.beyond[side][1:], strict=True)
        return statistics.median(self.harness[side][1:]) + statistics.mean(map(statistics.median, programs))


def measure(tasks: Sequence[Task], rounds: int, ours_n: int = 400, peer_n: int = 40) -> tuple[list[dict[str, Any]], str]:
    """All cases, and the isolation under which ours ran."""
    throughput = Series("throughput", "programs per CPU minute", True, ours_n)
    wall = Series("throughput, wall", "programs per minute, one at a time", True, ours_n)
    latency = Series("latency", "ms", False, 20)
    overhead = Overhead(len(tasks))
    with Sandbox(workers=1, limits=Limits(cpu_s=30.0, wall_s=180.0)) as sandbox:
        ours, pids = our_run(sandbox), servers(sandbox)
        for number in range(rounds + 1):
            for run, n, side in ((ours, ours_n, "ours"), (peer_run, peer_n, "peer")):
                cpu_s, wall_s, ran = timed(run, two_sum_tasks(1000 * number, n), pids)
                getattr(throughput, side).append(60 * n / (cpu_s + sum(one.process_s for one in ran)))
                getattr(wall, side).append(60 * n / wall_s)
                single = [timed(run, two_sum_tasks(1000 * number + 500 + k, 1), pids)[1] for k in range(latency.n)]
                getattr(latency, side).append(1e3 * statistics.median(single))
                cpu_s, _, ran = timed(run, tasks, pids)
                overhead.add(side, cpu_s, ran)
        return [series.row() for series in (throughput, wall, latency, overhead)], str(sandbox.report)


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--problems", type=Path, help="real problems in the schema of datamodules/leetcode/jsonl.py")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after the warm-up")
    options = parser.parse_args()
    path = options.problems or next(Path(__file__).resolve().parents[2].glob("*/data/leetcode_medhard_60.jsonl"), None)
    if path is None or not path.is_file() or options.rounds < 1:
        parser.error("give real problems with --problems FILE.jsonl, and at least 1 round")
    rows, report = measure(real_tasks(path), options.rounds)
    print(report)
    for row in rows:
        spread = f"ours {row['ours_range'][0]:g}..{row['ours_range'][1]:g}, peer {row['peer_range'][0]:g}..{row['peer_range'][1]:g}"
        sides = f"ours {row['ours']:>9g}  peer {row['peer']:>8g}  ratio {row['ratio']:>6g}"
        print(f"{row['case']:<17} {sides}  {row['unit']} (n={row['n']}; {spread})")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
