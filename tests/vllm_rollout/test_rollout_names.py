"""A rollout engine that a config misnames is one sentence before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from theodolite.cli import _checker
from theodolite.config_check import known_classes
from theodolite.config_layers import ConfigError, Layer
from theodolite.lightning_modules import vllm
from theodolite.lightning_modules.rollouts import RolloutEngine

ENGINES = vllm.__name__
WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"class_path": "VLLMServerRolout"}, ["there is no RolloutEngine called 'VLLMServerRolout'", "closest is VLLMServerRollout"]),
    ({"class_path": f"{ENGINES}.VLLMRolout"}, ["has no class 'VLLMRolout'", "closest is VLLMRollout"]),
    ({"class_path": "theodolite.lightning_modules.vlm.VLLMRollout"}, ["no module 'theodolite.lightning_modules.vlm'", "VLLMRollout"]),
    ({"class_path": "theodolite.lightning_modules.GRPOModule"}, ["GRPOModule is not a RolloutEngine", "HFRollout"]),
    ({"class_path": "VLLMServerRollout", "init_args": {"uri": "x"}}, ["VLLMServerRollout has no argument 'uri'", "'url'"]),
    ({"class_path": "VLLMServerRollout", "init_args": {"url": "x", "timeout_s": "soon"}}, ["timeout_s", '"soon"', "a number"]),
    ({"class_path": "VLLMRollout"}, ["max_model_len is not set"]),
    ({"class_path": 3}, ["must be the name of a class"]),
]


def check(**settings: Any) -> None:
    model = {"class_path": "theodolite.lightning_modules.GRPOModule", "init_args": {"policy": "org/name"} | settings}
    _checker("fit").check([Layer("run.yaml", {"model": model})])


@pytest.mark.parametrize(("rollout", "parts"), WRONG)
def test_a_wrong_engine_is_named_with_the_closest_one(rollout: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        check(rollout=rollout)
    message = str(raised.value)
    assert "model.rollout" in message
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1


def test_engines_are_known_by_what_they_can_do_and_right_ones_pass() -> None:
    known = {name.rpartition(".")[2] for name in known_classes(RolloutEngine)}
    assert {"HFRollout", "VLLMRollout", "VLLMServerRollout"} <= known
    assert "RolloutEngine" not in known
    check(rollout=None)
    check(rollout={"class_path": "VLLMRollout", "init_args": {"max_model_len": 64}})
    check(rollout={"class_path": f"{ENGINES}.VLLMServerRollout", "init_args": {"url": "http://localhost:8000"}})


def test_a_misnamed_loss_is_noticed_as_early() -> None:
    with pytest.raises(ConfigError, match=r"model\.loss\.class_path: there is no class called 'CISPOLos'; the closest is CISPOLoss"):
        check(loss={"class_path": "CISPOLos"})
