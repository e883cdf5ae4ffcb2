"""What is imported when: a package's names when they are asked for, the rooms' modules when a configuration names one of their classes."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from theodolite.cli import ROOMS, import_named
from theodolite.config_layers import Layer, texts
from theodolite.lazy_names import class_index, lazy_names

ROOT = Path(__file__).resolve().parents[1]
LAZY = ("callbacks", "lightning_modules", "datamodules/leetcode")


def made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package of which one module cannot be imported."""
    package = folder / "lazy_example"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("class Top: ...\n")
    (package / "good.py").write_text("class Good:\n    class Nested: ...\nclass _Hidden: ...\ntext = 'class InText: ...'\n")
    (package / "bad.py").write_text("raise RuntimeError('imported')\nclass Bad(\n    int): ...\n")
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "deep.py").write_text("class Good: ...\n")
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "lazy_example"]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("lazy_example")


def test_public_classes_are_found_in_the_source_and_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = made(tmp_path, monkeypatch)
    found = class_index(package)
    assert found == {
        "Top": ["lazy_example"],
        "Good": ["lazy_example.good", "lazy_example.inner.deep"],
        "Bad": ["lazy_example.bad"],
    }
    assert not [name for name in sys.modules if name.startswith("lazy_example.")]


def test_a_name_is_imported_when_it_is_asked_for_and_then_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = made(tmp_path, monkeypatch)
    package.__getattr__ = lazy_names("lazy_example", {"Good": ".good", "Bad": ".bad"})
    assert "lazy_example.good" not in sys.modules
    assert package.Good is importlib.import_module("lazy_example.good").Good
    assert vars(package)["Good"] is package.Good
    with pytest.raises(RuntimeError, match="imported"):
        _ = package.Bad
    with pytest.raises(AttributeError, match="module 'lazy_example' has no attribute 'Gone'"):
        _ = package.Gone


@pytest.mark.parametrize("room", LAZY)
def test_what_a_room_declares_for_type_checkers_is_what_it_offers(room: str) -> None:
    package = importlib.import_module(f"theodolite.{room.replace('/', '.')}")
    tree = ast.parse((ROOT / room / "__init__.py").read_text())
    declared = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module not in ("typing", "theodolite.lazy_names")
    ]
    names = {alias.name for node in declared for alias in node.names}
    offered = next(node for node in ast.walk(tree) if isinstance(node, ast.Dict))
    assert names == {str(ast.literal_eval(key)) for key in offered.keys if key is not None}
    written = {name: modules for name, modules in class_index(package).items() if name in names}
    where = {str(ast.literal_eval(k)): str(ast.literal_eval(v)) for k, v in zip(offered.keys, offered.values, strict=True) if k is not None}
    assert all(any(m.startswith(f"{package.__name__}{where[name]}") for m in modules) for name, modules in written.items())
    assert set(written) == names


@pytest.mark.parametrize("room", ROOMS)
def test_the_index_of_a_room_is_true(room: str) -> None:
    index = class_index(importlib.import_module(f"theodolite.{room.replace('/', '.')}"))
    assert len(index) > 10
    for name in sorted(index)[::9]:
        assert all(getattr(importlib.import_module(module), name).__module__ == module for module in index[name])


def test_texts_are_found_wherever_they_stand_but_not_as_keys() -> None:
    tree = {"key": "one", "list": [{"class_path": "two"}, ["three"], 4, None, True], "deep": {"er": {"est": "four"}}}
    assert list(texts(tree)) == ["one", "two", "three", "four"]
    import_named([Layer("here", tree)])


STARTED = """
import json, sys
from theodolite.cli import check_args
from theodolite.config_layers import ConfigError
check_args(["fit", "--config=configs/grpo/mini.yaml", "--trainer.callbacks+=Heartbeat"])
named = [name in sys.modules for name in NAMES]
try:
    check_args(["fit", "--config=configs/grpo/mini.yaml", "--trainer.callbacks+=BestOfKCalback"])
except ConfigError as error:
    print(json.dumps([named, str(error)]))
"""


@pytest.mark.slow
def test_a_run_imports_what_its_configuration_names_and_a_mistake_is_still_told_from_all_there_is() -> None:
    wanted = ["theodolite.callbacks.heartbeat", "theodolite.lightning_modules.grpo.module", "theodolite.datamodules.leetcode.datamodule"]
    unwanted = ["pandas", "pyarrow", "theodolite.callbacks.best_of_k", "theodolite.lightning_modules.decomposition"]
    script = STARTED.replace("NAMES", repr([*wanted, *unwanted]))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=True
    )
    named, said = json.loads(done.stdout.splitlines()[-1])
    assert named == [True] * len(wanted) + [False] * len(unwanted)
    assert "the closest is BestOfKCallback (theodolite.callbacks.best_of_k.BestOfKCallback)" in said


def test_grading_imports_no_trainer() -> None:
    source = "import sys, theodolite.datamodules.leetcode.grade as grade; print({'lightning', 'transformers', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "set()\n"
