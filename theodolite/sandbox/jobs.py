"""What goes into the sandbox and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Status: TypeAlias = Literal["ok", "syntax_error", "runtime_error", "timeout", "memory", "output_limit", "tamper", "infra_error"]
"""How a job ended.

``ok``: the program ran and answered (single calls may still have raised). ``syntax_error``: it does not compile. ``runtime_error``: its
body or the invoked expression raised, or it crashed. ``timeout``: it used up its CPU time. ``memory``: it ran into the memory limit.
``output_limit``: its answer is larger than allowed. ``tamper``: it ended its process, or wrote to the descriptor of the answer, so that
there is no answer of the runner's. ``infra_error``: not the program's fault (a machine that stalls, a worker that died, a batch's
deadline), twice in a row; never to be scored as an answer.
"""


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one call: plain values (numbers, strings, None, list, tuple, dict, set, frozenset, bytes), exact types kept."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Raised:
    """The call raised instead of returning. Both fields come from the untrusted side."""

    type_name: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One program in one fresh process.

    Attributes:
        program: Source text. It runs as a module named ``solution`` (so a ``__main__`` guard stays closed).
        entry: Expression for the callable under test, e.g. ``solve`` or ``Solution().twoSum``; evaluated anew for every call.
        calls: The calls, in order, each with arguments of its own.
        setup_code: Trusted imports and helpers that run before the program in the same namespace.
        invoke: Expression evaluated once after the program, e.g. ``run_tests()``; excludes ``entry`` and ``calls``.
        order: Indices into ``calls``, in the order in which they are made; an index may repeat. Empty = each once, as given.
        binds: With ``invoke``: a name that the program must have bound; otherwise nothing is invoked and ``Outcome.bound`` is false.
        as_main: The program runs as ``__main__``, so a ``__main__`` guard opens.
    """

    program: str
    entry: str | None = None
    calls: tuple[Call, ...] = ()
    setup_code: str = ""
    invoke: str | None = None
    order: tuple[int, ...] = ()
    binds: str | None = None
    as_main: bool = False

    def __post_init__(self) -> None:
        if any(not 0 <= index < len(self.calls) for index in self.order):
            raise ValueError(f"Job.order names a call outside 0..{len(self.calls) - 1}")
        if (self.entry is None) == (self.invoke is None):
            raise ValueError("a Job needs either entry (with calls) or invoke, and not both")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one job may use.

    Attributes:
        cpu_s: CPU seconds for the program and all its calls together (fractions count). Decides ``timeout``.
        wall_s: Seconds of wall time. A program cannot sleep or wait in here, so this only fires when the machine stalls: such a job
            is repeated once, then reported as ``infra_error``. Keep it several times ``cpu_s``.
        memory_mb: MiB of address space on top of the bare interpreter's.
        output_kb: KiB of encoded answer. What a program prints is discarded and costs nothing but its time.
    """

    cpu_s: float = 2.0
    wall_s: float = 10.0
    memory_mb: int = 512
    output_kb: int = 1024

    def __post_init__(self) -> None:
        for name in ("cpu_s", "wall_s", "memory_mb", "output_kb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Limits.{name} is {getattr(self, name)!r}; it must be positive")
        if self.wall_s < self.cpu_s:
            raise ValueError(f"Limits.wall_s is {self.wall_s}, below cpu_s = {self.cpu_s}; a program could then never be called too slow")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended and what it answered.

    Attributes:
        status: See :data:`Status`.
        outputs: One value or :class:`Raised` per call, in the order of ``Job.order``, when ``status`` is ``ok`` and the job had an entry,
            else ``None``. A value of a type that is not carried is an :class:`~theodolite.sandbox.codec.Opaque`.
        returned: The invoked expression returned without an exception.
        bound: ``Job.binds`` was bound when the program had run, as far as its own process says.
        tampered: The process says that the program replaced builtins or hooked the interpreter. Only the careless are caught.
        error: A short text for people; partly written by the program, so never to be trusted.
        cpu_s: CPU seconds of the process, start and end included.
        wall_s: Wall seconds of the process.
    """

    status: Status
    outputs: tuple[Any, ...] | None = None
    returned: bool = False
    bound: bool = False
    tampered: bool = False
    error: str = ""
    cpu_s: float = 0.0
    wall_s: float = 0.0
