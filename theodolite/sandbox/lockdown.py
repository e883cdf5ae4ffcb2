"""How a forked child gives up everything but computing. Linux, x86-64 and aarch64; standard library only.

After :func:`lock_down` a process can use memory and the CPU, read and write the descriptors it holds, look at the clock, and end. There
is no file to open, no socket, no new process or thread, no signal to send, and nothing to wait for: sleeping returns at once and every
blocking call is refused, so wall time is CPU time unless the machine itself stalls.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import signal
import struct
import sys
from typing import TypeAlias

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_DIE_WITH_PARENT, _ITIMER_PROF = (_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), signal.ITIMER_PROF
_CAPABILITY_VERSION_3 = 0x20080522

_X86_64 = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigreturn": 15,
    "pread64": 17, "sched_yield": 24, "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39, "exit": 60, "fcntl": 72,
    "gettimeofday": 96, "getrusage": 98, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "gettid": 186,
    "time": 201, "sched_getaffinity": 204, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "getrandom": 318,
}  # fmt: skip
_AARCH64 = {
    "fcntl": 25, "close": 57, "lseek": 62, "read": 63, "write": 64, "pread64": 67, "fstat": 80, "exit": 93, "exit_group": 94,
    "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124,
    "restart_syscall": 128, "rt_sigreturn": 139, "times": 153, "getrusage": 165, "gettimeofday": 169, "getpid": 172, "getuid": 174,
    "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222,
    "mprotect": 226, "madvise": 233, "getrandom": 278,
}  # fmt: skip
SYSTEM_CALLS = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}
"""Per machine: the audit architecture constant and the numbers of the system calls that appear in the filter."""

_READING = {
    "x86_64": {"openat": 257, "newfstatat": 262, "getdents64": 217},
    "aarch64": {"openat": 56, "newfstatat": 79, "getdents64": 61},
}
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_NO_OPS = ("nanosleep", "clock_nanosleep")
_FCNTL_READS = (1, 3)  # F_GETFD, F_GETFL. F_SETOWN and F_SETSIG would send signals to any process of the same user

# Classic BPF: load a word, jump if equal / greater-or-equal, return a verdict.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_Step: TypeAlias = tuple[int, int, int, int]
_ALLOWED: _Step = (_RETURN, 0, 0, _ALLOW)
_NOTHING: _Step = (_RETURN, 0, 0, _ERRNO)
_REFUSED: _Step = (_RETURN, 0, 0, _ERRNO | 1)
_KILLED: _Step = (_RETURN, 0, 0, _KILL)
_NUMBER_AT, _ARCH_AT, _SECOND_ARGUMENT_AT, _THIRD_ARGUMENT_AT = 0, 4, 24, 32


def filter_program(machine: str | None = None, reading: bool = False) -> bytes:
    """The seccomp allow-list as BPF instructions; a call not listed fails with EPERM, also one not yet invented.

    Args:
        machine: As ``platform.machine()`` says; default: this one.
        reading: Let files be opened for reading; only sound behind a Landlock ruleset that says which.

    Raises:
        RuntimeError: There is no table for ``machine`` (default: this one).
    """
    machine = machine or platform.machine()
    if machine not in SYSTEM_CALLS or sys.maxsize < 2**32:
        raise RuntimeError(f"the sandbox has no system-call table for {machine!r} ({'/'.join(SYSTEM_CALLS)}, 64-bit); run it there")
    arch, numbers = SYSTEM_CALLS[machine]
    blocks = {number: [_NOTHING if name in _NO_OPS else _ALLOWED] for name, number in numbers.items()}
    blocks[numbers["fcntl"]] = _fcntl_steps()
    if reading:
        blocks |= _reading_blocks(_READING[machine])
    ends = {number + 1: [_REFUSED] for number in blocks}
    if machine == "x86_64":  # the x32 twins of every call
        ends[0x40000000] = [_KILLED]
    code = [(_LOAD, 0, 0, _ARCH_AT), (_EQUAL, 1, 0, arch), _KILLED, (_LOAD, 0, 0, _NUMBER_AT)]
    starts = sorted(({0: [_REFUSED]} | ends | blocks).items())
    code += _search([start for start, before in zip(starts, [(0, None), *starts], strict=False) if start[1] != before[1]])
    return b"".join(struct.pack("HBBI", *step) for step in code)


def _search(blocks: list[tuple[int, list[_Step]]]) -> list[_Step]:
    """Steps that end in the block of the largest start that is not above the loaded number.

    The kernel tries a filter on every number there is when it is installed, once per job, so a plain row of comparisons would be walked to
    its end hundreds of times.
    """
    if len(blocks) == 1:
        return blocks[0][1]
    half = len(blocks) // 2
    below, above = _search(blocks[:half]), _search(blocks[half:])
    return [(_AT_LEAST, len(below), 0, blocks[half][0]), *below, *above]


def _fcntl_steps() -> list[_Step]:
    steps: list[_Step] = [(_LOAD, 0, 0, _SECOND_ARGUMENT_AT)]
    for command in _FCNTL_READS:
        steps += [(_EQUAL, 0, 1, command), _ALLOWED]
    return [*steps, _REFUSED]


def _reading_blocks(numbers: dict[str, int]) -> dict[int, list[_Step]]:
    """Listing and looking at files is allowed, opening them only with no flag that writes."""
    opening: list[_Step] = [(_LOAD, 0, 0, _THIRD_ARGUMENT_AT), (_ANY_BIT, 0, 1, _WRITE_FLAGS), _REFUSED, _ALLOWED]
    return {number: opening if name == "openat" else [_ALLOWED] for name, number in numbers.items()}


class Jail:
    """Everything that can be prepared or given up once, before the fork, so that locking a child down takes a few system calls.

    Args:
        filtered: Install the seccomp filter; ``False`` only for the tier that the user has to call unsafe.
        reading: See :func:`filter_program`.
    """

    def __init__(self, filtered: bool = True, reading: bool = False) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        program = filter_program(reading=reading) if filtered else b""
        self._code = ctypes.create_string_buffer(program, len(program))
        self._filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(self._code)))
        # Bound once, and without a lock to release or an error number to keep: every object that a child looks up is a page to copy.
        install = (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._filter, 0, 0) if filtered else ()
        self._steps = (ctypes.PyDLL(None).prctl, os.getppid, resource.setrlimit, signal.setitimer, install)
        self._hard = {kind: _hard_limit(kind) for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_AS)}
        self._own_bytes = 0

    def confine_server(self) -> None:
        """Give up, in the fork server and so in every child, what the server does not need itself: capabilities, new privileges, cores."""
        self._check(self._libc.capset(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), bytes(24)), "capset")
        self._check(self._libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
        for kind, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_STACK, 64 << 20)):
            value = min(value, _hard_limit(kind))
            resource.setrlimit(kind, (value, value))

    def measure(self) -> None:
        """Note the server's own address space, on top of which a child's memory limit counts."""
        with open("/proc/self/statm", "rb") as statm:
            self._own_bytes = int(statm.read().split()[0]) * resource.getpagesize()

    def limits(self, cpu_s: float, memory_bytes: int, output_bytes: int) -> list[tuple[int, tuple[int, int]]]:
        """What :meth:`lock_down` sets, worked out in the server: a child would have to copy every page that it works on."""
        wanted = (
            (resource.RLIMIT_FSIZE, output_bytes),
            (resource.RLIMIT_CPU, math.ceil(cpu_s) + 1),  # a backstop: the timer has fractions
            (resource.RLIMIT_AS, self._own_bytes + memory_bytes),
        )
        within = [(kind, min(value, self._hard[kind])) for kind, value in wanted]
        return [(kind, (value, value)) for kind, value in within]

    def lock_down(self, parent: int, limits: list[tuple[int, tuple[int, int]]], cpu_s: float) -> None:
        """Die with the parent, set the limits and install the filter, in a child. Raises ``OSError`` when any step fails."""
        prctl, getppid, setrlimit, setitimer, filtered = self._steps
        if prctl(*_DIE_WITH_PARENT) or getppid() != parent:
            raise OSError("prctl(PR_SET_PDEATHSIG) failed, or the server is gone")
        for kind, value in limits:
            setrlimit(kind, value)
        setitimer(_ITIMER_PROF, cpu_s)  # SIGPROF ends the process; the filter leaves no way to catch or block it
        if not filtered:
            setrlimit(resource.RLIMIT_NPROC, (0, 0))
        elif prctl(*filtered):
            raise OSError("prctl(PR_SET_SECCOMP) failed")

    @staticmethod
    def _check(result: int, what: str) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), f"{what} failed")


def _hard_limit(kind: int) -> int:
    hard = resource.getrlimit(kind)[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard
