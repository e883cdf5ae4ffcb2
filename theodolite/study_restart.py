"""Where an interrupted run of a study goes on: at the last whole checkpoint that the very same run left, or at its first step.

While a run is under way ``begun.json`` says what it is: its arguments, the content of configs and of this package's sources, and the
versions of libraries. Once training has ended it also says how many rows were logged by then, so that only the test is repeated. What
failed by itself, and so has no such file, begins at its first step: going on would meet the same end.

Going on is exact: rows and tables beyond the checkpoint are cut or written anew with the same content (``theodolite/run_recorder.py``). The
run says what happened: ``continued_from_steps`` in its ``manifest.json`` and ``run.json``.
"""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from theodolite.provenance import library_versions, tree_hash, write_json_atomic

BEGUN = "begun.json"
"""In a run's folder from its start until it is complete or has failed."""
PACKAGES = ("theodolite", "theodolite.callbacks", "theodolite.datamodules", "theodolite.lightning_modules")


@dataclass(frozen=True, slots=True)
class Restart:
    """Where a run goes on.

    Attributes:
        checkpoint: The file.
        step: Optimizer steps taken before it was saved.
        fitted_rows: Rows logged when training had ended, where only the test is left to do; None where training goes on.
        earlier: Steps of the checkpoints that it was continued from before.
    """

    checkpoint: Path
    step: int
    fitted_rows: int | None
    earlier: tuple[int, ...] = ()


def identity(args: tuple[str, ...], configs: Mapping[str, str]) -> dict[str, Any]:
    """What two calls must share for one to continue what the other began.

    Args:
        args: The run's command line.
        configs: Content hash by argument of the configs that it names.
    """
    folders = [Path(folder) for name in PACKAGES for folder in _locations(name)]
    return {"args": list(args), "configs": dict(configs), "sources": tree_hash(folders), "libraries": library_versions()}


def _locations(package: str) -> list[str]:
    found = importlib.util.find_spec(package)
    assert found is not None, f"{package} is part of every installation"
    return list(found.submodule_search_locations or [])


def find_restart(run_dir: Path, same: Mapping[str, Any]) -> Restart | None:
    """The newest whole checkpoint of an interrupted run that is the same as ``same`` says; None = it begins at its first step.

    A run whose length is not a number of optimizer steps (``trainer.max_steps``) begins again: nobody could tell a checkpoint of its end.

    Args:
        run_dir: The run's folder.
        same: Its :func:`identity` now.
    """
    path, length = run_dir / BEGUN, _length(run_dir)
    if length is None or not path.is_file():
        return None
    begun = json.loads(path.read_text(encoding="utf-8"))
    if any(begun.get(key) != value for key, value in same.items()):
        return None
    earlier = tuple(begun["continued_from_steps"])
    files = [file for file in (run_dir / "checkpoints").glob("*.ckpt") if zipfile.is_zipfile(file)]  # a zip's end is written last
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        step, rows = _position(file)
        if rows is None or rows > _rows(run_dir):
            continue  # rows that it counts on are lost
        if step < length:
            return Restart(file, step, None, earlier)
        if begun["fitted_rows"] is not None:
            return Restart(file, step, begun["fitted_rows"], earlier)
    return None


def _length(run_dir: Path) -> int | None:
    """Optimizer steps of the whole run, by its resolved config; None where something else ends it too."""
    path = run_dir / "config.yaml"
    trainer = yaml.safe_load(path.read_text(encoding="utf-8")).get("trainer", {}) if path.is_file() else {}
    steps, others = trainer.get("max_steps"), (trainer.get("max_epochs"), trainer.get("max_time"))
    return steps if isinstance(steps, int) and steps > 0 and all(other in (None, -1) for other in others) else None


def _position(checkpoint: Path) -> tuple[int, int | None]:
    """Optimizer steps before a checkpoint, and the rows that were on disk; None where it does not say."""
    import torch  # here: a study that continues nothing needs none of it in the process that starts the runs

    from theodolite.run_recorder import CHECKPOINT_KEY

    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return int(content["global_step"]), content.get(CHECKPOINT_KEY, {}).get("rows")


def _rows(run_dir: Path) -> int:
    from theodolite.run_logger import RunLogger

    return RunLogger(str(run_dir)).row_count()


class Attempt:
    """One attempt at a run, as ``begun.json`` tells of it.

    Args:
        run_dir: The run's folder.
        same: Its :func:`identity`.
        restart: Where it goes on; None = at its first step.
    """

    def __init__(self, run_dir: Path, same: Mapping[str, Any], restart: Restart | None) -> None:
        self._path = run_dir / BEGUN
        steps = [] if restart is None else [*restart.earlier, restart.step]
        rows = None if restart is None else restart.fitted_rows
        self._begun: dict[str, Any] = {**same, "continued_from_steps": steps, "fitted_rows": rows}
        write_json_atomic(self._path, self._begun)

    def fitted(self) -> None:
        """Training has ended: write down how many rows there are. A test that was cut short before leaves none of its own."""
        from theodolite.run_logger import RunLogger

        logger = RunLogger(str(self._path.parent))
        if self._begun["fitted_rows"] is not None:
            logger.keep_rows(self._begun["fitted_rows"])
        self._begun["fitted_rows"] = logger.row_count()
        write_json_atomic(self._path, self._begun)

    def told(self) -> dict[str, list[int]]:
        """What the run says of itself where it was continued, also in its manifest: optimizer steps before each checkpoint."""
        steps = self._begun["continued_from_steps"]
        if not steps:
            return {}
        path = self._path.parent / "manifest.json"
        write_json_atomic(path, json.loads(path.read_text(encoding="utf-8")) | {"continued_from_steps": steps})
        return {"continued_from_steps": steps}

    def ended(self) -> None:
        """The run is complete: nothing of it is to be continued."""
        self._path.unlink(missing_ok=True)
