"""The config for Gemma-2-2B, end to end on a tiny random Gemma-2: fit, calibrated export, test with the transcoder spliced in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from tiny_language_models import tiny_language_model  # noqa: E402

from theodolite.cli import RUN_DIR_VARIABLE, main  # noqa: E402
from theodolite.lightning_modules.transcoder.weights import load_own  # noqa: E402
from theodolite.reports.compare_transcoders import build_comparison  # noqa: E402

CONFIGS = TESTS.parent / "configs" / "transcoder"
TINY: dict[str, Any] = {
    "model": {"init_args": {"latents": 512, "prefix_blocks": [32, 64, 128, 288], "k": 4, "warmup_steps": 2, "lr": 0.005}},
    "data": {
        "init_args": {
            "text": {"class_path": "theodolite.datamodules.text.documents.SyntheticEnglish", "init_args": {"documents": 200}},
            "dtype": "float32", "tokenizer": "bytes", "buffer_rows": 32, "global_batch_size": 128, "packing": {"length": 32},
            "validation_rows": 8, "validation_share": 0.2, "test_share": 0.2,
        }
    },
    "trainer": {
        "max_steps": 12, "val_check_interval": 6, "accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 3,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "callbacks": [{"class_path": "theodolite.callbacks.transcoder_splice.SpliceEvaluation", "init_args": {"sequences": 4}}],
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_gemma_configs_run_on_a_tiny_gemma(tmp_path: Path) -> None:
    """Corrected and legacy sites, then both on one page."""
    model = tiny_language_model("gemma2", vocab_size=258, num_hidden_layers=10)
    model.save_pretrained(tmp_path / "gemma")  # type: ignore[operator]
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    layers = [f"--config={CONFIGS / name}.yaml" for name in ("gpt2", "gemma2_2b")]
    for arm, more in (("corrected", []), ("legacy", [f"--config={CONFIGS / 'gemma2_2b_legacy.yaml'}"])):
        common = [*layers, *more, f"--config={tmp_path}/tiny.yaml", f"--data.model={tmp_path}/gemma"]
        main(["fit", *common, f"--run_dir={tmp_path}/{arm}"])
        main(["test", *common, f"--model.pretrained={tmp_path}/{arm}/transcoder", f"--run_dir={tmp_path}/{arm}"])
    weights = load_own(tmp_path / "legacy" / "transcoder")
    assert (weights.input_site, weights.target_site, weights.prefixes) == ("resid_mid.8", "mlp_out.8", (32, 96, 224, 512))
    summary = build_comparison([tmp_path / "corrected", tmp_path / "legacy"], tmp_path / "page")
    assert [run["stage"] for run in summary["runs"]] == ["test", "test"]
    assert [run["input_site"] for run in summary["runs"]] == ["mlp_in.8", "resid_mid.8"]
    values = summary["runs"][0]["values"]
    assert {"fvu", "fvu_32", "fvu_512", "l0", "dead_fraction", "ce", "ce_recovered", "kl_spliced"} <= set(values)
    assert abs(values["l0"] - 4) < 1, "k on the tokens of calibration, about k on those of the test"
    assert summary["comparisons"][0]["n"] == 1
    page = (tmp_path / "page" / "index.html").read_text()
    assert "resid_mid.8" in page
    assert (tmp_path / "page" / "fvu.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "page" / "summary.json").read_text()) == summary
