"""The report before a run: every trainer config divides its batch, and what would stop a run has a remedy and exit code 1."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_configs import CONFIGS, ROOT, stack

from theodolite import doctor
from theodolite.batch_arithmetic import split_batch
from theodolite.cli import main
from theodolite.config_layers import Layer, read_layers
from theodolite.doctor import Finding, batches, merged, ranks
from theodolite.policy_memory import at_most, needs

TRAINERS = [name for name in CONFIGS if name.startswith("configs/trainer/")]


def declared_ranks(name: str) -> int:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line.startswith("# ranks:")]
    return int(lines[0].partition(":")[2])


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_config_divides_the_batch_over_the_world_it_is_named_for(name: str) -> None:
    config = merged(read_layers([f"--config={ROOT / layer}" for layer in stack(name)]))
    assert ranks(config) == declared_ranks(name)
    micro = config["model"]["init_args"]["micro_batch_size"]
    expected = split_batch(16, declared_ranks(name), 16, micro)
    assert batches(config).says == str(expected)
    assert expected.global_batch == 256, "the study's global batch does not depend on the machine"


def test_trainers_cover_one_gpu_to_two_nodes() -> None:
    assert sorted(map(declared_ranks, TRAINERS)) == [1, 1, 4, 8, 16]


def test_layers_meet_under_init_args_wherever_they_were_written() -> None:
    layers = [
        Layer("a.yaml", {"model": {"class_path": "M", "init_args": {"group_size": 4}}, "trainer": {"devices": [0, 2]}}),
        Layer("command line", {"model": {"group_size": "8"}, "trainer": {"num_nodes": "2"}}, is_option=True),
    ]
    config = merged(layers)
    assert config["model"] == {"class_path": "M", "init_args": {"group_size": "8"}}
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
    config["model"]["init_args"] |= {"policy": sizes | {"hidden_size": 16384, "num_hidden_layers": 400}}
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
