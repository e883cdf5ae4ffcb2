"""Through the real command line: two ranks train as one does, and a run killed at any step goes on as if nothing had happened."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the configs name classes of tiny_features
from warm_processes import run, run_ranks  # noqa: E402

from theodolite.cli import RUN_DIR_VARIABLE, main  # noqa: E402

CONFIG: dict[str, Any] = {
    "model": {
        "class_path": "theodolite.lightning_modules.TranscoderModule",
        "init_args": {
            "latents": 24, "k": 3, "prefixes": [8, 24], "lr": 3e-3, "warmup_steps": 3, "schedule": "cosine", "skip": True, "init": "random",
            "normalise": "standardise", "dead_after_tokens": 128, "auxiliary": 0.5,
        },
    },
    "data": {"class_path": "tiny_features.FeatureData", "init_args": {"tokens": 448, "d_out": 12, "global_batch_size": 64}},
    "trainer": {
        "accelerator": "cpu", "max_steps": 12, "max_epochs": -1, "val_check_interval": 4, "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_inherited_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def written(folder: Path, name: str, *callbacks: dict[str, Any], **trainer: Any) -> str:
    """A config whose run leaves its weights in ``folder/name``."""
    witness = {"class_path": "tiny_features.Witness", "init_args": {"folder": str(folder / name)}}
    content = CONFIG | {"trainer": CONFIG["trainer"] | {"callbacks": [witness, *callbacks]} | trainer}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content))
    return str(path)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.distributed
def test_two_ranks_train_and_evaluate_as_one(tmp_path: Path) -> None:
    """BatchTopK selects over the global batch, dead latents and thresholds are global, and the last evaluation batch is uneven."""
    main(["fit", f"--config={written(tmp_path, 'one')}", f"--run_dir={tmp_path}/run-one", "--trainer.devices=1"])
    line = ["fit", f"--config={written(tmp_path, 'two')}", f"--run_dir={tmp_path}/run-two", "--trainer.devices=2", "--trainer.strategy=ddp"]
    run_ranks(["-m", "theodolite", *line], tmp_path)
    weights = [load_file(tmp_path / name / f"weights-{rank}.safetensors") for name, rank in (("one", 0), ("two", 0), ("two", 1))]
    for name, expected in weights[0].items():
        for other in weights[1:]:
            assert torch.allclose(expected.double(), other[name].double(), atol=2e-6, equal_nan=True), name
    first, second = (rows(tmp_path / f"run-{name}") for name in ("one", "two"))
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], abs=1e-5) for key in a), (a, b)
    assert max(row.get("train/auxiliary_loss", 0.0) for row in first) > 0, "no latent died, so that path was not compared"


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The kill is in the second epoch; the metrics file, validation included, must be that of the uninterrupted run."""
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"},
    }
    kill = {"class_path": "tiny_features.KillAfter", "init_args": {"batch": 10}}
    log = tmp_path / "log.txt"
    line = ["fit", f"--config={written(tmp_path, 'killed', checkpoint, kill)}", f"--run_dir={tmp_path}/run-killed"]
    assert run(["-m", "theodolite", *line], log) == -signal.SIGKILL, log.read_text()[-3000:]
    main(["fit", f"--config={written(tmp_path, 'whole', checkpoint)}", f"--run_dir={tmp_path}/run-whole"])
    again = ["fit", f"--config={written(tmp_path, 'killed', checkpoint)}", f"--run_dir={tmp_path}/run-killed"]
    main([*again, f"--ckpt_path={tmp_path}/run-killed/checkpoints/step=9.ckpt"])
    expected, found = (load_file(tmp_path / name / "weights-0.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(expected[name].nan_to_num(), found[name].nan_to_num()) for name in expected)
    first, second = (tmp_path / f"run-{name}" / "metrics.jsonl" for name in ("whole", "killed"))
    assert first.read_bytes() == second.read_bytes()
    names = ("transcoder.safetensors", "saelens/cfg.json", "saelens/sae_weights.safetensors")
    assert all(
        (tmp_path / "run-whole" / "transcoder" / name).read_bytes() == (tmp_path / "run-killed" / "transcoder" / name).read_bytes()
        for name in names
    )
