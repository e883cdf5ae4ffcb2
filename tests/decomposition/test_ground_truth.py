"""Toy models whose parts are known are taken apart into them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from theodolite.cli import RUN_DIR_VARIABLE, main

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "decomposition"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layers", [["tms_5-2.yaml"], ["tms_5-2.yaml", "tms_40-10.yaml"]], ids=["tms_5-2", "tms_40-10"])
def test_toy_models_of_superposition_are_recovered(layers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    main(["fit", *(f"--config={CONFIGS / layer}" for layer in layers), f"--run_dir={tmp_path / 'run'}"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "val/identity_ci_error/total" in row][-1]
    assert last["val/identity_ci_error/total"] == 0
    assert last["val/recovery/linear1/mmcs"] > 0.99
    assert last["val/recovery/linear2/mmcs"] > 0.99
