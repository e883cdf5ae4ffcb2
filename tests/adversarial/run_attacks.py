"""Grades every attack and says what went wrong: a wrong label, a payment, a survivor, a file, a poisoned next grade, a lost worker.

``python tests/adversarial/run_attacks.py [TIER [EVERY [FIRST]]]`` prints one JSON object; the tests run it as root and as an
unprivileged user.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import more_programs  # noqa: F401  # adds to ATTACKS
from programs import ATTACKS, MARKER, RIGHT, fenced

from theodolite.datamodules.leetcode.grading import Grader
from theodolite.datamodules.leetcode.problem import Problem, TestCase
from theodolite.sandbox import Limits

DOUBLE = Problem(
    id="double",
    prompt="",
    entry="Solution().double",
    tests=tuple(TestCase((), {"x": x}, 2 * x) for x in (0, 1, 3, -7, 10, 9)),
    reference=fenced(RIGHT),
    style="fenced",
    setup_code="from typing import *\nfrom math import *\n",
)
LIMITS = Limits(cpu_s=0.25, wall_s=60.0, memory_mb=256, output_kb=1024)


def sessions(leaders: list[int]) -> set[int]:
    """Living processes of the workers' sessions, read from the kernel."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split() if entry.name.isdigit() else None
        except OSError:
            continue
        if fields and int(fields[3]) in leaders and fields[0] != "Z":
            found.add(int(entry.name))
    return found


def left_behind() -> list[str]:
    """Files of ours where an attack may have written."""
    places = (Path("/var/tmp"), Path("/dev/shm"), Path("/"), Path.cwd())
    return [str(place / MARKER) for place in places if (place / MARKER).exists()]


def attack(grader: Grader, name: str) -> list[str]:
    """What is wrong after one attack; empty when everything held."""
    expected = ATTACKS[name]
    workers = grader.sandbox.worker_pids
    before, retries, started = sessions(workers), grader.sandbox.retries, time.monotonic()
    report = grader.report([DOUBLE], [expected.completion])[0]
    verdict, paid = report.grade.verdict, report.grade.reward.passed
    after = grader.report([DOUBLE], [fenced(f"{RIGHT}\n# after {name.encode('ascii', 'replace').decode()}")])[0]
    checks = {
        f"label {verdict.label} instead of {expected.label}": verdict.label == expected.label,
        f"correct is {verdict.correct}": verdict.correct == expected.label.startswith("correct"),
        f"paid is {paid}": paid == expected.paid,
        f"status {verdict.status} instead of {'/'.join(expected.statuses)}": verdict.status in expected.statuses,
        f"the next grade is {after.grade.verdict}": after.grade.verdict.label == "correct",
        "a worker was lost": grader.sandbox.worker_pids == workers and grader.sandbox.retries == retries,
        "a process survives": sessions(workers) == before,
        f"took {time.monotonic() - started:.1f} s": time.monotonic() - started < 45,
        f"left {left_behind()}": not left_behind(),
    }
    return [f"{name}: {what} ({report.error})" for what, held in checks.items() if not held]


def main(tier: Any = "auto", every: str = "1", first: str = "0") -> dict[str, Any]:
    """Run all attacks, or each ``every``-th from number ``first`` on, on one isolation tier."""
    names = list(ATTACKS)[int(first) :: int(every)]
    grader = Grader(1, LIMITS, tier=tier)
    grader.start()
    try:
        wrong = [problem for name in names for problem in attack(grader, name)]
        return {"tier": grader.sandbox.tier, "uid": os.getuid(), "attacks": len(names), "wrong": wrong}
    finally:
        grader.close()


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
