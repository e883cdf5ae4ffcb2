"""A stock ``vllm serve`` on the CPU: adapters and whole weights over HTTP, and what happens when it dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm makes an environment that has it")

from sampler_policies import END, load, policy_folder, train_a_little

from theodolite.lightning_modules.decoding import Sampling
from theodolite.lightning_modules.scoring import completion_log_probs, pad_sequences
from theodolite.lightning_modules.vllm import VLLMServerRollout
from theodolite.protocols import TokenSequence
from theodolite.vllm_server import VLLMServer, VLLMServerError, serve_command

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
PROMPTS = [tuple(5 + i * 7 % 250 for i in range(800)), (5, 6, 7)]
SEEDS = [[1, 2], [3]]


@contextmanager
def stock_server(folder: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The printed command, made small for a CPU; waits until it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = serve_command(str(folder), "float32", 4, 900).split()
    switches = dict(word.split("=", 1) for word in words if word.startswith("VLLM_"))
    command = [word for word in words if not word.startswith("VLLM_")]
    # the module behind `vllm serve`: the command itself does not start where vLLM was packaged for CPUs under another name
    command[:3] = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--gpu-memory-utilization", "0.2", "--max-num-seqs", "16"]
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=os.environ | switches | small, stdout=output, stderr=output, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        _await(VLLMServer(url, connect_timeout_s=10), process, log)
        yield url, process
    finally:
        _end(process)


def _await(server: VLLMServer, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            server.models()
        except VLLMServerError:
            time.sleep(1)
        else:
            return
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """With its workers, which live in its session."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
    process.wait(timeout=30)


def largest_gap(model: torch.nn.Module, sampler: VLLMServerRollout, version: int) -> float:
    worst = 0.0
    for prompt, group in zip(PROMPTS, sampler.generate(PROMPTS, Sampling(12, 0.7), SEEDS), strict=True):
        for sample in group:
            assert sample.weight_version == version
            with torch.no_grad():
                own = completion_log_probs(model, pad_sequences([TokenSequence(prompt, sample.ids)], 0, "cpu"), 0.7)[0]
            worst = max(worst, float((own - torch.tensor(sample.log_probs)).abs().max()))
    return worst


def test_adapters_and_whole_weights_arrive_over_http_and_a_dead_server_is_named(tmp_path: Path) -> None:
    folder = policy_folder(tmp_path / "policy", tied=True)
    with stock_server(folder, tmp_path / "server.txt") as (url, process):
        gaps = {}
        for kind, lora in (("adapter", True), ("whole weights", False)):
            model = load(folder, lora)
            sampler = VLLMServerRollout(url, timeout_s=300, connect_timeout_s=60)
            sampler.setup(model, [END], 0, tmp_path / kind)
            for version in range(4):
                if version:
                    train_a_little(model, version)
                sampler.sync(version)
                gaps[f"{kind}, version {version}"] = largest_gap(model, sampler, version)
            if lora:
                sampler.teardown()
        print({name: f"{gap:.1e}" for name, gap in gaps.items()})
        assert max(gaps.values()) < 1e-4
        _end(process)
        started = time.monotonic()
        with pytest.raises(VLLMServerError, match=r"No vLLM server answers at .*; start VLLM_SERVER_DEV_MODE=1"):
            sampler.generate(PROMPTS, Sampling(4), SEEDS)
        assert time.monotonic() - started < 60
