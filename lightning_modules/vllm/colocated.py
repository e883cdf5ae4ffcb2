"""Rollouts from a vLLM engine inside the training process: one per rank, asleep while gradients are computed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from theodolite.distributed import on_every_rank, world_size
from theodolite.shard_work import this_rank
from theodolite.vllm_server import allowed_rank

from ..decoding import Sampling
from .agreement import Drawn
from .engine import Push, VLLMEngine
from .weights import base_model, full_weights, has_adapter, write_weights


class VLLMRollout(VLLMEngine):
    """Samples with an engine on the policy's own device. It is built at the first ``sync``, when the policy is where it will stay.

    Args:
        max_model_len: Longest prompt plus completion in tokens.
        gpu_memory_utilization: Fraction of the device that vLLM may fill: its own weights, keys and values. The rest is the trainer's.
        enforce_eager: No CUDA graphs: slower decoding, less memory, a faster start.
        sleep: Give keys and values back, and move vLLM's weights to the host, while gradients are computed (GPU only).
        engine_args: Further arguments of ``vllm.LLM``.
        push: See :class:`~.engine.VLLMEngine`.
        tolerance: See :class:`~.engine.VLLMEngine`.
        folder: Where adapters are handed over; null = in the run's folder.
    """

    def __init__(
        self,
        max_model_len: int,
        gpu_memory_utilization: float = 0.3,
        enforce_eager: bool = False,
        sleep: bool = True,
        engine_args: dict[str, Any] | None = None,
        push: Push = "auto",
        tolerance: float | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__(push, tolerance, folder)
        if max_model_len < 32 or not 0 < gpu_memory_utilization <= 1:
            raise ValueError(
                f"rollout needs max_model_len of at least 32 and gpu_memory_utilization in (0, 1], got {max_model_len} and "
                f"{gpu_memory_utilization}."
            )
        self.max_model_len, self.gpu_memory_utilization, self.enforce_eager = max_model_len, gpu_memory_utilization, enforce_eager
        self.sleep, self.engine_args = sleep, dict(engine_args or {})

    def _forget(self) -> None:
        super()._forget()
        self._llm: Any = None
        self._asleep = False
        self._request: Any = None
        self._own_group = False
        self._source: tuple[str, str | None] = ("", None)
        self._path: Path | None = None

    def setup(self, model: nn.Module, end_ids: Sequence[int], pad_id: int, folder: Path | None = None) -> None:
        """As :meth:`~.engine.VLLMEngine.setup`; vLLM must be installed.

        Raises:
            ValueError: It is not.
        """
        super().setup(model, end_ids, pad_id, folder)
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("VLLMRollout needs vLLM in this environment: pip install 'theodolite[vllm]', or use VLLMServerRollout.")
        self.folder = self.folder / f"rank-{this_rank()}"

    def _longest(self) -> int:
        return self.max_model_len

    def _send(self, version: int, prompt: Sequence[int], bind: bool) -> None:
        if self._llm is None:  # a rank that fails here would leave the others in the collectives of starting engines
            on_every_rank(self._prepare)
        on_every_rank(lambda: self._send_and_check(version, prompt, bind))

    def _put(self, name: str) -> None:
        self._awake()
        if not self._by_adapter:
            weights = full_weights(self.model)
            with _leaving_no_trace():
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            for _ in weights:  # its end puts the adapter back
                pass
            return
        old, self._path = self._path, self._write_adapter(name)
        number = 1 if self._request is None else self._request.lora_int_id + 1
        previous, self._request = (
            self._request,
            _vllm("lora.request").LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(self._path)),
        )
        if not self._llm.llm_engine.add_lora(self._request):
            raise RuntimeError(f"vLLM did not take the adapter {name}.")
        if previous is not None:
            self._llm.llm_engine.remove_lora(previous.lora_int_id)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def _reset_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM would not reset its prefix cache; is another request in flight?")

    def _draw(self, requests: Sequence[tuple[tuple[int, ...], int]], sampling: Sampling, ends: Sequence[int]) -> list[Drawn]:
        self._awake()
        sampling_params = _vllm("sampling_params").SamplingParams
        common: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k, "logprobs": 0}
        common |= {"max_tokens": sampling.max_new_tokens, "stop_token_ids": list(ends), "ignore_eos": True, "detokenize": False}
        prompts = [{"prompt_token_ids": list(prompt)} for prompt, _ in requests]
        settings = [sampling_params(seed=seed, **common) for _, seed in requests]
        with _leaving_no_trace():
            answers = self._llm.generate(prompts, settings, lora_request=self._request, use_tqdm=False)
        return [_drawn(answer.outputs[0]) for answer in answers]

    def _awake(self) -> None:
        if self._llm is None:
            self._llm = self._build()
        elif self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _prepare(self) -> None:
        """What may fail on one rank alone before its engine starts: the device, vLLM's import, the base model's files."""
        parameter, config = next(self.model.parameters()), base_model(self.model).config
        check_device(parameter.device, local_rank() if world_size() > 1 else 0)
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process: it shares the device, and starts in seconds
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        with _leaving_no_trace():
            _vllm("")
        self._source = config.name_or_path, getattr(config, "_commit_hash", None)
        if not config.name_or_path:  # a random initialisation exists nowhere else
            with self.model.disable_adapter() if has_adapter(self.model) else nullcontext():
                self._source = str(write_weights(self.model, self.folder.resolve() / "base")), None

    def _build(self) -> Any:
        parameter, (source, revision) = next(self.model.parameters()), self._source
        settings: dict[str, Any] = {
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enforce_eager": self.enforce_eager,
            "revision": revision,
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "enable_sleep_mode": self._can_sleep(),
        }
        if self._rank is not None:
            settings |= {"enable_lora": True, "max_lora_rank": allowed_rank(self._rank), "max_loras": 1, "max_cpu_loras": 2}
        if world_size() > 1:  # every rank is an engine of its own in the trainer's process group
            settings["distributed_executor_backend"] = "external_launcher"
            for name, number in (("RANK", this_rank()), ("WORLD_SIZE", world_size()), ("LOCAL_RANK", local_rank())):
                os.environ.setdefault(name, str(number))  # which SLURM does not set
        self._own_group = not torch.distributed.is_initialized()
        with _leaving_no_trace():
            return _vllm("").LLM(source, **(settings | self.engine_args))

    def _can_sleep(self) -> bool:
        return self.sleep and next(self.model.parameters()).device.type == "cuda"

    def offload(self) -> None:
        """Sleep: keys and values are dropped, weights go to the host."""
        if self._llm is not None and not self._asleep and self._can_sleep():
            self._llm.sleep(level=1)
            self._asleep = True

    def onload(self) -> None:
        """Wake up, if there is an engine yet."""
        if self._asleep:
            self._awake()

    def teardown(self) -> None:
        """Shut the engine down and forget the policy."""
        llm, path, own_group = self._llm, self._path, self._own_group
        super().teardown()
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            groups = _vllm("distributed.parallel_state")
            groups.destroy_model_parallel()
            if own_group:  # else it is the trainer's
                groups.destroy_distributed_environment()
        if path is not None:
            shutil.rmtree(path.parent, ignore_errors=True)


def local_rank() -> int:
    """This process's number on its machine, as its launcher says."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def check_device(device: torch.device, number: int) -> None:
    """Refuse a policy on another GPU than the one vLLM will take.

    Args:
        device: The policy's.
        number: Of vLLM's GPU: the process's on its machine.

    Raises:
        ValueError: They differ.
    """
    if device.type == "cuda" and device.index not in (None, number):
        raise ValueError(
            f"The policy is on {device}, and vLLM takes cuda:{number} in this process; choose GPUs with CUDA_VISIBLE_DEVICES, and let "
            "trainer.devices be how many they are."
        )


def _vllm(module: str) -> Any:
    """A module of vLLM, imported when it is needed: it is an extra, and takes seconds."""
    return importlib.import_module(f"vllm.{module}" if module else "vllm")


def _drawn(output: Any) -> Drawn:
    """An answer of vLLM as plain numbers: of every position the log-probability of the token that was drawn."""
    ids = tuple(output.token_ids)
    log_probs = tuple(float(position[token].logprob) for token, position in zip(ids, output.logprobs, strict=True))
    return Drawn(ids, log_probs, str(output.finish_reason))


@contextmanager
def _leaving_no_trace() -> Iterator[None]:
    """A starting vLLM seeds the process's generators; training must not notice."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
