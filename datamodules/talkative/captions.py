"""Captions of activations: what a verbaliser's warm start learns to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol, runtime_checkable

from theodolite.protocols import ActivationRows


@runtime_checkable
class CaptionSource(Protocol):
    """Knows a caption for every row of a bank."""

    def captions(self, rows: ActivationRows) -> tuple[str, ...]:
        """One text per row, in order. Raises ``ValueError`` for a row without one."""
        ...


class FileCaptions:
    """Captions of a ``.jsonl`` file: one object per line with the fields ``id`` (``<document>:<position>``) and ``caption``.

    Args:
        path: The file.

    Raises:
        ValueError: If there is no such file, a line lacks a field, or an id has two captions.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if not Path(path).is_file():
            raise ValueError(
                f"data.captions is {path!r}, and there is no such file; write one line per row with the fields id and caption."
            )
        self._captions: dict[str, str] = {}
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not {"id", "caption"} <= row.keys():
                    raise ValueError(f"Line {number} of {path} needs the fields id and caption, it has {sorted(row)}.")
                if self._captions.setdefault(str(row["id"]), row["caption"]) != row["caption"]:
                    raise ValueError(f"Line {number} of {path} gives the row {row['id']} a second caption; keep one.")

    def captions(self, rows: ActivationRows) -> tuple[str, ...]:
        """See :class:`CaptionSource`."""
        missing = next((name for name in rows.ids if name not in self._captions), None)
        if missing is not None:
            raise ValueError(f"{self.path} has no caption for the row {missing}; add a line for it, or lower the number of rows.")
        return tuple(self._captions[name] for name in rows.ids)
