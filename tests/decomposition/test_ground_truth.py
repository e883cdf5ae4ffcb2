"""Toy models whose parts are known are taken apart into them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from theodolite.cli import RUN_DIR_VARIABLE, main
from theodolite.functional.decomposition_losses import importance_minimality

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "decomposition"
LAYERS = ["tms_5-2.yaml", "tms_40-10.yaml", "tms_40-10-id.yaml"]


def test_the_penalty_of_the_config_makes_one_component_for_two_features_dearer_than_two() -> None:
    losses = yaml.safe_load((CONFIGS / "tms_40-10.yaml").read_text())["model"]["init_args"]["losses"]
    beta = next(loss["beta"] for loss in losses if loss["name"] == "importance_minimality")
    apart, shared = torch.tensor([25.0, 25.0]), torch.tensor([50.0, 0.0])  # sums of importances over 512 rows
    plain, dear = ([float(importance_minimality({"linear1": sums}, 512, b)) for sums in (apart, shared)] for b in (0.0, beta))
    assert plain[0] == pytest.approx(plain[1])
    assert dear[1] > 1.1 * dear[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layers", [LAYERS[:1], LAYERS[:2], LAYERS], ids=["tms_5-2", "tms_40-10", "tms_40-10-id"])
def test_toy_models_of_superposition_are_recovered(layers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    main(["fit", *(f"--config={CONFIGS / layer}" for layer in layers), f"--run_dir={tmp_path / 'run'}"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "val/identity_ci_error/total" in row][-1]
    assert last["val/identity_ci_error/total"] == 0
    assert last["val/recovery/linear1/mmcs"] > 0.99
    assert last["val/recovery/linear2/mmcs"] > 0.99
