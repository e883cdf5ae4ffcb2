"""The fork server: a bare interpreter that forks one locked-down child per job.

Started by path as a program of its own (``python -s -P -S zygote.py SETTINGS``), so that nothing of the parent (torch, models, secrets,
answers) is in its memory. It passes descriptors on and never reads a job or an answer: a child is a copy of this process and would find
them.

``SETTINGS`` is a JSON object: ``job``, ``answer``, ``control`` and ``parent`` (descriptors: files that hold the one job and the one answer
there are at a time, the control socket, and a pidfd of the trusted process), ``modules`` (``full`` or ``lean``), ``tier`` (see
``tiers.py``), ``reading`` (folders that programs may read; usually none) and ``cpu`` (the core to stay on, or null).

Control messages (SOCK_SEQPACKET): first out, a JSON object that says what is in force; then in, :data:`REQUEST`, when the job is in its
file, and out, :data:`REPLY`, when the answer is. A message of any other length is a prelude: marshalled code which the trusted side took
from setup code, imports of modules that are loaded already and definitions that compute nothing; children that name it start with it done.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import marshal
import os
import random
import select
import signal
import socket
import struct
import sys
import time
from functools import lru_cache
from types import ModuleType
from typing import Any

REQUEST = struct.Struct("=ddQQQB")
"""cpu_s, wall_s, memory_bytes, output_bytes, bytes of the job, number of the prelude (0: none)."""

MAX_PRELUDES = 16
"""Different preludes that a zygote keeps; numbers start at 1, in the order in which they came."""

PRELUDE_BYTES = 16384
"""Longest prelude."""

REPLY = struct.Struct("=iddQB")
"""Wait status (-1: no child), CPU seconds, wall seconds, peak resident bytes, 1 if killed at the wall limit."""

_STATUS = struct.Struct("=i")
_USAGE = struct.Struct("=5q")
"""How ``struct rusage`` begins on 64-bit Linux: user time, system time (s, us each), peak resident KiB."""

LOCKDOWN_FAILED = signal.SIGUSR1
"""A child that could not lock itself down dies of this signal. After lock-down no signal can be sent, so no program can pretend."""

JOB_FD, ANSWER_FD = 3, 4

LEAN_MODULES = (
    "bisect", "collections", "copy", "functools", "heapq", "itertools", "json", "math", "operator", "random", "re", "string", "sys",
    "typing",
)  # fmt: skip
FULL_MODULES = (
    "abc", "array", "ast", "base64", "binascii", "bisect", "calendar", "cmath", "collections", "collections.abc", "contextlib", "copy",
    "dataclasses", "datetime", "decimal", "difflib", "encodings.idna", "enum", "fractions", "functools", "graphlib", "hashlib", "heapq",
    "inspect", "io", "itertools", "json", "keyword", "locale", "logging", "math", "numbers", "operator", "pprint", "queue", "random",
    "re", "secrets", "statistics", "string", "struct", "sys", "textwrap", "threading", "time", "timeit", "traceback", "types", "typing",
    "unicodedata", "unittest", "uuid", "warnings", "weakref", "zlib",
)  # fmt: skip
"""Imported once, before any fork. A child can open no file, so a program can import these and what they import, and nothing else."""

_UNWANTED = ("_hashlib", "_uuid")

_REHEARSAL = marshal.dumps(
    {
        "token": "",
        "name": "solution",
        "setup": "",
        "setup_code": b"",
        "program": "def f(x, y=(1,)):\n    return [x, {str(x): y}]",
        "entry": "f",
        "invoke": None,
        "binds": None,
        "order": [0, 1, 1],
        "calls": marshal.dumps([marshal.dumps(((1, [2, "a"]), {})), marshal.dumps(((0.5,), {"y": (1, None)}))]),
    }
)


def main() -> None:
    """Serve jobs until the control socket closes or the parent is gone."""
    settings = json.loads(sys.argv[1])
    for name in ("PWD", "LD_LIBRARY_PATH", "LD_BIND_NOW"):  # bubblewrap's, and the linker's: programs see one environment everywhere
        os.environ.pop(name, None)
    if settings["cpu"] is not None:
        os.sched_setaffinity(0, {settings["cpu"]})
    memory = _sibling("memory")
    memory.reserve()
    _import_all(FULL_MODULES if settings["modules"] == "full" else LEAN_MODULES)
    parts = {name: _sibling(name) for name in ("codec", "landlock", "lockdown", "runner")}
    if settings["tier"] == "namespaces":  # all is imported: whoever may read the interpreter here may not be allowed to in there
        _sibling("namespaces").enter(ctypes.CDLL(None, use_errno=True))
    control, parent = _reserve_low_descriptors(*(settings[name] for name in ("job", "answer", "control", "parent")))
    server = _Server(socket.socket(fileno=control), parent, settings, parts)
    for _ in range(20):
        server.rehearse()
    memory.collapse()
    server.confine(settings["reading"])
    random.seed(0)  # a verdict must not depend on luck
    gc.collect()
    gc.freeze()  # a collection in a child would otherwise write to (and copy) every page
    os.dup2(0, 2)  # until here it said what went wrong
    server.control.send(json.dumps({"landlock": server.landlock}).encode())
    server.serve()


def _import_all(names: tuple[str, ...]) -> None:
    """Import what programs may use. Without shared libraries that every fork would copy and Python can do without: OpenSSL, libuuid."""
    for unwanted in _UNWANTED:
        sys.modules[unwanted] = None  # type: ignore[assignment]
    for name in names:
        importlib.import_module(name)
    for unwanted in _UNWANTED:
        del sys.modules[unwanted]


def _reserve_low_descriptors(*wanted: int) -> list[int]:
    """Put /dev/null on 0 and 1, the wanted ones on 3 (:data:`JOB_FD`) and up, and close all others; returns those beyond the answer."""
    aside = max(JOB_FD + len(wanted), *wanted) + 1
    for place, descriptor in enumerate(wanted):
        os.dup2(descriptor, aside + place, inheritable=False)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    moved = [JOB_FD + place for place in range(len(wanted))]
    for place, descriptor in enumerate(moved):
        os.dup2(aside + place, descriptor, inheritable=False)
    os.closerange(moved[-1] + 1, aside + len(wanted) + 64)
    return moved[ANSWER_FD + 1 - JOB_FD :]


class _Server:
    def __init__(self, control: socket.socket, parent: int, settings: dict[str, Any], parts: dict[str, Any]) -> None:
        self.control = control
        self.codec, self.runner, self._landlock = parts["codec"], parts["runner"], parts["landlock"]
        self.confined = settings["tier"] != "unsafe"
        self.jail: Any = parts["lockdown"].Jail(filtered=self.confined, reading=bool(settings["reading"]))
        # The C library's fork instead of os.fork: no thread exists here, so Python's after-fork repairs (a third of a job's cost) are void.
        self.fork, self.wait4 = ctypes.PyDLL(None).fork, ctypes.PyDLL(None).wait4
        self.status, self.usage = ctypes.create_string_buffer(_STATUS.size), ctypes.create_string_buffer(144)
        self.limits = lru_cache(maxsize=16)(self.jail.limits)
        self.parent = parent
        self.preludes: list[tuple[ModuleType, BaseException | None]] = [(ModuleType("solution"), None)]
        self.last = max(control.fileno(), parent)
        self.idle, self.running = select.poll(), select.poll()
        self.idle.register(control, select.POLLIN)
        self.running.register(control, 0)  # hang-up only
        for poll in (self.idle, self.running):
            poll.register(parent, select.POLLIN)
        self.landlock = 0

    def confine(self, reading: list[str]) -> None:
        """Give up what neither this process nor a child will need; the version of Landlock in force goes into ``landlock``."""
        self.jail.measure()
        self.jail.confine_server()
        if not self.confined:
            return
        self.landlock = self._landlock.restrict_self(ctypes.CDLL(None, use_errno=True), reading)
        if reading and not self.landlock:
            raise OSError("programs may only read files behind Landlock, which this kernel lacks")

    def rehearse(self) -> None:
        """Run a job of our own, so that the interpreter's caches are warm before the fork and not anew in every child."""
        self.runner.answer(_REHEARSAL, 1 << 20, self.codec, ModuleType("solution"))
        sys.modules.pop("solution")

    def serve(self) -> None:
        while True:
            ready = dict(self.idle.poll())
            if self.parent in ready:  # someone forked from the parent may still hold its end of the socket, which then never closes
                os._exit(0)
            request = self.control.recv(PRELUDE_BYTES)
            if not request:
                os._exit(0)
            if len(request) != REQUEST.size:
                self._add_prelude(request)
                continue
            reply = self._run_child(*REQUEST.unpack(request))
            try:
                self.control.send(reply)
            except BrokenPipeError:  # the parent left; the next poll says so
                continue

    def _add_prelude(self, code: bytes) -> None:
        """Make a module that children find with the prelude done, or with what it raised, for them to report."""
        module, failure = ModuleType("solution"), None
        try:
            exec(marshal.loads(code), module.__dict__)
        except BaseException as error:
            failure = error.with_traceback(None)
        self.preludes.append((module, failure))
        gc.collect()
        gc.freeze()

    def _run_child(self, cpu_s: float, wall_s: float, memory_bytes: int, output_bytes: int, job_bytes: int, prelude: int) -> bytes:
        limits, ready, zygote = self.limits(cpu_s, memory_bytes, output_bytes), self.preludes[prelude], os.getpid()
        started = time.monotonic()
        pid = self.fork()
        if pid == 0:
            self._child(zygote, limits, cpu_s, job_bytes, output_bytes, *ready)
        if pid < 0:
            return REPLY.pack(-1, 0.0, 0.0, 0, 0)
        killed = not self._wait(pid, started + wall_s)
        if self.wait4(pid, self.status, 0, self.usage) != pid:
            return REPLY.pack(-1, 0.0, 0.0, 0, 0)
        if not self.confined:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        user_s, user_us, system_s, system_us, peak_kib = _USAGE.unpack_from(self.usage)
        cpu = user_s + system_s + (user_us + system_us) / 1e6
        return REPLY.pack(_STATUS.unpack(self.status)[0], cpu, time.monotonic() - started, peak_kib * 1024, killed)

    def _wait(self, pid: int, deadline: float) -> bool:
        """Wait for the child to end; kills it and returns False at the deadline. Ends with the parent."""
        process = os.pidfd_open(pid)
        self.running.register(process, select.POLLIN)
        try:
            while (left := deadline - time.monotonic()) > 0:
                ready = self.running.poll(left * 1000 + 1)
                for descriptor, _ in ready:
                    if descriptor == process:
                        return True
                if ready:
                    os.kill(pid, signal.SIGKILL)
                    os._exit(0)
            os.kill(pid, signal.SIGKILL)
            return False
        finally:
            self.running.unregister(process)
            os.close(process)

    def _child(self, zygote: int, limits: Any, cpu_s: float, job_bytes: int, output_bytes: int, *ready: Any) -> None:
        """Lock down, then read the job, run it, answer, end. Never returns."""
        try:
            os.closerange(ANSWER_FD + 1, self.last + 1)  # the control socket and the parent
            self.jail.lock_down(zygote, limits, cpu_s)
        except BaseException:
            os.kill(os.getpid(), LOCKDOWN_FAILED)
        try:
            answer = self.runner.answer(_read_all(job_bytes), output_bytes, self.codec, *ready)
            while answer:
                answer = answer[os.write(ANSWER_FD, answer) :]
        except BaseException:
            os._exit(1)
        os._exit(0)


def _read_all(size: int) -> bytes:
    job = os.pread(JOB_FD, size, 0)  # the position belongs to all programs together
    while len(job) < size and (part := os.pread(JOB_FD, size - len(job), len(job))):
        job += part
    return job


def _sibling(name: str) -> ModuleType:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"_sandbox_{name}", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"the sandbox cannot load {path}; reinstall theodolite")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
