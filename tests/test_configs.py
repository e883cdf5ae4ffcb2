"""Every YAML under configs/ parses, and those that say they are small run two batches.

A file that only makes sense over others names them, lowest first, in its leading comment, and a small one says so there:

    # over: configs/grpo/mini.yaml, configs/grpo/long.yaml
    # fast_dev_run: yes

``fast_dev_run: slowly`` leaves it to ``make test-slow``. A file that says ``differs from`` another is parsed there too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from warm_processes import run

from theodolite.cli import main

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "configs" / "experiment"  # files for theodolite-sweep, and their hypotheses: see test_sweep.py
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.y*ml") if STUDIES not in path.parents)


def declarations(path: Path) -> dict[str, str]:
    """``# key: value`` lines of the leading comment."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        key, colon, value = line.lstrip("# ").partition(":")
        if colon and key in ("over", "fast_dev_run", "differs from"):
            found[key] = value.strip()
    return found


def stack(name: str, root: Path = ROOT) -> list[str]:
    """A config with the layers under it, lowest first, each once; layers may have layers of their own."""
    layers: list[str] = []
    for under in declarations(root / name).get("over", "").split(","):
        if under.strip():
            layers += [layer for layer in stack(under.strip(), root) if layer not in layers]
    return [*layers, name]


def arguments(name: str, root: Path = ROOT) -> list[str]:
    return ["fit", *(f"--config={root / layer}" for layer in stack(name, root))]


def parse(args: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    return stop.value.code


VARIANTS = {name for name in CONFIGS if "differs from" in declarations(ROOT / name)}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in VARIANTS)) for name in CONFIGS])
def test_config_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = parse(arguments(name))
    assert not code, capsys.readouterr().err


SMALL = {name: answer for name in CONFIGS if (answer := declarations(ROOT / name).get("fast_dev_run")) in ("yes", "slowly")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (answer == "slowly")) for name, answer in SMALL.items()])
def test_small_config_runs_two_batches(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = ["--trainer.fast_dev_run=2", "--trainer.accelerator=cpu", "--trainer.devices=1", f"--run_dir={tmp_path}"]
    assert run(["-m", "theodolite", *arguments(name), *options], tmp_path / "log.txt") == 0, (tmp_path / "log.txt").read_text()[-2000:]


def test_stack_resolves_layers_in_order_and_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("trainer:\n  max_epochs: 1\n")
    (tmp_path / "b.yaml").write_text("# What b is for.\n# over: a.yaml\ntrainer:\n  max_epochs: 2\n")
    (tmp_path / "c.yaml").write_text("# over: a.yaml, b.yaml\n# fast_dev_run: yes\n\n# over: z.yaml\ntrainer: {}\n")
    assert stack("c.yaml", tmp_path) == ["a.yaml", "b.yaml", "c.yaml"]
    assert declarations(tmp_path / "c.yaml") == {"over": "a.yaml, b.yaml", "fast_dev_run": "yes"}


def test_a_layer_that_does_not_parse_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.yaml").write_text("model:\n  class_path: lightning.pytorch.demos.boring_classes.BoringModel\n")
    (tmp_path / "good.yaml").write_text("# over: base.yaml\ntrainer:\n  max_steps: 3\n")
    (tmp_path / "bad.yaml").write_text("# over: base.yaml\ntrainer:\n  max_stepz: 3\n")
    assert not parse(arguments("good.yaml", tmp_path))
    assert "max_steps: 3" in capsys.readouterr().out
    assert parse(arguments("bad.yaml", tmp_path)) == 2
    assert "max_stepz" in capsys.readouterr().err
