"""A callback that kills its process where a run must be able to go on from its last checkpoint."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class KillAt(Callback):
    """``kill -9`` in a step, or in the middle of writing a checkpoint.

    Args:
        step: Optimizer steps before.
        writing: Leave half of the next checkpoint instead of dying before the update.
    """

    def __init__(self, step: int, writing: bool = False) -> None:
        super().__init__()
        self.step, self.writing = step, writing

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.writing and trainer.global_step == self.step:
            trainer.strategy.checkpoint_io.save_checkpoint = _half_a_file

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.writing and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _half_a_file(checkpoint: Any, path: Any, storage_options: Any = None) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(b"half of a checkpoint")
    os.kill(os.getpid(), signal.SIGKILL)
