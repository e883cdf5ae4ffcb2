"""How strongly a fork server is walled in, strongest first, and how a machine's best tier is found.

==============  ======================================================================================================================
tier            what holds a program
==============  ======================================================================================================================
``bwrap``       the locked-down child (limits, no capabilities, seccomp allow-list, Landlock where present) of a fork server that runs
                inside bubblewrap: no network, no other process, and only the interpreter's files
``namespaces``  the same child of a fork server in user, mount, network, IPC, UTS and process namespaces of its own
``seccomp``     the same child, without namespaces
``unsafe``      limits only; programs can read files, use the network and outlive their grade. Never chosen: it has to be asked for
==============  ======================================================================================================================

The child's own lock-down does not differ between the first three, and every attack of the probe must fail in each of them. What a
namespace adds is a second wall, should the kernel's filter have a hole.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

ConcreteTier: TypeAlias = Literal["bwrap", "namespaces", "seccomp", "unsafe"]
Tier: TypeAlias = Literal["auto", "bwrap", "namespaces", "seccomp", "unsafe"]

CHAIN: tuple[ConcreteTier, ...] = ("bwrap", "namespaces", "seccomp")
"""What ``auto`` tries, in this order."""

ATTACKS = (
    "open a file",
    "write a file",
    "look at a file",
    "change a mode",
    "make a socket",
    "fork",
    "start a program",
    "signal the fork server",
    "read another process's memory",
    "make a namespace",
    "signal by descriptor owner",
    "raise a limit",
    "ignore the CPU timer",
    "be traced",
)
"""What the probe tries from inside, in the order in which it answers."""

PROBE = """
import ctypes, os, resource, signal, socket
libc = ctypes.CDLL(None, use_errno=True)
parent = os.getppid()

def refused(attack):
    try:
        return attack() == -1
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False

def held():
    return [refused(attack) for attack in (
        lambda: os.open("/proc/self/status", os.O_RDONLY),
        lambda: os.open("/dev/null", os.O_WRONLY),
        lambda: os.stat("/"),
        lambda: os.chmod("/", 0o755),
        lambda: socket.socket(),
        lambda: os.waitpid(os.fork() or os._exit(9), 0),
        lambda: os.execv("/theodolite-probe", ["probe"]),
        lambda: os.kill(parent, 0),
        lambda: libc.process_vm_readv(parent, 0, 0, 0, 0, 0),
        lambda: libc.unshare(0x10000000),
        lambda: libc.fcntl(0, 8, parent),
        lambda: libc.setrlimit(resource.RLIMIT_NOFILE, ctypes.byref((ctypes.c_ulong * 2)(5, 5))),
        lambda: signal.signal(signal.SIGPROF, signal.SIG_IGN),
        lambda: libc.ptrace(0, 0, 0, 0),  # last: a traced process would stop at its next signal
    )]
"""


def with_reading(attacks: tuple[str, ...]) -> tuple[str, ...]:
    """The attacks that must still fail where programs may read some folders: looking at a file is then allowed everywhere."""
    return tuple(attack for attack in attacks if attack != "look at a file")


@dataclass(frozen=True, slots=True)
class TierReport:
    """Which isolation is in force and how that was found out; plain data for manifests.

    Attributes:
        tier: See the module's docstring.
        held: Attacks that were tried from inside at start and failed.
        broke: Attacks that got through; empty except for ``unsafe``.
        passed_over: Stronger tiers that do not work here, each with the reason.
        landlock: Version of the kernel's Landlock interface in force in every child; 0 = none.
        reading: Whether programs may read files (the standard library's).
        machine: As ``platform.machine()`` says.
        kernel: Release of the kernel.
        root: The fork server was started by root.
    """

    tier: ConcreteTier
    held: tuple[str, ...] = ()
    broke: tuple[str, ...] = ()
    passed_over: dict[str, str] = field(default_factory=dict)
    landlock: int = 0
    reading: bool = False
    machine: str = field(default_factory=platform.machine)
    kernel: str = field(default_factory=platform.release)
    root: bool = field(default_factory=lambda: os.geteuid() == 0)

    def as_dict(self) -> dict[str, Any]:
        """Plain data (lists, strings, numbers)."""
        return asdict(self) | {"held": list(self.held), "broke": list(self.broke)}

    def __str__(self) -> str:
        over = "".join(f"; not {tier}: {why}" for tier, why in self.passed_over.items())
        walls = f"Landlock {self.landlock}" if self.landlock else "no Landlock"
        return f"sandbox: tier {self.tier} ({walls}), {len(self.held)} of {len(self.held) + len(self.broke)} probe attacks failed{over}"


def wrapper(tier: ConcreteTier, package: Path) -> list[str]:
    """Command line in front of the interpreter's. Raises ``RuntimeError`` when the tier needs a program that is not installed."""
    if tier != "bwrap":
        return []
    program = shutil.which("bwrap")
    if program is None:
        raise RuntimeError("bubblewrap (bwrap) is not installed")
    return [program, *_BWRAP_NAMESPACES, *_read_only(package), "--proc", "/proc", "--dev", "/dev", "--chdir", "/", "--"]


# --die-with-parent would kill with the *thread* that started it, and --new-session would leave the process group that the parent kills.
_BWRAP_NAMESPACES = (
    "--unshare-user",
    "--unshare-ipc",
    "--unshare-pid",
    "--unshare-net",
    "--unshare-uts",
    "--unshare-cgroup-try",
    "--cap-drop",
    "ALL",
)


def _read_only(package: Path) -> list[str]:
    """Mounts of what the interpreter needs to start: system libraries, its own installation, and the sandbox's files."""
    mounts = ["--ro-bind", "/usr", "/usr"]
    for folder in ("/lib", "/lib64", "/bin"):
        mounts += ["--symlink", os.readlink(folder), folder] if os.path.islink(folder) else ["--ro-bind-try", folder, folder]
    mounts += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    installed = {os.path.dirname(os.path.realpath(sys.executable)), sys.base_prefix, sys.prefix, os.fspath(package)}
    for folder in sorted(installed):
        if folder != "/usr" and not folder.startswith("/usr/"):
            mounts += ["--ro-bind", folder, folder]
    for folder in filter(os.path.isabs, os.environ.get("LD_LIBRARY_PATH", "").split(":")):
        mounts += ["--ro-bind-try", folder, folder]
    return mounts
