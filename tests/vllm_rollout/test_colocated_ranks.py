"""Two ranks, each with a real vLLM engine of its own on the CPU: one global batch, one policy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm makes an environment that has it")

from sampler_policies import LORA, policy_folder
from tiny_policies import callback, config, grpo, prompts

from theodolite.cli import RUN_DIR_VARIABLE

TESTS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
pytestmark = [pytest.mark.vllm, pytest.mark.distributed, pytest.mark.timeout(1200)]


class Logged(Callback):
    """Writes the numbers of every window as this rank has them."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        with open(f"metrics-{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps({name: float(value) for name, value in trainer.callback_metrics.items()}) + "\n")


@pytest.mark.parametrize("push", ["adapter", "full"])
def test_engines_of_two_ranks_share_one_global_batch_and_one_policy(push: str, tmp_path: Path) -> None:
    rollout = {
        "class_path": "theodolite.lightning_modules.vllm.VLLMRollout",
        "init_args": {"max_model_len": 400, "gpu_memory_utilization": 0.1, "enforce_eager": True, "push": push},
    }
    model = grpo(policy=str(policy_folder(tmp_path / "policy")), train_tokenizer=None, lora=LORA, rollout=rollout, export=False)
    strategy = callback("lightning.pytorch.strategies.DDPStrategy", timeout="0:05:00", process_group_backend="gloo")
    callbacks = [callback("test_colocated_ranks.Logged"), callback("tiny_policies.Witness", folder=str(tmp_path / "witness"))]
    settings = {"max_steps": 2, "devices": 2, "strategy": strategy, "num_sanity_val_steps": 0, "callbacks": callbacks}
    log = fit(config(tmp_path, "two_ranks", model | {"micro_batch_size": 4}, prompts(), **settings), tmp_path)
    assert "global batch 16 = 2 ranks x 4 micro x 2 accumulation (= 4 prompts x 4 generations)" in log, log[-3000:]
    weights = [load_file(tmp_path / "witness" / f"weights-{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]), "both ranks learnt the same"
    rows = [[json.loads(line) for line in (tmp_path / f"metrics-{rank}.jsonl").read_text().splitlines()] for rank in range(2)]
    logged = [row for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "train/loss" in (row := json.loads(line))]
    assert len(logged) == len(rows[0]) == len(rows[1]) == 2
    for number, row in enumerate(logged):
        names = [name for name in row if name.startswith("train/")]
        assert all(rows[0][number][name] == rows[1][number][name] for name in names), "and logged the same"
        print(f"step {number}: mean absolute log-ratio of sampler and trainer {row['train/sampler_gap']:.1e}")
        assert row["train/sampler_gap"] < 1e-4
    seen = [[json.loads(line) for line in (tmp_path / "witness" / f"rollouts-{rank}.jsonl").read_text().splitlines()] for rank in range(2)]
    for step in range(2):
        places = [sorted((slot, sample) for at, slot, sample, *_ in part if at == step) for part in seen]
        assert places[0] == [(slot, sample) for slot in (0, 2) for sample in range(4)]
        assert places[1] == [(slot, sample) for slot in (1, 3) for sample in range(4)]


def fit(path: str, folder: Path) -> str:
    """What the job prints; it and its ranks are ended after twenty minutes."""
    inherited = {key: value for key, value in os.environ.items() if key not in (RUN_DIR_VARIABLE, "PL_GLOBAL_SEED")}
    environment = inherited | ENVIRONMENT | {"PYTHONPATH": f"{TESTS}:{TESTS / 'vllm_rollout'}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "theodolite", "fit", f"--config={path}", f"--run_dir={folder}/run"]
    log = folder / "log.txt"
    with open(log, "wb") as output:
        job = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output, start_new_session=True)
    try:
        code = job.wait(timeout=1150)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    text = log.read_text(errors="replace")
    assert code == 0, text[-4000:]
    return text
