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
  with the scheduler's tick while a CPU timer runs), and that is subtracted from all CPU time that the harness caused.

CPU time is the kernel's account of this process, the fork server and every child, so other load on the machine matters little.
"""

from __future__ import annotations

import argparse
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


Run = Callable[[Sequence[Task]], list[float]]
"""Runs tasks, makes sure that every test passes, and returns the CPU seconds that each program measured of itself."""


def peer_run(tasks: Sequence[Task], cpu_s: int = 30) -> list[float]:
    """One interpreter per task."""
    own = []
    for task in tasks:
        text = json.dumps({"setup": task.job.setup_code, "program": task.job.program, "tests": task.asserts, "cpu_s": cpu_s})
        done = subprocess.run([sys.executable, "-c", HARNESS], input=text, capture_output=True, text=True, timeout=6 * cpu_s, check=True)
        report = json.loads(done.stdout.splitlines()[-1])
        if report["tests_passed"] != len(task.asserts):
            raise RuntimeError(f"peer: {task.name} fails ({report['error']}), so its time means nothing")
        own.append(report["own"])
    return own


def our_run(sandbox: Sandbox) -> Run:
    """The same through the sandbox, with the comparison that the grader makes."""

    def run(tasks: Sequence[Task]) -> list[float]:
        own = []
        for task, outcome in zip(tasks, sandbox.run([task.job for task in tasks]), strict=True):
            outputs, n = outcome.outputs or (), len(task.expected)
            if len(outputs) < n or not all(map(strict_equal, task.expected, outputs[:n])):
                raise RuntimeError(f"ours: {task.name} fails ({outcome.status}: {outcome.error}), so its time means nothing")
            own.append(outputs[n] if len(outputs) > n else 0.0)
        return own

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


def cpu_seconds(sandbox: Sandbox) -> float:
    """CPU time of this process, of its ended children, and of the sandbox's processes with theirs."""
    mine = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    ticks = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) in sandbox.worker_pids:
                ticks += sum(map(int, fields[11:15]))
    return mine + ticks / os.sysconf("SC_CLK_TCK")


def timed(run: Run, tasks: Sequence[Task], sandbox: Sandbox) -> tuple[float, float, list[float]]:
    """``(CPU seconds, wall seconds, the programs' own CPU seconds)``."""
    cpu, wall = cpu_seconds(sandbox), time.perf_counter()
    own = run(tasks)
    wall = time.perf_counter() - wall
    return cpu_seconds(sandbox) - cpu, wall, own


class Series:
    """Measurements of one case on both sides."""

    def __init__(self, case: str, unit: str, larger_is_better: bool, n: int) -> None:
        self.case, self.unit, self.larger_is_better, self.n = case, unit, larger_is_better, n
        self.ours: list[float] = []
        self.peer: list[float] = []

    def row(self) -> dict[str, Any]:
        """The case as it is written; the first round was the warm-up. ``ratio`` above 1: ours is better."""
        ours, peer = self.ours[1:], self.peer[1:]
        a, b = statistics.median(ours), statistics.median(peer)
        return {
            "case": self.case,
            "ours": round(a, 4),
            "peer": round(b, 4),
            "ratio": round(a / b if self.larger_is_better else b / a, 3),
            "unit": self.unit,
            "n": self.n,
            "rounds": len(ours),
            "ours_range": [round(min(ours), 4), round(max(ours), 4)],
            "peer_range": [round(min(peer), 4), round(max(peer), 4)],
        }


def measure(tasks: Sequence[Task], rounds: int, ours_n: int = 400, peer_n: int = 40) -> tuple[list[dict[str, Any]], str]:
    """All cases, and the isolation under which ours ran."""
    throughput = Series("throughput", "programs per CPU minute", True, ours_n)
    wall = Series("throughput, wall", "programs per minute, one at a time", True, ours_n)
    latency = Series("latency", "ms", False, 20)
    overhead = Series("overhead", "CPU ms per execution beyond the program's own", False, len(tasks))
    with Sandbox(workers=1, limits=Limits(cpu_s=30.0, wall_s=180.0)) as sandbox:
        ours = our_run(sandbox)
        for number in range(rounds + 1):
            for run, n, side in ((ours, ours_n, "ours"), (peer_run, peer_n, "peer")):
                cpu_s, wall_s, _ = timed(run, two_sum_tasks(1000 * number, n), sandbox)
                getattr(throughput, side).append(60 * n / cpu_s)
                getattr(wall, side).append(60 * n / wall_s)
                single = [timed(run, two_sum_tasks(1000 * number + 500 + k, 1), sandbox)[1] for k in range(latency.n)]
                getattr(latency, side).append(1e3 * statistics.median(single))
                cpu_s, _, own = timed(run, tasks, sandbox)
                getattr(overhead, side).append(1e3 * (cpu_s - sum(own)) / len(tasks))
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
