"""Checkpoints that are whole or not there, wherever temporary files lie."""

from __future__ import annotations

import io
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from theodolite.provenance import write_bytes_atomic


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint's own name and renames.

    Lightning's own writes into the folder for temporary files and moves the file from there: on another file system that is a copy, and a
    process that dies meanwhile leaves half a checkpoint under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See :class:`~lightning.fabric.plugins.CheckpointIO`; what goes to object storage is left to upstream."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_bytes_atomic(path, buffer.getbuffer())
