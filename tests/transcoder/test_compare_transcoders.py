"""The comparison of coders of several layers, arms and seeds: read from run folders, paired, drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from theodolite.reports.compare_transcoders import build_comparison, find_runs, paired
from theodolite.reports.transcoder_page import _panels

LAYERS, SEEDS = (2, 5, 9), (0, 1)


def save_run(folder: Path, arm: str, layer: int, seed: int) -> Path:
    run = folder / f"{arm}-{layer}-{seed}"
    run.mkdir(parents=True)
    source = "mlp_in" if arm == "corrected" else "resid_mid"
    data = {"init_args": {"input_site": f"{source}.{layer}", "target_site": f"mlp_out.{layer}", "model": "tiny"}}
    (run / "config.yaml").write_text(json.dumps({"data": data}))
    (run / "run.json").write_text(json.dumps({"arm": arm, "seed": seed, "command": "theodolite fit"}))
    fvu = 0.1 + 0.02 * layer + 0.001 * seed + (0.03 + 0.002 * seed) * (arm == "legacy")
    test = {"test/fvu": fvu, "test/fvu_16": 2.5 * fvu, "test/fvu_64": fvu, "test/l0": 8.0}
    steps = [{"step": 0, "train/fvu": 1.0}, {"step": 10, "train/fvu": fvu * 1.1}, {"step": 10, **test}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for arm in ("corrected", "legacy"):
        for layer in LAYERS:
            for seed in SEEDS:
                save_run(tmp_path / "runs", arm, layer, seed)
    return tmp_path / "runs"


def test_layers_are_drawn_and_paired_one_by_one(folder: Path, tmp_path: Path) -> None:
    runs = find_runs([folder])
    assert _panels(runs) == ["prefixes", "training", "layers"]
    difference = paired(runs, "legacy", "corrected", "fvu")
    assert difference["n"] == len(LAYERS) * len(SEEDS)
    assert difference["mean"] == pytest.approx(0.031)
    summary = build_comparison([folder], tmp_path / "page")
    assert sorted({run["layer"] for run in summary["runs"]}) == list(LAYERS)
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("mlp_in.5 → mlp_out.5") == 2, "one row for the layer in each of the two tables"
    assert "0.2005 ± 0.0007" in page, "the mean over seeds of layer 5"
    assert "n=6 pairs" in page
    assert (tmp_path / "page" / "fvu.png").read_bytes().startswith(b"\x89PNG")


def test_two_runs_of_one_arm_seed_and_layer_are_refused(folder: Path) -> None:
    runs = find_runs([folder])
    with pytest.raises(ValueError, match="arm legacy have the same seed and layer"):
        paired([*runs, *runs], "legacy", "corrected", "fvu")
