"""A real vLLM engine on the CPU: the trainer's log-probabilities after every sync, and faults that vLLM itself does not report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm makes an environment that has it")

from sampler_policies import END, load, policy_folder, train_a_little

from theodolite.lightning_modules.decoding import Sampling
from theodolite.lightning_modules.scoring import completion_log_probs, pad_sequences
from theodolite.lightning_modules.vllm import DisagreementError, VLLMRollout
from theodolite.lightning_modules.vllm import engine as engines
from theodolite.lightning_modules.vllm import weights as weights_of_vllm
from theodolite.protocols import TokenSequence

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
LONG = tuple(5 + i * 7 % 250 for i in range(800))
PROMPTS = [LONG, (*LONG, 9, 9, 9), (5, 6, 7)]
SEEDS = [[1, 2], [5], [7]]


@pytest.fixture(autouse=True)
def _small_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def sampler() -> Iterator[VLLMRollout]:
    made = VLLMRollout(max_model_len=900, gpu_memory_utilization=0.2, enforce_eager=True, engine_args={"max_num_seqs": 16})
    yield made
    made.teardown()


def largest_gap(model: Any, groups: list[list[Any]], temperature: float) -> float:
    """Between the sampler's and the trainer's log-probability of any token."""
    pairs = [(TokenSequence(prompt, sample.ids), sample) for prompt, group in zip(PROMPTS, groups, strict=True) for sample in group]
    with torch.no_grad():
        own = completion_log_probs(model, pad_sequences([sequence for sequence, _ in pairs], 0, "cpu"), temperature)
    return max(float((own[row, : len(sample.ids)] - torch.tensor(sample.log_probs)).abs().max()) for row, (_, sample) in enumerate(pairs))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_log_probs_are_the_trainers_before_and_after_three_syncs(tied: bool, lora: bool, sampler: VLLMRollout, tmp_path: Path) -> None:
    model, sampling = load(policy_folder(tmp_path / "policy", tied), lora), Sampling(16, 0.7)
    torch.manual_seed(3)
    untouched = torch.rand(2)
    torch.manual_seed(3)
    sampler.setup(model, [END], 0, tmp_path)
    for version in range(4):
        if version:
            train_a_little(model, version)
        sampler.onload()
        sampler.sync(version)
        groups = sampler.generate(PROMPTS, sampling, SEEDS)
        sampler.offload()
        gap = largest_gap(model, groups, 0.7)
        print(f"version {version}: largest difference of a log-probability {gap:.1e}")
        assert gap < 1e-4
        assert {sample.weight_version for group in groups for sample in group} == {version}
        assert [len(group) for group in groups] == [2, 1, 1]
        assert groups[0][0].ids != groups[0][1].ids
        assert sampler.generate(PROMPTS, sampling, SEEDS) == groups, "a sample is a function of prompt, seed and weights"
    assert torch.equal(torch.rand(2), untouched), "the trainer's random numbers are not touched"


def test_a_prefix_cache_that_is_not_reset_is_noticed(sampler: VLLMRollout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(policy_folder(tmp_path / "policy"), lora=False)
    sampler.setup(model, [END], 0, tmp_path)
    sampler.sync(0)
    monkeypatch.setattr(sampler, "_reset_prefix_cache", lambda: None)
    train_a_little(model, 1)
    with pytest.raises(DisagreementError, match="stale prefix cache"):
        sampler.sync(1)


def test_a_tied_head_that_is_not_sent_is_noticed(sampler: VLLMRollout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(policy_folder(tmp_path / "policy", tied=True), lora=False)
    train_a_little(model, 1)
    monkeypatch.setattr(weights_of_vllm, "_output_head", lambda model: None)
    sampler.setup(model, [END], 0, tmp_path)
    with pytest.raises(DisagreementError, match="After weight version 0 was sent"):
        sampler.sync(0)


@pytest.mark.parametrize("names", ["of no layer", "of half the layers"])
def test_an_adapter_that_binds_to_nothing_is_noticed(
    names: str, sampler: VLLMRollout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh adapter changes nothing, so only the check with random numbers can tell."""
    model = load(policy_folder(tmp_path / "policy"), lora=True)
    written = weights_of_vllm.stacked_adapter

    def misnamed(policy: Any) -> dict[str, torch.Tensor]:
        tensors = written(policy)
        if names == "of half the layers":
            return {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
        return {name.replace(".layers.", ".layers.7"): tensor for name, tensor in tensors.items()}

    monkeypatch.setattr(weights_of_vllm, "stacked_adapter", misnamed)
    sampler.setup(model, [END], 0, tmp_path)
    with pytest.raises((DisagreementError, RuntimeError, ValueError)) as raised:
        sampler.sync(0)
    print(f"{type(raised.value).__name__}: {raised.value}")


def test_a_merged_push_of_an_adapter_agrees_too(tmp_path: Path) -> None:
    made = VLLMRollout(900, gpu_memory_utilization=0.2, enforce_eager=True, engine_args={"max_num_seqs": 16}, push="full")
    model = load(policy_folder(tmp_path / "policy", tied=True), lora=True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        made.setup(model, [END], 0, tmp_path)
        made.sync(0)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "merging leaves the base as it was"
        train_a_little(model, 1)
        made.sync(1)
        assert made.agreement is not None
        assert made.agreement.largest < 1e-4
        assert engines.has_adapter(model)
    finally:
        made.teardown()


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_the_config_of_the_large_model_runs_two_steps_with_a_tiny_one(adapter: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model.policy": str(policy_folder(tmp_path / "policy")),
        "model.dtype": "float32",
        "model.export": "false",
        "model.max_new_tokens": "24",
        "model.micro_batch_size": "8",
        "model.group_size": "4",
        "model.warmup_steps": "0",
        "model.rollout.init_args.max_model_len": "768",
        "model.rollout.init_args.gpu_memory_utilization": "0.2",
        "model.rollout.init_args.enforce_eager": "true",
        "data.problems": "mini",
        "data.prompts_per_step": "4",
        "data.train_problems": "32",
        "data.eval_problems": "4",
        "data.test_problems": "4",
        "data.eval_prompts_per_step": "4",
        "data.workers": "1",
        "trainer.max_steps": "2",
        "trainer.val_check_interval": "2",
        "trainer.accelerator": "cpu",
        "trainer.num_sanity_val_steps": "0",
        "model.eval_samples": "1",
        "data.max_prompt_tokens": "null",
        "data.tokenizer": "null",
    }
    if not adapter:
        settings |= {"model.lora": "null"}
    configs = [f"--config={ROOT}/configs/grpo/{name}.yaml" for name in ("leetcode", "qwen3_4b_leetcode", "vllm")]
    command = [sys.executable, "-m", "theodolite", "fit", *configs, f"--run_dir={tmp_path}/run"]
    command += [f"--{key}={value}" for key, value in settings.items()]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["train/sampler_gap"] for row in rows if "train/sampler_gap" in row]
    print("mean absolute log-ratio of sampler and trainer by step:", gaps)
    assert "sampler and trainer agree" in done.stderr + done.stdout
    assert any("val/pass_rate" in row for row in rows), sorted(rows[-1])
    assert all(abs(row["val/kl_k1"]) < 0.01 for row in rows if "val/pass_rate" in row), "drift is measured by the trainer"
    assert len(gaps) == 2
    assert all(gap < 1e-4 for gap in gaps)
