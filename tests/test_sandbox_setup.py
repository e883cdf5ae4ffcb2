"""Setup code is taken apart: whatever a fork server does ahead of time, programs see the same, and see nothing of one another."""

from __future__ import annotations

import json
import marshal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from theodolite.sandbox import Call, Job, Limits, Sandbox, zygote
from theodolite.sandbox.setup_code import Setups, ways_to_set_up

HELPERS = '''from math import *
import collections

inf = float("inf")
lowest = debug = -1

def pair(a: int, b: "anything" = None, *more: list, key=-2.5) -> tuple:
    """Docstring."""
    return a, b

class Node:
    """A node."""
    kind = "node"

    def __init__(self, val=0, next=None):
        self.val, self.next = val, next

    def length(self):
        return 1 + (self.next.length() if self.next else 0)
'''
SEES = """def f():
    chain = Node(1, Node(2))
    return [chain.length(), Node.__module__, Node.kind, pair.__module__, pair(1), pair.__kwdefaults__, inf, lowest, __name__, floor(2.5),
            collections.__name__, sorted(name for name in globals() if name[:2] != "__")[:12]]
"""


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(tier="seccomp", limits=Limits(cpu_s=1.0, wall_s=60.0)) as running:
        yield running


def job(program: str, setup: str = "", **more: Any) -> Job:
    return Job(program, entry="f", calls=(Call(),), setup_code=setup, **more)


def defined(code: bytes) -> set[str]:
    return set(marshal.loads(code).co_names) if code else set()


def test_imports_and_definitions_are_run_ahead_and_nothing_is_left_for_the_child():
    first, second, last = ways_to_set_up(HELPERS, zygote.FULL_MODULES)
    assert {"math", "inf", "pair", "Node"} <= defined(first.prelude)
    assert (first.code, first.source, first.defines) == (b"", "", True)
    assert "Node" not in defined(second.prelude)
    assert "Node" in defined(second.code)
    assert (last.prelude, last.code, last.source) == (b"", b"", HELPERS)


@pytest.mark.parametrize(
    "computes",
    [
        "last = 2 ** 3",
        "last = list(range(10))",
        "last = open",
        "__name__ = 'last'",
        "last: int = 3",
        "def last(x=[]): pass",
        "def last(x: List[int]): pass",
        "@print\ndef last(): pass",
        "class last(dict): pass",
        "class last(metaclass=type): pass",
        "class last:\n    x = 2 ** 3",
        "class last:\n    __slots__ = 5",
        "class last:\n    print()",
        "print()",
        "for last in (): pass",
        "lambda: 0",
        "last.x = 3",
        "import torch as last",
        "from os import path as last",
        "async def last(): pass",
    ],
)
def test_a_statement_that_computes_ends_what_is_run_ahead(computes):
    first = ways_to_set_up(f"def ahead(): pass\n{computes}\ndef later(): pass\n", zygote.FULL_MODULES)[0]
    assert defined(first.prelude) == {"ahead"}
    assert "later" in defined(first.code)


@pytest.mark.parametrize("broken", ["def f(:", "def f():\n    break", "def f(a, a): pass", "return 1", "x = 1\0", "(" * 5000])
def test_setup_code_that_does_not_compile_is_left_to_the_child_as_it_is(broken):
    assert [way.source for way in ways_to_set_up(broken, zygote.FULL_MODULES)] == [broken]


@pytest.mark.parametrize("as_main", [False, True])
def test_a_program_sees_the_same_whatever_was_run_ahead(sandbox, monkeypatch, as_main):
    seen = []
    for room in (zygote.MAX_PRELUDES, 1, 0):  # room for definitions, for imports only, for nothing
        monkeypatch.setattr(zygote, "MAX_PRELUDES", room)
        monkeypatch.setattr(sandbox, "_setups", Setups(zygote.FULL_MODULES))
        seen.append(sandbox.run([job(SEES, HELPERS, as_main=as_main)])[0].outputs)
    assert seen[0] is not None
    assert seen[0][0][:4] == [2, "__main__" if as_main else "solution", "node", "__main__" if as_main else "solution"]
    assert seen == [seen[0]] * 3


def test_what_one_program_does_to_a_helper_the_next_does_not_see(sandbox):
    poison = "Node.length = lambda self: 7\npair.__defaults__ = (9,)\ninf = 0\ndef f(): return Node().length()"
    clean = sandbox.run([job(SEES, HELPERS)])[0].outputs
    assert sandbox.run([job(poison, HELPERS), job(SEES, HELPERS)])[1].outputs == clean


def test_setup_code_that_fails_ahead_of_time_fails_its_own_programs_only(sandbox):
    workers = sandbox.worker_pids
    bad, good = job("def f(): return 1", "from math import nothing_of_that_name\n"), job("def f(): return 1", HELPERS)
    outcomes = sandbox.run([bad, good, bad])
    assert [o.status for o in outcomes] == ["runtime_error", "ok", "runtime_error"]
    assert "ImportError" in outcomes[0].error
    assert (sandbox.worker_pids, sandbox.retries) == (workers, 0)


def test_more_different_setups_than_there_is_room_for_are_all_run(monkeypatch):
    jobs = [job("def f(): return helper()", f"from math import *\ndef helper(): return {k}\n") for k in range(3 * zygote.MAX_PRELUDES)]
    setups = Setups(zygote.FULL_MODULES)
    chosen = [setups.of(one) for one in jobs]
    assert len({setup.prelude for setup in chosen}) == zygote.MAX_PRELUDES // 2 + 1  # the rest share their imports
    assert sum(setup.defines for setup in chosen) == zygote.MAX_PRELUDES // 2
    assert all(setup.prelude for setup in chosen)


def test_a_program_finds_nothing_of_the_one_before_in_its_files_and_nothing_moved(sandbox):
    rude = (
        "import os\nos.write(3, b'x' * 9000)\nos.lseek(3, 1 << 20, 0)\nos.lseek(4, 1 << 40, 0)\n"
        "def f(): return 'the answer of the first program'\n# " + "long" * 3000
    )
    looks = (
        "import os\ndef f():\n    found = os.pread(3, 1 << 20, 0)\n    positions = [os.lseek(descriptor, 0, 1) for descriptor in (3, 4)]\n"
        "    return [b'first ' + b'program' in found, b'long' * 2 in found, len(found) < 4000, *positions, os.lseek(4, 0, 2)]"
    )
    first, second = sandbox.run([job(rude), job(looks)])
    assert first.status == "tamper"  # its answer lies beyond the size that its file may have
    assert second.outputs == ([False, False, True, 0, 0, 0],)


LARGE = """
import ctypes, importlib.util, json, mmap, sys
spec = importlib.util.spec_from_file_location("memory", sys.argv[1])
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
def large():
    return int(open("/proc/self/smaps_rollup").read().split("AnonHugePages:")[1].split()[0])
before = large()
memory.reserve()
kept = [(k, str(k)) for k in range(50000)]
memory.collapse()
after = large()
probe = mmap.mmap(-1, 8 << 20)
probe.write(bytes(8 << 20))
start = -(-ctypes.addressof(ctypes.c_char.from_buffer(probe)) // (2 << 20)) * (2 << 20)
gives = ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(2 << 20), 25) == 0
print(json.dumps([before, after, gives, all(b == str(a) for a, b in kept)]))
"""


def test_memory_is_collapsed_into_large_pages_where_the_kernel_gives_them_and_keeps_its_content():
    script = Path(zygote.__file__).with_name("memory.py")
    done = subprocess.run([sys.executable, "-I", "-c", LARGE, str(script)], capture_output=True, text=True, timeout=120, check=True)
    before, after, gives, whole = json.loads(done.stdout)
    assert whole
    assert after - before >= 4096 or not gives  # KiB
