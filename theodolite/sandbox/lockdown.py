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

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
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
    code = [(_LOAD, 0, 0, _ARCH_AT), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER_AT)]
    if machine == "x86_64":  # the x32 twins of every call
        code += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for name, number in numbers.items():
        if name != "fcntl":
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO if name in _NO_OPS else _ALLOW)]
    if reading:
        code += _reading_steps(_READING[machine])
    code += [(_EQUAL, 0, 2 + 2 * len(_FCNTL_READS), numbers["fcntl"]), (_LOAD, 0, 0, _SECOND_ARGUMENT_AT)]
    for command in _FCNTL_READS:
        code += [(_EQUAL, 0, 1, command), (_RETURN, 0, 0, _ALLOW)]
    code += [(_RETURN, 0, 0, _ERRNO | 1), (_RETURN, 0, 0, _ERRNO | 1)]
    return b"".join(struct.pack("HBBI", *step) for step in code)


def _reading_steps(numbers: dict[str, int]) -> list[tuple[int, int, int, int]]:
    """Listing and looking at files is allowed, opening them only with no flag that writes."""
    steps = []
    for name in ("newfstatat", "getdents64"):
        steps += [(_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, _ALLOW)]
    steps += [(_EQUAL, 0, 4, numbers["openat"]), (_LOAD, 0, 0, _THIRD_ARGUMENT_AT), (_ANY_BIT, 0, 1, _WRITE_FLAGS)]
    return [*steps, (_RETURN, 0, 0, _ERRNO | 1), (_RETURN, 0, 0, _ALLOW)]


class Jail:
    """Everything that can be prepared or given up once, before the fork, so that locking a child down takes a few system calls.

    Args:
        filtered: Install the seccomp filter; ``False`` only for the tier that the user has to call unsafe.
        reading: See :func:`filter_program`.
    """

    def __init__(self, filtered: bool = True, reading: bool = False) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._filtered = filtered
        program = filter_program(reading=reading) if filtered else b""
        self._code = ctypes.create_string_buffer(program, len(program))
        self._filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(self._code)))
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

    def die_with_parent(self, parent: int) -> None:
        """The kernel kills this process when its parent ends. Raises ``OSError`` if it already has."""
        self._check(self._libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:
            raise OSError("the zygote is gone")

    def lock_down(self, cpu_s: float, memory_bytes: int, output_bytes: int) -> None:
        """Set the limits and install the filter, in a child. Raises ``OSError`` when any step fails."""
        self._limit(resource.RLIMIT_FSIZE, output_bytes)
        self._limit(resource.RLIMIT_CPU, math.ceil(cpu_s) + 1)  # a backstop: the timer below has fractions
        self._limit(resource.RLIMIT_AS, self._own_bytes + memory_bytes)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF ends the process; the filter leaves no way to catch or block it
        if self._filtered:
            self._check(self._libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._filter, 0, 0), "prctl(PR_SET_SECCOMP)")
        else:
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))

    def _limit(self, kind: int, value: int) -> None:
        value = min(value, self._hard[kind])
        resource.setrlimit(kind, (value, value))

    @staticmethod
    def _check(result: int, what: str) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), f"{what} failed")


def _hard_limit(kind: int) -> int:
    hard = resource.getrlimit(kind)[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard
