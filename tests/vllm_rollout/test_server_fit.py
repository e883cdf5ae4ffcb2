"""Whole fits with rollouts from a server: one that is started anew, hangs or refuses stops them, and a checkpoint leads on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fake_server import FakeVLLM, serving
from sampler_policies import LORA, policy_folder
from tiny_policies import callback, config, grpo, prompts

from theodolite.cli import RUN_DIR_VARIABLE, main
from theodolite.vllm_server import VLLMServerError

TESTS = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]
SERVERS: list[FakeVLLM] = []
"""Those of the running test, for callbacks that configs name."""


class RestartServer(Callback):
    """The server is started anew after validation has sent it the weights, and before the window that would sample from them.

    Args:
        step: Optimizer steps taken before that window.
    """

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            SERVERS[0].restart()


class FaultyFor:
    """A server whose completions hang or fail for whoever comes by this address."""

    def __init__(self, server: FakeVLLM, how: str) -> None:
        self.server, self.how, self.fault = server, how, ""
        self.asked, self.over = threading.Event(), threading.Event()

    def answer(self, route: str, body: Any) -> tuple[int, Any]:
        if route != "/v1/completions":
            return self.server.answer(route, body)
        self.asked.set()
        if self.how == "hang":
            self.over.wait(200)
        return 500, {"error": {"message": "the engine is dead"}}


def policy(folder: Path, url: str, **settings: Any) -> dict[str, Any]:
    rollout = {
        "class_path": "theodolite.lightning_modules.vllm.VLLMServerRollout",
        "init_args": {"url": url, "timeout_s": 20, "connect_timeout_s": 60} | settings,
    }
    return grpo(policy=str(folder), train_tokenizer=None, lora=LORA, rollout=rollout, export=False)


@pytest.fixture(autouse=True)
def _no_inherited_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def test_a_fit_whose_server_was_started_anew_stops_and_goes_on_from_its_checkpoint_as_if_nothing_had_been(tmp_path: Path) -> None:
    folder = policy_folder(tmp_path / "policy")
    every_step = callback("lightning.pytorch.callbacks.ModelCheckpoint", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    server = FakeVLLM(folder)
    SERVERS[:] = [server]

    def fit(name: str, url: str, *more: dict[str, Any], checkpoint: str | None = None) -> None:
        callbacks = [every_step, callback("tiny_policies.Witness", folder=str(tmp_path / name)), *more]
        path = config(tmp_path, name, policy(folder, url, timeout_s=120), prompts(), max_steps=4, val_check_interval=2, callbacks=callbacks)
        main(["fit", f"--config={path}", f"--run_dir={tmp_path}/run-{name}", *([f"--ckpt_path={checkpoint}"] if checkpoint else [])])

    with serving(server) as url:
        fit("whole", url)
        restarting = callback(f"{__name__}.RestartServer", step=2)
        with pytest.raises(VLLMServerError, match=r"no longer holds the weights .* --ckpt_path"):
            fit("stopped", url, restarting)
        checkpoints = tmp_path / "run-stopped" / "checkpoints"
        assert sorted(path.name for path in checkpoints.iterdir()) == ["step=1.ckpt", "step=2.ckpt"]
        fit("stopped", url, checkpoint=f"{checkpoints}/step=2.ckpt")
    whole, stopped = (load_file(tmp_path / name / "weights-0.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    rows = [(tmp_path / f"run-{name}" / "metrics.jsonl").read_bytes() for name in ("whole", "stopped")]
    assert rows[0] == rows[1]
    assert rows[0].count(b'"train/loss"') == 4


@pytest.mark.distributed
@pytest.mark.parametrize(("how", "sentence"), [("hang", "did not answer /v1/completions within 20 s"), ("refuse", "the engine is dead")])
def test_a_server_that_fails_one_rank_ends_both(how: str, sentence: str, tmp_path: Path) -> None:
    server = FakeVLLM(policy_folder(tmp_path / "policy"))
    faulty = FaultyFor(server, how)
    with serving(server) as url, serving(faulty) as other:
        ranks = _two_ranks(tmp_path, [url, other])
        try:
            assert faulty.asked.wait(150), (tmp_path / "rank-1.txt").read_text()[-3000:]
            started = time.monotonic()
            codes = [rank.wait(timeout=120) for rank in ranks]
            print(f"{how}: both ended {time.monotonic() - started:.0f} s after the request")
        finally:
            faulty.over.set()
            for rank in ranks:
                rank.kill()
                rank.wait()
    logs = [(tmp_path / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert 0 not in codes, logs[0][-3000:]
    assert sentence in logs[1], logs[1][-3000:]
    assert "rank 1 failed" in logs[0], logs[0][-3000:]
    assert sentence in logs[0]


def _two_ranks(folder: Path, urls: list[str]) -> list[subprocess.Popen[bytes]]:
    """A fit on two processes that form a group, each with an address of its own for the same server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    strategy = callback("lightning.pytorch.strategies.DDPStrategy", timeout="0:02:00", process_group_backend="gloo")
    settings = {"max_steps": 2, "devices": 2, "strategy": strategy, "num_sanity_val_steps": 0}
    inherited = {key: value for key, value in os.environ.items() if key not in (RUN_DIR_VARIABLE, "PL_GLOBAL_SEED")}
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "CUDA_VISIBLE_DEVICES": "", "NODE_RANK": "0", "WORLD_SIZE": "2"}
    ranks = []
    for rank, url in enumerate(urls):
        path = config(folder, f"rank-{rank}", policy(folder / "policy", url), prompts(), **settings)
        command = [sys.executable, "-m", "theodolite", "fit", f"--config={path}", f"--run_dir={folder}/run"]
        own = {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with open(folder / f"rank-{rank}.txt", "wb") as log:
            ranks.append(subprocess.Popen(command, env=inherited | shared | own, cwd=folder, stdout=log, stderr=log))
    return ranks
