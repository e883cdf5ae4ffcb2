"""The report before a run: every trainer config divides its batch, and what would stop a run has a remedy and exit code 1."""

from __future__ import annotations

import functools
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_configs import CONFIGS, ROOT, stack

from theodolite import doctor, policy_memory
from theodolite.batch_arithmetic import split_batch
from theodolite.cli import main
from theodolite.config_layers import Layer, merged, read_layers
from theodolite.doctor import Finding, batches, engine_memory, ranks
from theodolite.policy_memory import at_most, needs

TRAINERS = [name for name in CONFIGS if name.startswith("configs/trainer/")]

QWEN3: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen/Qwen3-4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}
QWEN3_COMMON = {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}


def declared(name: str, what: str) -> int:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line.startswith(f"# {what}:")]
    return int(lines[0].partition(":")[2].split()[0])


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_config_divides_the_batch_over_the_world_it_is_named_for(name: str) -> None:
    config = merged(read_layers([f"--config={ROOT / layer}" for layer in stack(name)]))
    assert ranks(config) == declared(name, "ranks")
    micro = config["model"]["init_args"]["micro_batch_size"]
    expected = split_batch(16, declared(name, "ranks"), 16, micro)
    assert batches(config).says == str(expected)
    assert expected.global_batch == 256, "the study's global batch does not depend on the machine"


def test_trainers_cover_one_gpu_to_two_nodes() -> None:
    assert sorted(declared(name, "ranks") for name in TRAINERS) == [1, 1, 4, 8, 16]


def test_layers_meet_under_init_args_wherever_they_were_written() -> None:
    layers = [
        Layer("a.yaml", {"model": {"class_path": "M", "init_args": {"group_size": 4}}, "trainer": {"devices": [0, 2]}}),
        Layer("command line", {"model": {"group_size": "8"}, "trainer": {"num_nodes": "2"}}, is_option=True),
    ]
    config = merged(layers)
    assert config["model"] == {"class_path": "M", "init_args": {"group_size": 8}}
    assert ranks(config) == 4


def test_indivisible_batch_and_missing_server_have_a_remedy() -> None:
    config = {"trainer": {"devices": 3, "accelerator": "cpu"}, "data": {"init_args": {"prompts_per_step": 16}}}
    finding = batches(config)
    assert "15 or 18 would" in finding.says
    assert finding.remedy
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    server = {"class_path": "x.VLLMServerRollout", "init_args": {"url": url}}
    finding = doctor.vllm({"model": {"init_args": {"rollout": server, "policy": "org/name", "lora": {"r": 9}, "dtype": "bfloat16"}}})
    assert "No vLLM server answers" in finding.says
    assert "vllm serve org/name --dtype bfloat16" in finding.remedy
    assert "--max-lora-rank 16" in finding.remedy
    assert doctor.vllm({}).remedy == ""


def test_memory_is_the_recipes_estimate_and_says_where_it_cannot_be_had() -> None:
    sizes = {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1000, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model": {"init_args": {"policy": sizes}}, "data": {"init_args": {"prompts_per_step": 4}}, "trainer": {"accelerator": "cpu"}}
    size, parts = needs(config, 1)
    found = doctor.memory(config)
    assert found.says.startswith(f"at most {at_most(parts) / 2**30:.1f} GiB on a rank with {size.rollouts} rollouts")
    config["model"]["init_args"] |= {"policy": sizes | {"hidden_size": 65536, "num_hidden_layers": 8}}
    assert "lower micro_batch_size" in doctor.memory(config).remedy
    assert "not on this machine" in doctor.memory({"model": {"init_args": {"policy": "no/such-model"}}}).says
    assert "there is no policy" in doctor.memory({}).says


def test_command_prints_a_line_each_and_says_by_its_exit_code_whether_a_run_would_stop(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "sandbox", lambda: Finding("sandbox", "not probed in this test"))
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert out.startswith("ok  machine  Python 3.")
    assert "nothing would stop a run" in out
    monkeypatch.setattr(doctor, "sandbox", lambda: Finding("sandbox", "none holds", "install bubblewrap"))
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    assert "remedy: install bubblewrap" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--config", "no-such.yaml"])
    assert stop.value.code == 2
    assert "There is no config file 'no-such.yaml'" in capsys.readouterr().err


META_MODEL, KEPT = policy_memory.meta_model, policy_memory.kept_for_backward


@functools.cache
def built(policy: str, dtype: torch.dtype, lora: str) -> Any:
    """Once for all configs of one size."""
    return META_MODEL(json.loads(policy), dtype, json.loads(lora))


@functools.cache
def kept(model: torch.nn.Module, rows: int, tokens: int) -> int:
    """Likewise."""
    return KEPT(model, rows, tokens)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_rank_needs_nine_tenths_of_the_device_a_trainer_config_is_for_at_most(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_memory, "meta_model", lambda policy, dtype, lora: built(json.dumps(policy), dtype, json.dumps(lora)))
    monkeypatch.setattr(policy_memory, "kept_for_backward", lambda model, rows, tokens, frozen: kept(model, rows, tokens))
    total = declared(name, "memory") * 2**30
    without = stack(name)
    for layers in (without, [*without[:-1], "configs/grpo/vllm.yaml", name]):
        config = merged(read_layers([f"--config={ROOT / layer}" for layer in layers]))
        model = config["model"]["init_args"]
        model["policy"] = QWEN3_COMMON | QWEN3[model["policy"]]
        _, parts = needs(config, ranks(config))
        parts |= engine_memory(config, total)
        assert ("vLLM" in parts) == ("configs/grpo/vllm.yaml" in layers)
        assert 0.2 * total < at_most(parts) < 0.9 * total, policy_memory.describe(parts)


def options(*words: str, **layers: Any) -> dict[str, Any]:
    return merged(read_layers([f"--config={json.dumps(layers)}", *words]))


def test_words_of_the_command_line_are_what_yaml_takes_them_for() -> None:
    server = {"class_path": "x.VLLMServerRollout", "init_args": {"url": "http://localhost:1"}}
    given = {"policy": "org/name", "rollout": server, "lora": {"r": 4}, "merge_adapter": True}
    model = {"class_path": "GRPOModule", "init_args": given}
    words = ["--model.rollout=null", "--model.lora=null", "--model.merge_adapter=false", "--model.lr=1e-4", "--trainer.num_nodes=2"]
    config = options(*words, "--trainer.devices=[0, 1]", model=model)
    args = config["model"]["init_args"]
    assert (args["rollout"], args["lora"], args["merge_adapter"], args["lr"]) == (None, None, False, 1e-4)
    assert ranks(config) == 4
    assert "the model being trained samples" in doctor.vllm(config).says
    assert options("--data.template=a: b {", "--model.policy=Qwen/Qwen3-4B") == {
        "data": {"init_args": {"template": "a: b {"}},
        "model": {"init_args": {"policy": "Qwen/Qwen3-4B"}},
    }


@pytest.mark.parametrize(
    ("timeout", "limit", "wrong"),
    [
        ("0:30:00", 1200, False),
        ("0:30:00", 1800, True),
        ("0:10:00", None, True),
        (None, None, False),
        (3600, 1800, False),
        ("soon", 9, True),
    ],
)
def test_ranks_must_wait_longer_for_one_another_than_for_a_server(timeout: Any, limit: float | None, wrong: bool) -> None:
    rollout = {"class_path": "x.VLLMServerRollout", "init_args": {} if limit is None else {"timeout_s": limit}}
    strategy = {"class_path": "DDPStrategy", "init_args": {} if timeout is None else {"timeout": timeout}}
    config = {"model": {"init_args": {"rollout": rollout}}, "trainer": {"devices": 2, "strategy": strategy}}
    (found,) = doctor.waiting(config)
    assert bool(found.remedy) == wrong, found
    assert doctor.waiting(config | {"trainer": {"devices": 1}}) == []
