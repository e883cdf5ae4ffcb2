"""The talkative demo: what it checks, and that nothing stale is kept."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from theodolite.demo_talkative import checks_of, find_result, job, main
from theodolite.provenance import write_json_atomic


def result(**changes: Any) -> dict[str, Any]:
    given = {"values": [0.8, 0.85, 0.87], "gain": [0.0, 0.05, 0.07], "low": [0.0, 0.04, 0.05], "null": [-0.8, -0.7, -0.2]} | changes
    return {
        "k_values": [1, 2, 4],
        "curves": {"best_of_k.reconstructor": {"fve": {"value": given["values"]}}, "null": {"fve": {"value": given["null"]}}},
        "gains": {"best_of_k.reconstructor": {"value": given["gain"], "ci_lower": given["low"], "ci_upper": given["gain"]}},
    }


def test_checks_hold_for_a_good_sweep_and_each_fails_alone() -> None:
    assert [check.holds for check in checks_of(result())] == [True] * 4
    bad = [{"values": [0.5, 0.85, 0.87]}, {"low": [0.0, 0.0, -0.01]}, {"null": [-0.8, -0.7, 0.01]}, {"values": [0.8, 0.85, 0.849]}]
    for place, changes in enumerate(bad):
        assert [check.holds for check in checks_of(result(**changes))] == [other != place for other in range(4)]
    assert not checks_of(result(gain=[0.0, 0.01, 0.015]))[1].holds


def test_a_run_is_repeated_when_what_it_builds_on_changed(tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path, seed=0, processes=1, configs=Path(__file__).resolve().parents[2] / "configs")
    weights = tmp_path / "target" / "policy" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"one")
    first = job("sft", options)
    layer = next(Path(arg.removeprefix("--config=")) for arg in first.args if arg.endswith("layers/sft.yaml"))
    text = layer.read_text()
    assert str(tmp_path / "banks") in text
    job("sft", options)
    assert layer.read_text() == text
    weights.write_bytes(b"two")
    job("sft", options)
    assert layer.read_text() != text


def test_results_are_found_by_the_weights_they_measure(tmp_path: Path) -> None:
    for stage in ("sft", "grpo"):
        write_json_atomic(tmp_path / f"k_sweep_results-{stage}.json", {"checkpoint_path": f"runs/x/{stage}/talkative", "stage": stage})
        write_json_atomic(tmp_path / f"k_sweep_results-{stage}.timings.json", {"seconds": {}})
    assert find_result(tmp_path, "grpo")["stage"] == "grpo"
    with pytest.raises(FileNotFoundError, match="no result for the weights of gumbel"):
        find_result(tmp_path, "gumbel")


def test_a_wrong_folder_of_configs_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--configs", str(tmp_path)])
    assert stop.value.code == 2
    assert "run from a checkout" in capsys.readouterr().err
