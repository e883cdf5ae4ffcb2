"""Two runs' resolved configs side by side: what differs, and on request everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ABSENT = "-"


def compare_runs(first: Path, second: Path, everything: bool = False) -> str:
    """A table of dotted keys and both values, as text.

    Args:
        first: A run's directory.
        second: Another's.
        everything: Also the keys that are the same in both.

    Raises:
        FileNotFoundError: A directory holds no ``config.yaml``.
    """
    one, other = (_config(path) for path in (first, second))
    keys = sorted({*one, *other})
    rows = [(key, one.get(key, ABSENT), other.get(key, ABSENT)) for key in keys]
    different = [row for row in rows if row[1] != row[2]]
    shown = [("key", str(first), str(second)), *(rows if everything else different)]
    widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
    lines = [f"{key:<{widths[0]}}  {a:<{widths[1]}}  {b}".rstrip() for key, a, b in shown]
    return "\n".join([*lines, f"{len(different)} of {len(rows)} keys differ"]) + "\n"


def _config(run: Path) -> dict[str, str]:
    path = run / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the directories of two runs")
    return _flat(yaml.safe_load(path.read_text(encoding="utf-8")))


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Leaves by dotted key; list entries by their position, so that a callback's own settings are compared."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) and value else None
    if not items:
        return {prefix: "null" if value is None else str(value)}
    leaves: dict[str, str] = {}
    for name, inner in items:
        leaves |= _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    return leaves
