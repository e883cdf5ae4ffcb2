"""Wall seconds of a study by phase, over all the calls that its results took: ``timings.json`` in its folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from theodolite.provenance import write_json_atomic

TIMINGS = "timings.json"


class Timings:
    """Times the phases of one call and adds them to what earlier calls took, as far as the study keeps what those did.

    A call that finds nothing to do leaves the file as it is. Where finished runs are kept and nobody timed them nothing is written: a sum
    without them would be wrong.

    Args:
        out: The study's folder.
        kept: It holds finished runs that this call does not repeat.
        writes: Write the file; a part of a sweep does not.

    Attributes:
        seconds: By phase, earlier calls included.
        changed: Whether this call had anything to do.
    """

    def __init__(self, out: Path, kept: bool, writes: bool = True) -> None:
        self._path = out / TIMINGS
        self._found: dict[str, float] = json.loads(self._path.read_text(encoding="utf-8"))["seconds"] if self._path.is_file() else {}
        self._kept, self._writes = kept, writes and (bool(self._found) or not kept)
        self.seconds: dict[str, float] = dict(self._found) if kept else {}
        self.changed = False

    @contextmanager
    def phase(self, name: str, work: bool = True, kept: bool = False) -> Iterator[Callable[[], None]]:
        """Time what is done inside, also where it is interrupted.

        Args:
            name: The phase's.
            work: There is something to do; otherwise it costs what earlier calls needed.
            kept: Part of what it makes is kept from an earlier call, even where no run is.

        Yields:
            Writes down what the phase has taken so far: called now and then, little is lost with a process that is killed.
        """
        before = self._found.get(name, 0.0) if self._kept or kept or not work else 0.0
        self.seconds[name], self.changed = before, self.changed or work
        start = time.perf_counter()

        def note() -> None:
            if work:
                self.seconds[name] = before + time.perf_counter() - start
                self._write()

        try:
            yield note
        finally:
            note()

    def _write(self) -> None:
        if self._writes:
            rounded = {phase: round(value, 1) for phase, value in self.seconds.items()}
            write_json_atomic(self._path, {"seconds": rounded, "cpu_count": len(os.sched_getaffinity(0))})
