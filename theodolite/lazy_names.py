"""Names of a package that are imported when they are first asked for, and which module defines a class, read from its source.

A run needs a few classes of the three rooms. What the others import (data frames, figures) would cost every start its seconds and every
process its memory.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

PUBLIC_CLASS = re.compile(r"^class ([A-Za-z]\w*)", re.MULTILINE)


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``: imports a name's module when the name is first asked for, and keeps the name.

    Args:
        package: The package's ``__name__``.
        modules: Module of each name, relative to the package (``.rollouts``).
    """

    def attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(modules[name], package), name)
        setattr(sys.modules[package], name, found)
        return found

    return attribute


def class_index(package: ModuleType) -> dict[str, list[str]]:
    """Modules of a package and of its subpackages by the names of the public classes that each defines; none of them is imported."""
    found: dict[str, list[str]] = {}
    for folder in package.__path__:
        for file in sorted(Path(folder).rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            module = ".".join([package.__name__, *parts]).removesuffix(".__init__")
            for name in PUBLIC_CLASS.findall(file.read_text(encoding="utf-8")):
                found.setdefault(name, []).append(module)
    return found
