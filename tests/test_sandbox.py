"""The sandbox by itself: values cross exactly, limits hold, nothing survives, lost workers cost nothing but a retry."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theodolite.sandbox import Call, Job, Limits, Opaque, Outcome, Raised, Sandbox, codec, messages, worker

LIMITS = Limits(cpu_s=0.4, wall_s=20.0, memory_mb=128, output_kb=64)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2, limits=LIMITS) as running:
        yield running


def works(tier: Any) -> bool:
    try:
        with Sandbox(tier=tier):
            return True
    except RuntimeError:
        return False


TIERS = [
    pytest.param(t, marks=pytest.mark.skipif(not works(t), reason=f"{t} does not work here")) for t in ("bwrap", "namespaces", "seccomp")
]


def one(sandbox: Sandbox, program: str, *args: object) -> Outcome:
    return sandbox.run([Job(textwrap.dedent(program), entry="f", calls=(Call(args),))])[0]


def output_of(sandbox: Sandbox, program: str, *args: object) -> Any:
    outcome = one(sandbox, program, *args)
    assert outcome.status == "ok", outcome
    assert outcome.outputs is not None
    return outcome.outputs[0]


def session_members(session: int) -> set[int]:
    """Every process of a session, read from the kernel."""
    members = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                members.add(int(entry.name))
    return members


def true_within(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def gone_within(pids: set[int]) -> bool:
    return true_within(lambda: not any(session_members(pid) for pid in pids))


# -- values ------------------------------------------------------------------------------------------------------------------------


def same(a: object, b: object) -> bool:
    """Independent of strict_equal: repr tells types, signed zeros and NaN apart."""
    return repr(a) == repr(b) and type(a) is type(b)


SCALARS = st.none() | st.booleans() | st.integers() | st.integers(-(2**200), 2**200) | st.floats() | st.text(st.characters()) | st.binary()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=25, deadline=None)
@given(values=st.lists(VALUES, min_size=1, max_size=6))
def test_any_plain_value_crosses_the_border_both_ways_with_its_exact_type(sandbox, values):
    calls = tuple(Call((v,), {"again": v}) for v in values)
    (outcome,) = sandbox.run([Job("def f(x, again): return (x, again)", entry="f", calls=calls)])
    assert outcome.outputs is not None
    for value, output in zip(values, outcome.outputs, strict=True):
        assert same(output, (value, value))


@pytest.mark.parametrize(
    "value",
    [{1, 2.5, "a"}, frozenset({(1, 2), None}), set(), -0.0, math.inf, -math.inf, 10**5000, "\ud800\udc00x"],
    ids=lambda value: str(type(value)),
)
def test_special_values_cross_exactly(sandbox, value):
    output = output_of(sandbox, "def f(x): return x", value)
    assert type(output) is type(value)
    assert output == value
    assert math.copysign(1, output) == math.copysign(1, value) if isinstance(value, float) else True


@pytest.mark.parametrize(
    ("expression", "type_name"),
    [
        ("object()", "object"),
        ("type('int', (int,), {})(3)", "int"),
        ("__import__('collections').Counter('aab')", "Counter"),
        ("1j", "complex"),
        ("(i for i in [1])", "generator"),
    ],
)
def test_a_value_of_another_type_is_opaque_whatever_it_calls_itself(sandbox, expression, type_name):
    output = output_of(sandbox, f"def f(): return {expression}")
    assert isinstance(output, Opaque)
    assert output.type_name == type_name
    assert output != 3


def test_too_deep_and_cyclic_values_raise_in_the_child_only(sandbox):
    deep = output_of(sandbox, "def f():\n x = []\n for _ in range(10**5): x = [x]\n return x")
    cyclic = output_of(sandbox, "def f():\n x = []\n x.append(x)\n return x")
    assert isinstance(deep, Raised)
    assert isinstance(cyclic, Raised)


def test_an_argument_that_cannot_cross_is_refused_before_anything_runs(sandbox):
    with pytest.raises(ValueError, match="object"):
        sandbox.run([Job("def f(x): return 1", entry="f", calls=(Call(([object()],)),))])


def test_calls_do_not_share_arguments_and_results_are_taken_at_once(sandbox):
    program = "seen = []\ndef f(x):\n x.append(1)\n seen.append(len(x))\n return seen"
    shared = [0]
    (outcome,) = sandbox.run([Job(program, entry="f", calls=(Call((shared,)), Call((shared,))))])
    assert outcome.outputs == ([2], [2, 2])
    assert shared == [0]


def test_entry_may_be_a_method_on_a_fresh_object_per_call(sandbox):
    program = "class S:\n def __init__(self): self.n = 0\n def m(self, k):\n  self.n += k\n  return self.n"
    (outcome,) = sandbox.run([Job(program, entry="S().m", calls=(Call((), {"k": 1}), Call((), {"k": 1})))])
    assert outcome.outputs == (1, 1)


def test_setup_code_runs_first_in_the_same_namespace_and_future_imports_do_not_leak(sandbox):
    program = "def f(x: List[int]): return inf, f.__annotations__['x'] is List[int]"
    (outcome,) = sandbox.run([Job(program, entry="f", calls=(Call((1,)),), setup_code="from typing import *\ninf = float('inf')")])
    assert outcome.outputs == ((math.inf, True),)


def test_results_keep_the_order_of_the_jobs_over_workers(sandbox):
    jobs = [Job(f"def f(): return {i} + sum(range({(37 * i) % 50} * 200)) * 0", entry="f", calls=(Call(),)) for i in range(60)]
    assert [o.outputs for o in sandbox.run(jobs)] == [(i,) for i in range(60)]


@pytest.mark.parametrize(("program", "returned"), [("def t(): return 0", True), ("def t(): assert 0", False), ("", False)])
def test_an_invoked_expression_reports_whether_it_returned(sandbox, program, returned):
    assert sandbox.run([Job(program, invoke="t()")])[0].returned is returned


def test_randomness_and_set_order_do_not_depend_on_the_worker():
    program = "import random\ndef f(): return [random.random(), list({'a', 'b', 'c', 'd'}), random.sample(range(99), 5)]"
    with Sandbox(workers=2, limits=LIMITS) as first, Sandbox(workers=1, limits=LIMITS, preload=False) as second:
        outcomes = [*first.run([Job(program, entry="f", calls=(Call(),))] * 4), *second.run([Job(program, entry="f", calls=(Call(),))])]
    assert len({repr(o.outputs) for o in outcomes}) == 1


# -- hostile programs --------------------------------------------------------------------------------------------------------------

HOSTILE = {
    "syntax error": ("def f(:", "syntax_error"),
    "null byte": ("def f(): return 1\0", "syntax_error"),
    "lone surrogate": ("x = '\ud800'\ndef f(): return 1", "syntax_error"),
    "parser depth": ("x = " + "(" * 5000, "syntax_error"),
    "compiler depth": ("x = " + "-" * 100_000 + "1", "syntax_error"),
    "infinite loop": ("while True: pass", "timeout"),
    "loop that swallows everything": ("while True:\n try:\n  while True: pass\n except BaseException: pass", "timeout"),
    "loop in C code": ("10 ** 10 ** 9", "timeout"),
    "memory bomb": ("x = [0] * 10**10", "memory"),
    "growing memory": ("x = []\nwhile True: x.append(bytearray(10**6))", "memory"),
    "os._exit": ("import os; os._exit(0)", "tamper"),
    "sys.exit": ("import sys; sys.exit(0)", "runtime_error"),
    "closes its descriptors": ("import os; os.closerange(0, 100)\ndef f(): return 1", "tamper"),
    "forged answer": ("import os\nos.write(4, b'{\"status\": \"ok\", \"outputs\": [[1]]}')\ndef f(): return 2", "tamper"),
    "forged infrastructure failure": ("import os; os.kill(os.getpid(), 10)", "runtime_error"),
    "forged status": ("import os\nos.write(4, b'{\"status\": \"infra_error\"}'); os._exit(0)", "tamper"),
    "answer nested too deep": ("import os\nos.write(4, b'[' * 60000); os._exit(0)", "tamper"),
    "answer with a huge number": (
        "import os\nos.write(4, b'{\"status\":\"ok\",\"outputs\":[[' + b'9'*9999 + b']]}'); os._exit(0)",
        "tamper",
    ),
    "answer larger than allowed": ("def f(): return 'a' * 10**6", "output_limit"),
    "answer flood": ("import os\nwhile True: os.write(4, b'x' * 10000)", "tamper"),
    "null pointer": ("import ctypes; ctypes.string_at(0)", "runtime_error"),
    "fork": ("import os; os.fork()", "runtime_error"),
    "fork bomb": ("import os\nwhile True:\n try: os.fork()\n except OSError: pass", "timeout"),
    "thread": ("import threading; threading.Thread(target=print).start()", "runtime_error"),
    "deadlock": ("import threading; l = threading.Lock(); l.acquire(); l.acquire()", "runtime_error"),
    "exec": ("import os; os.execv('/bin/sh', ['sh', '-c', 'sleep 60'])", "runtime_error"),
    "subprocess": ("import subprocess", "runtime_error"),
    "socket": ("import socket; socket.socket()", "runtime_error"),
    "read a file": ("open('/proc/self/environ').read()", "runtime_error"),
    "write a file": ("open('sandbox-was-here', 'w').write('x')", "runtime_error"),
    "remove a file": ("import os; os.unlink('/dev/null')", "runtime_error"),
    "change a mode": ("import os; os.chmod('/dev/null', 0)", "runtime_error"),
    "kill the zygote": ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", "runtime_error"),
    "kill everything": ("import os, signal; os.kill(-1, signal.SIGKILL)", "runtime_error"),
    "signal through fcntl": ("import fcntl, os; fcntl.fcntl(0, 8, os.getppid())", "runtime_error"),
    "raise its limits": ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "runtime_error"),
    "ignore the timer": ("import signal; signal.signal(signal.SIGPROF, signal.SIG_IGN)", "runtime_error"),
    "stop the timer": ("import signal; signal.setitimer(signal.ITIMER_PROF, 0)", "runtime_error"),
    "import what is not there": ("import numpy", "runtime_error"),
}  # fmt: skip


STACK = "import sys; sys.setrecursionlimit(10**9)\ng = lambda x: [*map(g, [x])]\ng(1)"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_gets_its_status_and_leaves_nothing_behind(sandbox, name):
    assert_contained(sandbox, *HOSTILE[name])


def test_a_c_stack_overflow_is_an_error_of_the_program():
    with Sandbox(limits=Limits(cpu_s=20.0, wall_s=60.0, memory_mb=128)) as patient:  # filling a stack takes 0.4 s on a busy machine
        assert_contained(patient, STACK, "runtime_error")


def assert_contained(sandbox: Sandbox, program: str, status: str) -> None:
    zygotes = sandbox.worker_pids
    before = {pid: session_members(pid) for pid in zygotes}  # with bubblewrap a worker is three processes
    retries = sandbox.retries
    started = time.monotonic()
    outcome = one(sandbox, program)
    assert outcome.status == status, outcome
    assert time.monotonic() - started < 30
    assert one(sandbox, "def f(x): return [x]", 5).outputs == ([5],)
    assert sandbox.worker_pids == zygotes
    assert sandbox.retries == retries
    assert {pid: session_members(pid) for pid in zygotes} == before
    assert not Path("sandbox-was-here").exists()
    assert not Path("/sandbox-was-here").exists()


HARMLESS = {
    "sleeping passes at once": "import time\ntime.sleep(3600)\ndef f(): return 1",
    "printing megabytes is discarded": "print('x' * 10**7)\ndef f(): return 1",
    "reading standard input sees its end": "import sys\ndef f(): return 1 if sys.stdin.read() == '' else 2",
    "writing to descriptor 1 is discarded": "import os\nos.write(1, b'{}')\ndef f(): return 1",
    "an exception whose message raises": "class E(Exception):\n def __str__(self): 1/0\ndef f():\n try: raise E\n except E: return 1",
    "a main guard stays closed": "if __name__ == '__main__': raise ValueError\ndef f(): return 1",
    "a dataclass with string annotations": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n x: int\ndef f(): return A(1).x"
    ),
    "deep recursion": "import sys\nsys.setrecursionlimit(10**6)\ndef g(n): return 1 if n == 0 else g(n - 1)\ndef f(): return g(20000)",
    "a patched json module of its own": "import json\njson.loads = None\ndef f(): return 1",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_an_odd_but_honest_program_still_answers(sandbox, name):
    started = time.monotonic()
    outcome = one(sandbox, HARMLESS[name])
    assert outcome.outputs == (1,), outcome
    assert time.monotonic() - started < 30


def test_one_program_leaves_no_trace_for_the_next():
    poison = (
        "import builtins, sys, json, random\nbuiltins.len = lambda x: 7\nsys.modules['math'] = 3\nrandom.seed(5)\ndef f(): return len([])"
    )
    clean = "import math, random\ndef f(): return [len([]), math.pi, random.random()]"
    with Sandbox(workers=1, limits=LIMITS) as sandbox:
        before = one(sandbox, clean)
        assert one(sandbox, poison).status == "ok"
        assert one(sandbox, clean).outputs == before.outputs


def test_nothing_of_the_parent_is_in_the_child(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "x")
    program = "import os, sys\ndef f(): return [sorted(os.environ), 'torch' in sys.modules, 'theodolite' in sys.modules]"
    with Sandbox(limits=LIMITS) as fresh:
        environment, *loaded = output_of(fresh, program)
    assert loaded == [False, False]
    assert "SECRET_OF_THE_PARENT" not in environment
    assert set(environment) <= {"PYTHONHASHSEED", "LC_CTYPE"}


def test_hashing_collisions_cannot_stall_the_parent(sandbox):
    modulus = sys.hash_info.modulus
    colliding = {"s": list(range(0, 30_000 * modulus, modulus))}
    started = time.process_time()
    with pytest.raises(ValueError, match="entries"):
        codec.from_wire(colliding)
    assert time.process_time() - started < 1


# -- failures of the infrastructure ------------------------------------------------------------------------------------------------


def signal_soon(pid: int, number: int, delay: float) -> threading.Timer:
    timer = threading.Timer(delay, os.kill, (pid, number))
    timer.start()
    return timer


def test_a_killed_zygote_costs_a_retry_and_no_answer():
    with Sandbox(tier="seccomp", workers=2, limits=LIMITS) as sandbox:
        jobs = [Job(f"def f(): return {i} + 0 * sum(range(10**6))", entry="f", calls=(Call(),)) for i in range(40)]
        victim = sandbox.worker_pids[0]
        timer = signal_soon(victim, signal.SIGKILL, 0.15)
        outcomes = sandbox.run(jobs)
        timer.join()
        assert [o.outputs for o in outcomes] == [(i,) for i in range(40)]
        assert sandbox.retries <= 1  # none if it was between two jobs
        assert victim not in sandbox.worker_pids
        assert gone_within({victim})


def test_a_zygote_killed_between_batches_is_replaced_without_a_retry():
    with Sandbox(tier="seccomp", limits=LIMITS) as sandbox:
        victim = sandbox.worker_pids[0]
        os.kill(victim, signal.SIGKILL)
        assert gone_within({victim})
        assert one(sandbox, "def f(): return 1").outputs == (1,)
        assert sandbox.retries == 0


def test_a_stopped_zygote_is_replaced_and_its_job_retried():
    with Sandbox(tier="seccomp", limits=Limits(cpu_s=0.2, wall_s=1.0)) as sandbox:
        sandbox._workers[0]._grace_s = 0.3
        victim = sandbox.worker_pids[0]
        os.kill(victim, signal.SIGSTOP)
        assert one(sandbox, "def f(): return 1").outputs == (1,)
        assert sandbox.retries == 1
        assert gone_within({victim})


def test_a_wall_limit_with_little_cpu_is_retried_then_infra_error_and_never_a_timeout():
    with Sandbox(tier="seccomp", limits=Limits(cpu_s=0.4, wall_s=0.5)) as sandbox:
        zygote = sandbox.worker_pids[0]
        done = threading.Event()

        def stall():  # whatever child appears is frozen, as on a machine that stalls
            while not done.is_set():
                for child in session_members(zygote) - {zygote}:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGSTOP)
                time.sleep(0.002)

        thread = threading.Thread(target=stall, daemon=True)
        thread.start()
        outcome = one(sandbox, "while True: pass")
        done.set()
        thread.join()
        assert outcome.status == "infra_error"
        assert sandbox.retries == 1
        assert session_members(zygote) == {zygote}


@pytest.mark.parametrize(
    ("status", "cpu_s", "killed", "expected"),
    [
        (signal.SIGPROF, 2.0, 0, "timeout"),
        (signal.SIGKILL, 2.0, 1, "timeout"),
        (signal.SIGKILL, 0.1, 1, "infra_error"),
        (signal.SIGKILL, 0.1, 0, "infra_error"),
        (signal.SIGSEGV, 0.1, 0, "runtime_error"),
        (signal.SIGUSR1, 0.0, 0, "infra_error"),
        (-1, 0.0, 0, "infra_error"),
        (0, 0.1, 0, "tamper"),
    ],
)
def test_too_slow_is_a_matter_of_cpu_time(status, cpu_s, killed, expected):
    assert messages.judge((int(status), cpu_s, 10.0, 0, killed), b"", Limits(), messages.Expected("", 1)).status == expected


def run_and_report(body: str) -> subprocess.Popen[str]:
    script = f"import sys, time\nfrom theodolite.sandbox import *\n{textwrap.dedent(body)}"
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("while_running", [True, False])
def test_a_parent_killed_with_9_leaves_no_process(while_running, tier):
    parent = run_and_report(f"""
        sandbox = Sandbox(workers=2, limits=Limits(cpu_s=60, wall_s=100), tier="{tier}")
        sandbox.start()
        print(*sandbox.worker_pids, flush=True)
        {'sandbox.run([Job("while True: pass", invoke="1")] * 4)' if while_running else "time.sleep(60)"}
    """)
    try:
        assert parent.stdout is not None
        zygotes = {int(pid) for pid in parent.stdout.readline().split()}
        assert len(zygotes) == 2
        idle = {"seccomp": 1, "namespaces": 2, "bwrap": 3}[tier]
        assert true_within(lambda: all(len(session_members(pid)) == idle + while_running for pid in zygotes))
    finally:
        parent.kill()
        parent.communicate(timeout=10)
    assert gone_within(zygotes)


def test_a_zygote_started_in_a_thread_outlives_the_thread():
    sandbox = Sandbox(limits=LIMITS)
    thread = threading.Thread(target=sandbox.start)
    thread.start()
    thread.join()
    pids = sandbox.worker_pids
    assert one(sandbox, "def f(): return 1").outputs == (1,)
    assert sandbox.worker_pids == pids
    sandbox.close()
    assert gone_within(set(pids))


# -- fail closed -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("raise OSError('no seccomp here')", "cannot be isolated"),
        ("return", "does not hold.*got through"),
    ],
)
def test_start_refuses_when_the_lock_down_fails_or_does_not_hold(tmp_path, monkeypatch, damage, message):
    copy = shutil.copytree(worker._SCRIPT.parent, tmp_path / "sandbox")
    source = (copy / "lockdown.py").read_text()
    marker = "        prctl, getppid, setrlimit, setitimer, filtered = self._steps\n"
    assert marker in source
    (copy / "lockdown.py").write_text(source.replace(marker, f"        {damage}\n{marker}"))
    monkeypatch.setattr(worker, "_SCRIPT", copy / "zygote.py")
    sandbox = Sandbox(limits=LIMITS)  # every tier is tried, none holds, and unsafe is not fallen back to
    with pytest.raises(RuntimeError, match=message):
        sandbox.start()
    with pytest.raises(RuntimeError, match="not started"):
        sandbox.run([Job("", invoke="1")])


def test_start_says_in_one_sentence_when_the_interpreter_does_not_come_up(monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "_SCRIPT", tmp_path / "missing.py")
    with pytest.raises(RuntimeError, match=r"cannot start its fork server.*missing\.py"):
        Sandbox(tier="seccomp").start()


def test_a_sandbox_of_another_process_is_refused(sandbox):
    pid = os.fork()
    if pid == 0:
        try:
            sandbox.run([Job("", invoke="1")])
        except RuntimeError:
            os._exit(42)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42


@pytest.mark.parametrize("bad", [{"cpu_s": 0}, {"memory_mb": -1}, {"cpu_s": 5.0, "wall_s": 1.0}])
def test_impossible_limits_are_refused(bad):
    with pytest.raises(ValueError, match="Limits"):
        Limits(**bad)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv to become someone else")
def test_an_unprivileged_user_gets_the_same_isolation():
    probe = "import os, resource\ndef f():\n try: os.fork()\n except OSError: return os.getuid()"
    script = (
        f"from theodolite.sandbox import *\nwith Sandbox(2) as s: print(s.run([Job({probe!r}, entry='f', calls=(Call(),))])[0].outputs)"
    )
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    may_read_the_interpreter = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    command = [*nobody, *may_read_the_interpreter, sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "(65534,)", done.stderr
