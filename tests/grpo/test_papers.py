"""Every line of docs/papers.md parses as the command line would, and every policy objective in it can be built."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_policies import POLICIES

from theodolite.cli import main
from theodolite.lightning_modules import GRPOModule

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "papers.md").read_text()
LINES = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if re.match(r"\| .*`configs/", line)]


def arguments(base: str, options: str) -> list[str]:
    return ["fit", "--config", base.strip("`"), *shlex.split(options.strip("`"))]


def parsed(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    printed = capsys.readouterr()
    assert not stop.value.code, printed.err
    return yaml.safe_load(printed.out)


def test_every_line_of_the_page_is_read() -> None:
    assert len(LINES) == PAGE.count("`configs/")
    assert all(len(line) == 4 for line in LINES)


def test_every_objective_s_keys_parse_together(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = [shlex.split(options.strip("`")) for _, base, options, _ in LINES if base == "`configs/grpo/mini.yaml`"]
    keys = [option for line in options for option in line if option.startswith("--model.")]
    assert len(keys) > 30
    parsed(["fit", "--config", "configs/grpo/mini.yaml", *keys], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES, ids=[line[0] for line in LINES])
def test_a_line_parses_and_its_objective_can_be_built(
    line: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = parsed(arguments(line[1], line[2]), capsys)
    if config["model"]["class_path"].endswith("GRPOModule"):
        tiny = {"policy": POLICIES["qwen3"], "train_tokenizer": {"vocab_size": 280}, "export": False}
        module = GRPOModule(**(config["model"]["init_args"] | tiny))
        assert module.aggregation in line[2] or "aggregation" not in line[2]
