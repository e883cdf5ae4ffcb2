"""A decomposition through the command line: exact resume, figures, settings that cannot work, other targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from theodolite.cli import RUN_DIR_VARIABLE, main

ROOT = Path(__file__).resolve().parents[2]
ATTACK = {"name": "pgd_recon", "coeff": 0.5, "n_steps": 2, "mask_scope": "shared_across_batch"}


def config(**changes: Any) -> dict[str, Any]:
    base = yaml.safe_load((ROOT / "configs/decomposition/tms_5-2.yaml").read_text())
    model = base["model"]["init_args"]
    model["target"] |= {"steps": 20, "batch_size": 32}
    model["losses"].append(ATTACK)
    model |= {"modules": {"linear1": 6, "linear2": 6}, "faithfulness_steps": 3, "clip_components": 1.0, "micro_batch_size": 8}
    base["data"]["init_args"] |= {"global_batch_size": 16, "eval_batch_size": 16, "eval_batches": 2}
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}}
    figures = {"class_path": "theodolite.callbacks.decomposition_figures.DecompositionFigures", "init_args": {"every": 3}}
    base["trainer"] |= {"max_steps": 6, "val_check_interval": 2, "log_every_n_steps": 1, "callbacks": [checkpoint, figures]}
    base["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    model |= changes
    return base


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def fit(folder: Path, settings: dict[str, Any], *args: str) -> Path:
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    main(["fit", f"--config={path}", f"--run_dir={folder}", *args])
    return folder


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", config())
    resumed = fit(tmp_path / "resumed", config(), f"--ckpt_path={whole / 'checkpoints' / 'step=3.ckpt'}")
    states = [torch.load(run / "checkpoints" / "step=6.ckpt", weights_only=True) for run in (whole, resumed)]
    assert all(torch.equal(states[0]["state_dict"][name], tensor) for name, tensor in states[1]["state_dict"].items())
    for first, second in zip(*(state["optimizer_states"][0]["state"].values() for state in states), strict=True):
        assert all(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, resumed)]
    later = [row for row in rows[0] if row["step"] >= 3]
    assert later == [row for row in rows[1] if row["step"] >= 3]
    assert {"permuted_ci.png", "uv.png", "ci_histogram.png", "mean_ci.png", "importances.json"} <= {
        path.name for path in (whole / "figures" / "step_000002").iterdir()
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": {"kind": "tmz"}}, "no kind 'tmz'; the closest is 'tms'"),
        ({"losses": [{"name": "stochastic_recn", "coeff": 1.0}]}, "no 'stochastic_recn'; the closest is 'stochastic_recon'"),
        ({"losses": [{"name": "stochastic_recon"}]}, "stochastic_recon has no coeff"),
        ({"losses": [{"name": "stochastic_recon", "coeff": 1.0, "sample": 2}]}, "no key 'sample'; the closest is 'samples'"),
        ({"metrics": [{"name": "ci_l0"}, {"name": "ci_l0"}]}, "two entries are called 'ci_l0_0'"),
        ({"schedule": "cosin"}, "no schedule 'cosin'"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "run", config(**changes))
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_an_induction_head_is_decomposed_and_validated(tmp_path: Path) -> None:
    target = {"kind": "induction", "vocabulary": 8, "width": 8, "length": 8, "steps": 3, "batch_size": 8}
    ci_fn = {"mode": "layerwise", "fn_type": "vector_mlp", "hidden_dims": [4]}
    losses = [{"name": "importance_minimality", "coeff": 1e-3}, {"name": "stochastic_recon", "scope": "subset", "coeff": 1.0}]
    metrics = [{"name": "ce_kl"}, {"name": "attention_patterns", "n_heads": 1, "q_proj_path": "*q_proj", "k_proj_path": "*k_proj"}]
    changes = {"target": target, "ci_fn": ci_fn, "losses": losses, "metrics": metrics, "modules": {"layers.*.*_proj": 4}}
    settings = config(**changes, sampling="binomial")
    settings["trainer"] |= {"max_steps": 2, "callbacks": []}
    settings["data"]["init_args"] |= {"kind": "induction", "width": 8, "vocabulary": 8}
    run = fit(tmp_path / "run", settings)
    last = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "val/ce_kl/kl_ci_masked" in row][-1]
    assert last["val/ce_kl/kl_ci_masked"] >= 0
    assert last["val/stochastic_attention_patterns/mean"] >= 0
