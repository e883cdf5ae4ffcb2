"""The package map, the wheel's probe, and pyright's links agree with the folders."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("callbacks", "datamodules", "lightning_modules")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders_with_modules() -> set[str]:
    """Import names of all folders that hold ``.py`` files, found by walking."""
    names = set()
    for top in ("theodolite", *ROOMS):
        for folder, _, files in os.walk(ROOT / top):
            if any(file.endswith(".py") for file in files):
                parts = Path(folder).relative_to(ROOT).parts
                names.add(".".join(parts if top == "theodolite" else ("theodolite", *parts)))
    return names


def test_packages_listed_are_the_folders_that_hold_modules() -> None:
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders_with_modules()


def test_every_package_has_an_init_file() -> None:
    missing = [name for name in folders_with_modules() if not (folder_of(name) / "__init__.py").is_file()]
    assert not missing


def folder_of(name: str) -> Path:
    parts = name.split(".")
    return ROOT.joinpath(*(parts[1:] if len(parts) > 1 and parts[1] in ROOMS else parts))


@pytest.mark.parametrize("room", ROOMS)
def test_pyright_finds_the_room_through_its_link(room: str) -> None:
    link = ROOT / "typings" / "theodolite" / room
    assert link.is_symlink()
    assert not Path(os.readlink(link)).is_absolute()
    assert link.resolve() == ROOT / room


def test_nothing_else_is_linked_for_pyright() -> None:
    # a file here would shadow the real one of the same name
    assert sorted(path.name for path in (ROOT / "typings" / "theodolite").iterdir()) == sorted(ROOMS)


def test_nothing_imports_a_room_by_its_folder_name() -> None:
    """It would be a second copy of every class, of which isinstance and short names know nothing."""
    sources = [path for top in ("theodolite", "tests", "benchmarks", *ROOMS) for path in (ROOT / top).rglob("*.py")]
    found = [f"{path.relative_to(ROOT)}: {name}" for path in [*sources, ROOT / "train.py"] for name in absolute_imports(path)]
    assert not [line for line in found if line.rpartition(" ")[2].split(".")[0] in ROOMS]


def absolute_imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.append(node.module)
    return names


def test_pyright_reports_a_wrong_call_across_rooms(tmp_path: Path) -> None:
    """The links are of no use if pyright silently takes everything behind them for unknown."""
    for name in ("theodolite", *ROOMS, "typings"):
        (tmp_path / name).symlink_to(ROOT / name)
    probe = tmp_path / "probe.py"
    imports = "from theodolite.datamodules.leetcode.problem import Problem\nfrom theodolite.seeds import derive_seed\n"
    probe.write_text(imports + "Problem(3.5)\nderive_seed(1.5)\n")
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", str(probe)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "could not be resolved" not in done.stdout
    assert '"line": 2' in done.stdout
    assert '"line": 3' in done.stdout


def test_console_script_points_at_main() -> None:
    module, _, function = PYPROJECT["project"]["scripts"]["theodolite"].partition(":")
    assert importlib.util.find_spec(module) is not None
    assert function == "main"


def test_constraints_pin_every_direct_dependency() -> None:
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["dev"]
    names = {item.split(">=")[0].split("[")[0].lower().replace("_", "-") for item in wanted}
    assert names <= pinned
