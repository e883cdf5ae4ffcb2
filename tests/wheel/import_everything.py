"""Run by ``check_wheel.py`` in a bare interpreter: import all of an installed theodolite, then check the import rules on it.

python -I -S import_everything.py INSTALLED FOREIGN LIBRARIES
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path


def main(installed: str, foreign: str, libraries: str) -> int:
    """Number of things that are wrong, each printed."""
    installed, foreign = str(Path(installed).resolve()), str(Path(foreign).resolve())
    sys.path[:0] = [installed, foreign, libraries]
    problems: list[str] = []
    package = importlib.import_module("theodolite")
    names = ["theodolite", *(module.name for module in pkgutil.walk_packages(package.__path__, "theodolite."))]
    for name in names:
        if name.endswith(".__main__"):
            continue
        try:
            origin = importlib.import_module(name).__file__ or ""
        except Exception as error:
            problems.append(f"importing {name} failed: {type(error).__name__}: {error}")
            continue
        if not Path(origin).resolve().is_relative_to(installed):
            problems.append(f"{name} came from {origin}, not from the wheel")
    if getattr(importlib.import_module("callbacks"), "OWNER", None) != "someone else":
        problems.append("`import callbacks` is not the foreign package")
    print(f"wheel: {len(names)} modules imported")
    for problem in problems:
        print(f"wheel: {problem}", file=sys.stderr)
    return len(problems) or _import_rules()


def _import_rules() -> int:
    from importlinter.cli import lint_imports

    return lint_imports(config_filename="pyproject.toml", no_cache=True, no_logo=True)


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 100))
