"""Namespaces of the fork server's own, for machines without bubblewrap. Linux; standard library only.

User, mount, network, IPC, UTS and process namespaces in one step: no network, no other process, no capability outside. Files stay where
they are; that no child opens one is the seccomp filter's business.
"""

from __future__ import annotations

import ctypes
import os
import signal

_NEW_MOUNT, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG = 1


def enter(libc: ctypes.CDLL) -> None:
    """Move into new namespaces. Returns in a child, the first process of its process namespace; this process waits for it and ends.

    Raises:
        OSError: The machine does not allow it.
    """
    uid, gid, outside = os.getuid(), os.getgid(), os.getpid()
    if libc.unshare(_NEW_USER | _NEW_MOUNT | _NEW_UTS | _NEW_IPC | _NEW_PID | _NEW_NET):
        raise OSError(ctypes.get_errno(), "unshare of user, mount, network, IPC, UTS and process namespaces is refused")
    for name, text in (("setgroups", b"deny"), ("uid_map", b"%d %d 1" % (uid, uid)), ("gid_map", b"%d %d 1" % (gid, gid))):
        with open(f"/proc/self/{name}", "wb") as file:  # bytes: a text codec may have to be imported, from files out of reach by now
            file.write(text)
    watch = os.pidfd_open(outside)
    inner = os.fork()
    if inner:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) & 0xFF)
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    _leave_if_ended(watch)
    os.close(watch)


def _leave_if_ended(process: int) -> None:
    """The outer process may have ended before the death signal was asked for."""
    import select

    poll = select.poll()
    poll.register(process, select.POLLIN)
    if poll.poll(0):
        os._exit(0)
