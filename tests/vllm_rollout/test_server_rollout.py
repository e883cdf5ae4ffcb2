"""Rollouts over HTTP against a server with vLLM's routes: the right numbers, or one sentence within the stated time."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fake_server import FakeVLLM, serving
from sampler_policies import END, load, policy_folder, train_a_little

from theodolite.lightning_modules import GRPOModule
from theodolite.lightning_modules.decoding import Sampling
from theodolite.lightning_modules.rollout_choice import build_engine
from theodolite.lightning_modules.rollouts import HFRollout, RolloutEngine
from theodolite.lightning_modules.vllm import DisagreementError, VLLMServerRollout
from theodolite.vllm_server import VLLMServerError, allowed_rank, serve_command

PROMPTS = [tuple(5 + i * 7 % 200 for i in range(n)) for n in (40, 3)]
SEEDS = [[11, 12, 13], [14]]
ENDS = (END, *range(20, 60, 4))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("policies")
    return {name: policy_folder(root / name, tied=name == "tied") for name in ("tied", "untied")}


@pytest.fixture
def fake(folders: dict[str, Path]) -> Iterator[tuple[FakeVLLM, str]]:
    server = FakeVLLM(folders["untied"])
    with serving(server) as url:
        yield server, url


def engine(url: str, model: Any, folder: Path, **settings: Any) -> VLLMServerRollout:
    limits: dict[str, Any] = {"timeout_s": 120.0, "connect_timeout_s": 60.0}
    made = VLLMServerRollout(url, **(limits | settings))
    made.setup(model, ENDS, 0, folder)
    return made


def expected(model: Any, sampling: Sampling) -> list[list[Any]]:
    reference = HFRollout()
    reference.setup(model, ENDS, 0)
    return reference.generate(PROMPTS, sampling, SEEDS)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("tied", "lora"),
    [(True, True), pytest.param(False, True, marks=SLOW), pytest.param(False, False, marks=SLOW), pytest.param(True, False, marks=SLOW)],
)
def test_samples_are_those_of_the_trainer_before_and_after_three_syncs(
    folders: dict[str, Path], tied: bool, lora: bool, tmp_path: Path
) -> None:
    folder = folders["tied" if tied else "untied"]
    model, sampling = load(folder, lora), Sampling(10, 0.8)
    server = FakeVLLM(folder)
    with serving(server) as url:
        sampler = engine(url, model, tmp_path)
        for version in range(4):
            if version:
                train_a_little(model, version)
            sampler.sync(version)
            assert sampler.agreement is not None
            assert sampler.agreement.largest < 1e-4
            for group, reference in zip(sampler.generate(PROMPTS, sampling, SEEDS), expected(model, sampling), strict=True):
                for sample, own in zip(group, reference, strict=True):
                    assert (sample.ids, sample.finish, sample.weight_version) == (own.ids, own.finish, version)
                    torch.testing.assert_close(torch.tensor(sample.log_probs), torch.tensor(own.log_probs), atol=1e-5, rtol=0)
        resets = [route for route, _ in server.requests].count("/reset_prefix_cache")
        assert resets == 4
        assert len(server.adapters) == int(lora)
        assert len(list((tmp_path / "sampler").iterdir())) == 1, "older weights are deleted"
        sampler.teardown()
        assert not server.adapters
        assert not list((tmp_path / "sampler").iterdir())


def test_weights_are_sent_when_they_changed_and_only_then(fake: tuple[FakeVLLM, str], folders: dict[str, Path], tmp_path: Path) -> None:
    server, url = fake
    model = load(folders["untied"], lora=True)
    sampler = engine(url, model, tmp_path)
    sampler.sync(0)
    sent = len(server.requests)
    sampler.sync(0)
    assert len(server.requests) == sent
    train_a_little(model, 1)
    sampler.sync(0)
    assert len(server.requests) > sent, "other weights under an old number are other weights"


@pytest.mark.parametrize("adapters", ["rank pattern", pytest.param("rank-stabilised", marks=SLOW), pytest.param("two at once", marks=SLOW)])
def test_any_linear_adapter_arrives_as_a_plain_one(folders: dict[str, Path], adapters: str, tmp_path: Path) -> None:
    pattern: dict[str, Any] = {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"down_proj": 3}} if adapters == "rank pattern" else {}
    model: Any = load(folders["untied"], lora=True, use_rslora=adapters == "rank-stabilised", **pattern)
    if adapters == "two at once":
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter(["default", "second"])
    train_a_little(model, 1, 0.1)
    with serving(FakeVLLM(folders["untied"])) as url:
        sampler = engine(url, model, tmp_path)
        sampler.sync(1)
        assert sampler.agreement is not None
        assert sampler.agreement.largest < 1e-4


@pytest.mark.parametrize(
    ("fault", "lora", "message"),
    [
        ("unbound adapter", True, "does not compute with it"),
        ("stale", True, "stale"),
        ("raw log-probabilities", True, "processed_logprobs"),
        ("head not loaded", False, "disagree"),
        pytest.param("held blocks", True, "would not reset its prefix cache", marks=SLOW),
        pytest.param("no development routes", True, "VLLM_SERVER_DEV_MODE=1", marks=SLOW),
        pytest.param("added token", True, "changed a prompt's token ids", marks=SLOW),
        pytest.param("abort", True, "'abort'", marks=SLOW),
        pytest.param("broken connection", True, "broke off", marks=SLOW),
    ],
)
def test_a_fault_without_an_error_of_its_own_is_an_error(
    folders: dict[str, Path], fault: str, lora: bool, message: str, tmp_path: Path
) -> None:
    folder = folders["tied" if fault == "head not loaded" else "untied"]
    model, server = load(folder, lora), FakeVLLM(folder)
    server.fault = fault
    if fault == "head not loaded":  # the head of this server is a matrix of its own, as vLLM's is
        server.base.lm_head.weight = torch.nn.Parameter(server.base.lm_head.weight.detach().clone())

    def two_windows(url: str) -> None:
        sampler = engine(url, model, tmp_path, timeout_s=5.0 if fault == "held blocks" else 120.0)
        for version in range(2):
            train_a_little(model, version, 0.1)
            sampler.sync(version)
            sampler.generate(PROMPTS, Sampling(4), SEEDS)

    with serving(server) as url, pytest.raises((RuntimeError, DisagreementError), match=message):
        two_windows(url)


def test_a_server_that_is_away_another_or_slow_is_named_within_the_limit(
    fake: tuple[FakeVLLM, str], folders: dict[str, Path], tmp_path: Path
) -> None:
    server, url = fake
    model = load(folders["untied"], lora=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(VLLMServerError, match=r"No vLLM server answers at .* start VLLM_SERVER_DEV_MODE=1 .* --max-lora-rank 8"):
        engine(nobody, model, tmp_path)
    server.fault = "another model"
    with pytest.raises(VLLMServerError, match="serves 'someone/else', but the policy is"):
        engine(url, model, tmp_path)
    server.fault = ""
    sampler = engine(url, model, tmp_path)
    sampler.sync(0)
    server.fault, sampler.server.timeout_s = "slow", 0.4
    started = time.monotonic()
    with pytest.raises(VLLMServerError, match=r"did not answer /v1/completions within 0\.4 s"):
        sampler.generate(PROMPTS, Sampling(4), SEEDS)
    assert time.monotonic() - started < 12


@pytest.mark.parametrize("lora", [pytest.param(True, marks=SLOW), False])
def test_a_server_that_was_started_anew_is_recognised_and_a_new_run_goes_on_with_it(
    fake: tuple[FakeVLLM, str], folders: dict[str, Path], lora: bool, tmp_path: Path
) -> None:
    server, url = fake
    model = load(folders["untied"], lora)
    train_a_little(model, 1)
    sampler = engine(url, model, tmp_path)
    sampler.sync(1)
    server.restart()
    with pytest.raises(VLLMServerError, match="no longer holds the weights"):
        sampler.generate(PROMPTS, Sampling(4), SEEDS)
    again = engine(url, model, tmp_path)
    again.sync(1)
    assert again.generate(PROMPTS, Sampling(4), SEEDS)[0][0].ids == expected(model, Sampling(4))[0][0].ids


def test_a_prompt_without_room_and_work_before_its_time_are_refused(
    fake: tuple[FakeVLLM, str], folders: dict[str, Path], tmp_path: Path
) -> None:
    _, url = fake
    with pytest.raises(RuntimeError, match="before setup"):
        VLLMServerRollout(url).generate(PROMPTS, Sampling(2), SEEDS)
    sampler = engine(url, load(folders["untied"], lora=True), tmp_path)
    with pytest.raises(RuntimeError, match="call sync first"):
        sampler.generate(PROMPTS, Sampling(2), SEEDS)
    sampler.sync(0)
    with pytest.raises(ValueError, match="max_model_len of 430 or more"):
        sampler.generate([tuple(range(5, 205)) * 2], Sampling(30), [[1]])
    with pytest.raises(ValueError, match="each prompt needs one"):
        sampler.generate(PROMPTS, Sampling(2), [[1]])
    assert sampler.generate([], Sampling(2), []) == []


def test_what_vllm_cannot_apply_is_refused_before_anything_starts(folders: dict[str, Path], tmp_path: Path) -> None:
    sampler = VLLMServerRollout("http://localhost:1")
    refused = {
        "does not apply DoRA": load(folders["untied"], True, use_dora=True),
        "rank 512 at most": load(folders["untied"], True, r=600),
        "is trained beside the adapter": load(folders["untied"], True, modules_to_save=["lm_head"]),
    }
    for message, model in refused.items():
        with pytest.raises(ValueError, match=message):
            sampler.setup(model, ENDS, 0, tmp_path)
    with pytest.raises(ValueError, match="the policy has none"):
        VLLMServerRollout("http://localhost:1", push="adapter").setup(load(folders["untied"], False), ENDS, 0, tmp_path)
    with pytest.raises(ValueError, match="not the address"):
        VLLMServerRollout("localhost:8000")


def test_command_holds_the_smallest_rank_that_fits_and_the_switches() -> None:
    assert [allowed_rank(rank) for rank in (1, 2, 8, 33, 257, 512)] == [1, 8, 8, 64, 320, 512]
    command = serve_command("org/name", "bfloat16", 32, 4096)
    assert command.startswith("VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve org/name --dtype bfloat16 ")
    assert "--enable-lora --max-lora-rank 32" in command
    assert "lora" not in serve_command("org/name", "bfloat16", None)


def test_a_config_names_the_engine() -> None:
    spec = {"class_path": "VLLMServerRollout", "init_args": {"url": "http://localhost:8000", "timeout_s": 5}}
    sampler = build_engine(spec, merge_adapter=False)
    assert isinstance(sampler, VLLMServerRollout)
    assert isinstance(sampler, RolloutEngine)
    assert (sampler.own_numerics, build_engine(None, False).own_numerics) == (True, False)
    for wrong, message in (
        ({"class_path": "VLLMServerRollouts"}, "cannot be made"),
        ({"class_path": "VLLMServerRollout", "init_args": {"uri": "x"}}, "unexpected keyword argument 'uri'"),
        ({"class_path": "builtins.dict"}, "no rollout engine"),
    ):
        with pytest.raises(ValueError, match=message):
            build_engine(wrong, merge_adapter=False)
    with pytest.raises(ValueError, match="merge_adapter is a setting of the trainer's own sampler"):
        build_engine(spec, merge_adapter=True)


def test_another_sampler_switches_the_correction_on_and_the_trainers_own_does_not() -> None:
    server = {"class_path": "VLLMServerRollout", "init_args": {"url": "http://localhost:8000"}}
    common: dict[str, Any] = {"policy": {"model_type": "qwen3"}, "train_tokenizer": {"vocab_size": 280}}
    assert GRPOModule(**common).mismatch is None
    assert GRPOModule(**common, rollout=server, max_new_tokens=1536).mismatch == ("geometric_mis", 0.9, 1.1)
    assert GRPOModule(**common, rollout=server, max_new_tokens=100).mismatch == ("token_tis", 0.0, 2.0)
    assert GRPOModule(**common, rollout=server, mismatch=None).mismatch is None
    chosen = {"mode": "token_mis", "low": 0.5, "high": 2}
    assert GRPOModule(**common, rollout=server, mismatch=chosen).mismatch == ("token_mis", 0.5, 2.0)
    truncating: dict[str, Any] = {"rollout": server, "top_p": 0.9, "truncated_sampling": "untruncated"}
    with pytest.raises(ValueError, match="off by the mass they cut"):
        GRPOModule(**common, **truncating)
    with pytest.raises(ValueError, match="log-probabilities of the truncated distribution"):
        GRPOModule(**common, **truncating, mismatch=None, updates_per_window=2, reuse_sampler_log_probs=True)
    assert GRPOModule(**common, **truncating, mismatch=None).mismatch is None
    word: Any = "sometimes"
    with pytest.raises(ValueError, match="give auto, null"):
        GRPOModule(**common, mismatch=word)
