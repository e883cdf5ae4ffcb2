"""Windows sampled ahead by a server: asked for while the policy trains, by the weights of before, on one rank and two, after any end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fake_server import FakeVLLM, serving
from sampler_policies import END, LORA, load, policy_folder, train_a_little
from test_grpo_distributed import assert_same_rows, largest_difference, two_ranks
from tiny_policies import callback, config, grpo, prompts

from theodolite.cli import RUN_DIR_VARIABLE, main
from theodolite.lightning_modules.decoding import Sampling
from theodolite.lightning_modules.vllm import VLLMServerRollout
from theodolite.vllm_server import VLLMServerError

PROMPTS, SEEDS = [tuple(range(5, 25)), (7, 9)], [[1, 2], [3]]


class Holding:
    """A server that keeps completions back while it is told to, and notes in which order it was done with what."""

    def __init__(self, server: FakeVLLM) -> None:
        self.server, self.fault, self.hold = server, "", False
        self.asked, self.released = threading.Event(), threading.Event()
        self.done: list[str] = []

    def answer(self, route: str, body: Any) -> tuple[int, Any]:
        if route == "/v1/completions" and self.hold:
            self.asked.set()
            self.released.wait(20)
        found = self.server.answer(route, body)
        self.done.append(route)
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_folder(tmp_path_factory.mktemp("policy") / "policy")


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VLLMServerRollout, Holding]]:
    server = Holding(FakeVLLM(folder))
    with serving(server) as url:
        made = VLLMServerRollout(url, timeout_s=20.0, connect_timeout_s=5.0)
        made.setup(load(folder, lora=True), (END,), 0, tmp_path_factory.mktemp("run"))
        made.sync(0)
        yield made, server


def test_what_was_begun_is_of_the_weights_of_then_and_others_are_sent_after_its_end(engine: tuple[VLLMServerRollout, Holding]) -> None:
    made, server = engine
    expected = made.generate(PROMPTS, Sampling(4), SEEDS)
    server.hold = True
    begun = made.begin(PROMPTS, Sampling(4), SEEDS)
    assert server.asked.wait(20)
    assert not begun.done()
    train_a_little(made.model, 1)
    server.done.clear()
    threading.Timer(0.2, server.released.set).start()
    made.sync(1)
    assert begun.done()
    assert begun.result() == expected
    assert server.done.index("/v1/load_lora_adapter") > [i for i, route in enumerate(server.done) if route == "/v1/completions"][2]
    assert made.generate(PROMPTS, Sampling(4), SEEDS) != expected


def test_what_cannot_be_asked_is_refused_at_once_and_what_the_server_refuses_is_its_own_sentence(
    engine: tuple[VLLMServerRollout, Holding],
) -> None:
    made, server = engine
    with pytest.raises(ValueError, match="fit beside max_new_tokens"):
        made.begin(PROMPTS, Sampling(399), SEEDS)
    server.server.restart()
    with pytest.raises(VLLMServerError, match="no longer holds the weights"):
        made.begin(PROMPTS, Sampling(4), SEEDS).result()
    train_a_little(made.model, 1)
    with pytest.raises(RuntimeError, match="call sync between"):
        made.begin(PROMPTS, Sampling(4), SEEDS)


# -- whole fits ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def written(root: Path, name: str, folder: Path, url: str, *more: dict[str, Any]) -> list[str]:
    """The command line of a fit that samples ahead, across the end of an epoch and over evaluations."""
    rollout = {"class_path": "theodolite.lightning_modules.vllm.VLLMServerRollout", "init_args": {"url": url, "timeout_s": 60}}
    model = grpo(policy=str(folder), train_tokenizer=None, lora=LORA, rollout=rollout, export=False, overlap_sampling=True, beta=0.05)
    every_step = callback("lightning.pytorch.callbacks.ModelCheckpoint", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    callbacks = [every_step, callback("tiny_policies.Witness", folder=str(root / name)), *more]
    path = config(root, f"{name}-{len(more)}", model, prompts(rows=12), max_steps=5, val_check_interval=2, callbacks=callbacks)
    return ["fit", f"--config={path}", f"--run_dir={root}/run-{name}"]


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.usefixtures("_clean")
def test_a_killed_fit_that_samples_ahead_goes_on_with_the_bytes_of_the_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    with serving(FakeVLLM(folder)) as url:
        main(written(tmp_path, "whole", folder, url))
        kill = callback("tiny_policies.KillInWindow", step=3)
        command = [sys.executable, "-m", "theodolite", *written(tmp_path, "killed", folder, url, kill)]
        inherited = {key: value for key, value in os.environ.items() if key not in (RUN_DIR_VARIABLE, "PL_GLOBAL_SEED")}
        path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [inherited.get("PYTHONPATH")])])
        environment = inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        last = tmp_path / "run-killed" / "checkpoints" / "step=3.ckpt"
        main([*written(tmp_path, "killed", folder, url), f"--ckpt_path={last}"])
    whole, killed = (load_file(tmp_path / name / "weights-0.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    metrics = [(tmp_path / f"run-{name}" / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert metrics[0] == metrics[1]
    rows = [json.loads(line) for line in metrics[0].splitlines()]
    assert [row["train/staleness"] for row in rows if "train/loss" in row] == [0, 1, 1, 1, 1]
    assert not os.listdir(tmp_path / "run-whole" / "sampler"), "the server and the disk are left as they were"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(280)
@pytest.mark.usefixtures("_clean")
def test_two_ranks_that_sample_ahead_compute_what_one_does(folder: Path, tmp_path: Path) -> None:
    with serving(FakeVLLM(folder)) as url:
        main(written(tmp_path, "one", folder, url))
        two_ranks(tmp_path, written(tmp_path, "two", folder, url))
    assert_same_rows(tmp_path / "run-one", tmp_path / "run-two", 1e-5)
    one, two = (tmp_path / name / "weights-0.safetensors" for name in ("one", "two"))
    assert largest_difference(two, two.with_name("weights-1.safetensors")) == 0.0
    print(f"largest weight difference between one and two ranks {largest_difference(one, two):.1e}")
    assert largest_difference(one, two) < 1e-4
