"""A sign of life that outlives a hang: which phase, since when, and every thread's stack once it has taken too long."""

from __future__ import annotations

import faulthandler
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from theodolite.provenance import write_json_atomic


class Heartbeat(Callback):
    """Writes ``heartbeat-<rank>.json`` into the run's folder while a fit runs, and ``stacks-<rank>.txt`` when a phase exceeds its limit.

    The beat comes from a thread of its own, so it goes on while the main one waits for a collective, a grader or a kernel. A module that
    names what it is doing in ``phase`` and ``phase_started`` (policy modules do) gets its phases watched; for others it is the batch.
    Nothing is stopped: a slow phase that ends is only reported.

    Args:
        every_s: Seconds between two beats.
        limit_s: Seconds after which a phase is taken for stuck; its stacks are written once.
        limits: Other limits by phase, e.g. ``{"rollouts": 1800}``.
    """

    def __init__(self, every_s: float = 10.0, limit_s: float = 600.0, limits: dict[str, float] | None = None) -> None:
        if every_s <= 0 or limit_s <= 0:
            raise ValueError(f"Heartbeat needs positive times, got every_s={every_s} and limit_s={limit_s}.")
        self.every_s, self.limit_s, self.limits = every_s, limit_s, dict(limits or {})
        self.dumps = 0
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._batch = ("start", time.monotonic())
        self._dumped: tuple[str, float] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start beating."""
        if getattr(trainer, "fast_dev_run", False):
            return
        self._stop.clear()
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._beat, args=(trainer, pl_module, folder), daemon=True, name="heartbeat")
        self._thread.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A new batch."""
        self._batch = ("batch", time.monotonic())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop beating."""
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop beating."""
        self._end()

    def _end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
            self._thread = None

    def _phase(self, module: Any) -> tuple[str, float]:
        name, since = getattr(module, "phase", None), getattr(module, "phase_started", None)
        return (name, since) if isinstance(name, str) and isinstance(since, float) else self._batch

    def _beat(self, trainer: Trainer, module: LightningModule, folder: Path) -> None:
        rank = trainer.global_rank
        while not self._stop.wait(self.every_s):
            phase, since = self._phase(module)
            seconds = time.monotonic() - since
            late = seconds > self.limits.get(phase, self.limit_s)
            beat = {"time": time.time(), "step": trainer.global_step, "phase": phase, "seconds_in_phase": round(seconds, 1), "late": late}
            write_json_atomic(folder / f"heartbeat-{rank}.json", beat)
            if late and self._dumped != (phase, since):
                self._dumped = (phase, since)
                self.dumps += 1
                with open(folder / f"stacks-{rank}.txt", "a") as file:
                    file.write(f"step {trainer.global_step}: {phase} has taken {seconds:.0f} s\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
