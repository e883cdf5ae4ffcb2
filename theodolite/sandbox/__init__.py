"""Runs untrusted programs on inputs and returns their outputs.

>>> from theodolite.sandbox import Call, Job, Sandbox
>>> with Sandbox(workers=2) as sandbox:
...     sandbox.run([Job("def double(x): return 2 * x", entry="double", calls=(Call((21,)),))])[0].outputs
(42,)

Each program runs in a process of its own that is forked from a bare interpreter and has given up files, sockets, processes, signals and
sleeping before it sees the program. Whatever the caller compares outputs with never enters that process.
"""

from .codec import Opaque
from .jobs import Call, Job, Limits, Outcome, Raised, Status
from .pool import Sandbox
from .tiers import Tier, TierReport

__all__ = ["Call", "Job", "Limits", "Opaque", "Outcome", "Raised", "Sandbox", "Status", "Tier", "TierReport"]
