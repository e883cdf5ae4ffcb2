"""What a sampler with weights of its own must not do unnoticed: sample others than the policy's, or be mistaken for the policy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fake_server import FakeVLLM, serving
from sampler_policies import END, LORA, load, policy_folder, train_a_little
from tiny_policies import TinyPrompts

from theodolite.callbacks.direction_checks import added_to_layers
from theodolite.lightning_modules import GRPOModule
from theodolite.lightning_modules.decoding import Sampling
from theodolite.lightning_modules.rollouts import HFRollout
from theodolite.lightning_modules.vllm import VLLMRollout, VLLMServerRollout, colocated
from theodolite.lightning_modules.vllm import engine as engines
from theodolite.lightning_modules.vllm.colocated import check_device, local_rank
from theodolite.lightning_modules.vllm.server import supported
from theodolite.vllm_server import VLLMServerError

ROOT = Path(__file__).resolve().parents[2]


class Changing(FakeVLLM):
    """A server whose weights another client replaces, or of another version."""

    def complete(self, body: Any) -> Any:
        found = super().complete(body)
        if self.fault == "replaced":
            self.rename("another run's")
        return found

    def answer(self, route: str, body: Any) -> tuple[int, Any]:
        if route == "/version" and self.fault == "old version":
            return 200, {"version": "0.21.0"}
        return super().answer(route, body)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_folder(tmp_path_factory.mktemp("policy") / "untied")


@pytest.fixture
def served(folder: Path) -> Iterator[tuple[FakeVLLM, str]]:
    server = Changing(folder)
    with serving(server) as url:
        yield server, url


def sampling_module(url: str, folder: Path, **settings: Any) -> GRPOModule:
    rollout = {"class_path": "VLLMServerRollout", "init_args": {"url": url, "timeout_s": 120.0, "connect_timeout_s": 60.0}}
    common: dict[str, Any] = {"policy": str(folder), "lora": LORA, "rollout": rollout, "max_new_tokens": 4, "seed": 1, "export": False}
    return GRPOModule(**(common | settings))


def test_steering_by_weights_reaches_the_sampler_and_steering_by_hooks_is_refused(
    served: tuple[FakeVLLM, str], folder: Path, tmp_path: Path
) -> None:
    module: Any = sampling_module(served[1], folder)
    module._trainer = SimpleNamespace(global_step=0, default_root_dir=tmp_path, strategy=None)
    module.configure_model()
    before = module.complete(["def solve"], 2, 0)
    train_a_little(module.causal_lm, 1, 0.3)
    with pytest.raises(RuntimeError, match="The policy changed after the sampler was given its weights"):
        module.engine.generate([(5, 6)], Sampling(2), [[1]])
    moved = module.complete(["def solve"], 2, 0)
    with pytest.raises(ValueError, match="does not run those"), added_to_layers(module, {}, 1.0):
        pass
    module.engine = HFRollout()
    module.engine.setup(module.causal_lm, module.end_ids, module.pad_id)
    assert moved == module.complete(["def solve"], 2, 0) != before


@pytest.mark.slow
def test_a_policy_has_not_drifted_from_itself_where_the_sampler_reports_truncated_log_probs(
    served: tuple[FakeVLLM, str], folder: Path, tmp_path: Path
) -> None:
    module = sampling_module(served[1], folder, eval_drift=True, eval_top_p=0.5)
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "logger": False, "default_root_dir": tmp_path}
    (found,) = Trainer(accelerator="cpu", **quiet).validate(module, datamodule=TinyPrompts(eval_rows=2), verbose=False)
    assert found["val/kl_k1"] == pytest.approx(0.0, abs=1e-5)
    assert found["val/kl_k3"] == pytest.approx(0.0, abs=1e-5)


def test_weights_that_are_replaced_while_a_window_is_sampled_are_noticed(
    served: tuple[FakeVLLM, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = served
    own, given = tmp_path / "sampler" / "theodolite-dead-v3-3", tmp_path / "given" / "theodolite-other-v1-1"
    for left in (own, given):
        left.mkdir(parents=True)
    sampler = VLLMServerRollout(url, 20.0, 5.0)
    sampler.setup(load(folder, True), [END], 0, tmp_path)
    sampler.sync(0)
    assert not own.exists(), "what an attempt that was ended left behind"
    assert given.exists()
    sent = len(server.requests)
    monkeypatch.setattr(engines, "gather_objects", lambda changed: [changed, True])
    sampler.sync(0)
    assert len(server.requests) > sent, "a rank goes along where only another one's weights changed"
    server.fault = "replaced"
    with pytest.raises(VLLMServerError, match="no longer holds the weights"):
        sampler.generate([(5, 6)], Sampling(2), [[1]])


def test_a_folder_of_ones_own_choice_is_left_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theodolite-other-v1-1").mkdir()
    sampler = VLLMServerRollout("http://localhost:1", folder=str(tmp_path))
    monkeypatch.setattr(sampler.server, "weight_version", lambda: "default")
    sampler.folder = tmp_path
    sampler._start_afresh()
    assert list(tmp_path.iterdir()) == [tmp_path / "theodolite-other-v1-1"]


def test_a_server_of_an_old_version_is_refused(served: tuple[FakeVLLM, str], folder: Path, tmp_path: Path) -> None:
    served[0].fault = "old version"
    with pytest.raises(VLLMServerError, match=r"is vLLM 0\.21\.0, and 0\.32 or newer is needed"):
        VLLMServerRollout(served[1]).setup(load(folder, False), [END], 0, tmp_path)
    assert [supported(version) for version in ("0.32.0+cpu", "0.33.1rc1", "1.0", "0.31.9", "unknown")] == [True, True, True, False, False]


@pytest.mark.parametrize("push", [pytest.param("auto", marks=pytest.mark.slow), "full"])
def test_adapters_that_are_more_than_a_product_are_refused_in_either_form(push: Any, folder: Path, tmp_path: Path) -> None:
    refused: dict[str, dict[str, Any]] = {
        "set lora.lora_bias to false": {"lora_bias": True, "target_modules": ["q_proj"]},
        "set lora.use_dora to false": {"use_dora": True},
        "leave it out of lora.modules_to_save": {"modules_to_save": ["lm_head"]},
    }
    for message, settings in refused.items():
        with pytest.raises(ValueError, match=message):
            VLLMServerRollout("http://localhost:1", push=push).setup(load(folder, True, **settings), [END], 0, tmp_path)


def test_a_temperature_that_vllm_would_raise_is_refused(folder: Path) -> None:
    sampler = VLLMRollout(max_model_len=64)
    cast(Any, sampler)._model, sampler._version = torch.nn.Linear(2, 2), 0
    sampler._state = engines.fingerprint(sampler.model)
    with pytest.raises(ValueError, match=r"0\.01 at least, not at 0\.001"):
        sampler.generate([(5, 6)], Sampling(2, 0.001), [[1]])


def test_a_gpu_other_than_vllms_is_refused_and_a_rank_alone_fails_before_engines_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert local_rank() == 0
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert local_rank() == 3
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert local_rank() == 2
    check_device(torch.device("cuda", 2), 2)
    check_device(torch.device("cpu"), 2)
    with pytest.raises(ValueError, match=r"The policy is on cuda:2, and vLLM takes cuda:0 in this process; .*CUDA_VISIBLE_DEVICES"):
        check_device(torch.device("cuda", 2), 0)

    def no_vllm(module: str) -> Any:
        raise ImportError("libcudart.so")

    agreed: list[Any] = []
    monkeypatch.setattr(colocated, "_vllm", no_vllm)
    monkeypatch.setattr(colocated, "on_every_rank", lambda make: agreed.append(make) or make())
    sampler = VLLMRollout(max_model_len=400)
    engines.VLLMEngine.setup(sampler, load(folder, True), [END], 0, tmp_path)
    with pytest.raises(ImportError):
        sampler.sync(0)
    assert agreed == [sampler._prepare], "every rank hears of it before any of them starts an engine"


def test_the_layer_of_vllm_leaves_evaluation_as_the_study_has_it() -> None:
    study, layer = (
        yaml.safe_load((ROOT / "configs" / "grpo" / name).read_text())["model"]["init_args"] for name in ("leetcode.yaml", "vllm.yaml")
    )
    plain, sampled = GRPOModule(**study), GRPOModule(**(study | layer))
    assert (sampled.sampling.top_p, sampled.eval_sampling) == (1.0, plain.eval_sampling)
    assert sampled.test_sampling == plain.test_sampling
    assert sampled.mismatch == ("geometric_mis", 0.9, 1.1)
    assert GRPOModule(**(study | layer), updates_per_window=2, reuse_sampler_log_probs=True).mismatch is None
