"""The fork server's memory in large pages: a fork then copies a few entries instead of thousands. Linux; standard library only.

Nothing depends on it: where the kernel has no large pages to give, or the interpreter another allocator, programs only start a little
slower.
"""

from __future__ import annotations

import contextlib
import ctypes

_LARGE = 2 << 20
_COLLAPSE = 25
"""``MADV_COLLAPSE``: Linux >= 6.1."""

_ARENAS, _PER_ARENA, _PAYLOAD = 8, 1984, 479
"""What is reserved, in the allocator's units: arenas of 1 MiB, the objects of 512 bytes that fill one, and what such an object carries."""

_kept: list[bytes] = []


def reserve() -> None:
    """Make the interpreter take memory for small objects now, in one piece, and not bit by bit between the libraries it loads later."""
    filled = [bytes(_PAYLOAD) for _ in range(_ARENAS * _PER_ARENA)]
    _kept[:] = filled[:: _PER_ARENA // 2]  # an arena that holds nothing would be given back


def collapse() -> None:
    """Put what is in memory now into large pages, wherever one is filled by writable memory of this process alone."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with contextlib.suppress(OSError), open("/proc/self/maps", "rb") as maps:  # bytes: a codec may lie outside the jail
        for where, rights, *rest in [line.split() for line in maps]:
            if rights == b"rw-p" and (len(rest) == 3 or rest[3] == b"[heap]"):
                start, end = (int(part, 16) for part in where.split(b"-"))
                for page in range(-(-start // _LARGE) * _LARGE, end // _LARGE * _LARGE, _LARGE):
                    madvise(page, _LARGE, _COLLAPSE)
