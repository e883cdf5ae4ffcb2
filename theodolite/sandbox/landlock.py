"""Landlock: what files the fork server and its children could open if the seccomp filter let them. Linux >= 5.13; standard library only.

The default is an empty ruleset (nothing may be opened, connected to or signalled), a second wall behind the filter. With ``readable``
folders it is the first wall: the filter then lets files be opened for reading, and only Landlock says which.
"""

from __future__ import annotations

import ctypes
import os
import struct

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on x86-64 and aarch64
_VERSION_FLAG, _RULE_PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3


def abi_version(libc: ctypes.CDLL) -> int:
    """Version of the kernel's Landlock interface; 0 where there is none."""
    return max(0, libc.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG))


def restrict_self(libc: ctypes.CDLL, readable: list[str]) -> int:
    """Refuse this process and its children everything that this kernel's Landlock can refuse, except reading below ``readable``, for good.

    Needs ``no_new_privs``.

    Returns:
        The version of the kernel's Landlock interface; 0 where there is none, and then nothing is restricted.

    Raises:
        OSError: The kernel has Landlock but refuses.
    """
    if abi_version(libc) < 1:
        return 0
    ruleset = _make_ruleset(libc, readable)
    try:
        if libc.syscall(_RESTRICT_SELF, ruleset, 0):
            raise OSError(ctypes.get_errno(), "landlock_restrict_self failed")
    finally:
        os.close(ruleset)
    return abi_version(libc)


def _make_ruleset(libc: ctypes.CDLL, readable: list[str]) -> int:
    abi = abi_version(libc)
    rights = (1 << 13) - 1  # ABI 1: execute, read, write, list, remove and make of every kind
    for since, bit in ((2, 13), (3, 14), (5, 15)):  # refer, truncate, device ioctl
        rights |= (abi >= since) << bit
    network, scope = (0b11 if abi >= 4 else 0), (0b11 if abi >= 6 else 0)  # bind and connect; abstract sockets and signals
    attribute = struct.pack("=QQQ", rights, network, scope)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = libc.syscall(_CREATE_RULESET, attribute, len(attribute), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset failed")
    for path in readable:
        _allow_reading(libc, ruleset, path)
    return ruleset


def _allow_reading(libc: ctypes.CDLL, ruleset: int, path: str) -> None:
    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", _READ_FILE | _READ_DIR, folder)
        if libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0):
            raise OSError(ctypes.get_errno(), f"landlock_add_rule failed for {path}")
    finally:
        os.close(folder)
