"""What a number was made from: atomic files, content hashes and the manifest that stands beside every artefact."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
"""Of the manifest. Raised when a field changes its meaning."""

LIBRARIES = (
    "theodolite",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "torchmetrics",
    "jsonargparse",
    "numpy",
    "safetensors",
    "tokenizers",
)
"""Distributions whose version can change a number."""


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a text file as UTF-8, like :func:`write_bytes_atomic`."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file so that a reader sees the old content or the new, never a half.

    The bytes go to a temporary file in the same folder (made if missing), reach the disk, and are renamed over ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; results are for sharing, so give them what open() would have given
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as indented JSON, atomically.

    Raises:
        ValueError: If a float is not finite: JSON has no such number.
        TypeError: If something is not plain data.
    """
    write_text_atomic(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


def content_hash(obj: Any) -> str:
    """SHA-256 (hex) of an object's canonical JSON: sorted keys, no spaces, UTF-8.

    Raises:
        ValueError: If a float is not finite.
        TypeError: If something is not plain data (str, int, float, bool, None, list, tuple, dict).
    """
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_hash(paths: Iterable[str | Path]) -> str:
    """SHA-256 (hex) over the names and contents of source files, whatever the order given and wherever they lie.

    Args:
        paths: Files, or folders whose ``.py`` files are taken recursively. A file in a folder is named relative to the folder, a
            file given directly by its own name, so that the hash is the same in every checkout.

    Raises:
        FileNotFoundError: If a path does not exist: a cache key over nothing would never change.
    """
    entries: list[tuple[str, str]] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"Cannot hash {path}: there is no such file or folder.")
        if path.is_dir():
            entries += [(f"{path.name}/{file.relative_to(path).as_posix()}", file_hash(file)) for file in path.rglob("*.py")]
        else:
            entries.append((path.name, file_hash(path)))
    return content_hash(sorted(entries))


def library_versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Installed versions by distribution name, and ``python``; a distribution that is not installed is left out."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit(folder: str | Path) -> str | None:
    """The commit whose checkout holds ``folder``'s files, with ``+changes`` if tracked files differ from it; else ``None``."""
    commit = _git(folder, "rev-parse", "HEAD")
    # an environment inside someone else's checkout is not part of it
    if commit is None or not _git(folder, "ls-files", "--", "."):
        return None
    return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def manifest(
    config: Mapping[str, Any] | None = None,
    *,
    argv: Sequence[str] | None = None,
    model: str | None = None,
    model_revision: str | None = None,
    seeds: Mapping[str, int] | None = None,
    batch_arithmetic: Mapping[str, int] | None = None,
    files: Mapping[str, str | Path] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Everything needed to say where an artefact came from. Fields that are not known are ``null``, never absent.

    Args:
        config: The resolved configuration as plain data; only its hash is kept.
        argv: The command line; the home folder is written as ``~``.
        model: Hub id or path of the model.
        model_revision: Its commit on the hub.
        seeds: Seeds by what they are for.
        batch_arithmetic: ``BatchArithmetic.as_dict()``.
        files: Artefacts by name; their SHA-256 go in under ``content_hashes``.
        extra: Further plain-data fields.

    Returns:
        Plain data for :func:`write_json_atomic`.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "config_hash": None if config is None else content_hash(config),
        "model": None if model is None else _without_home(model),
        "model_revision": model_revision,
        "seeds": dict(seeds or {}),
        "batch_arithmetic": None if batch_arithmetic is None else dict(batch_arithmetic),
        "libraries": library_versions(),
        "content_hashes": {name: file_hash(path) for name, path in (files or {}).items()},
        "git_commit": git_commit(Path(__file__).parent),
        "argv": None if argv is None else [_without_home(argument) for argument in argv],
    } | extra


def _without_home(argument: str) -> str:
    home = str(Path.home())
    return argument.replace(home, "~") if len(home) > 1 else argument


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _git(folder: str | Path, *arguments: str) -> str | None:
    """Output of a git command, or None where there is no git or no checkout: an installed wheel has neither."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
