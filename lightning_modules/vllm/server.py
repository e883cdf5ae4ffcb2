"""Rollouts from a stock ``vllm serve`` on other GPUs or machines."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from theodolite.background import in_background
from theodolite.distributed import gather_objects
from theodolite.shard_work import agreed
from theodolite.vllm_server import CONNECT_TIMEOUT_S, TIMEOUT_S, VLLMServer, VLLMServerError, serve_command

from ..decoding import Sampling
from ..rollouts import Sample
from .agreement import Drawn
from .engine import Push, VLLMEngine
from .weights import base_model, write_weights

OLDEST = (0, 32)
"""The first vLLM whose routes these are."""


class VLLMServerRollout(VLLMEngine):
    """Samples over HTTP: one request per completion, each with a seed of its own; weights go over a disk that both sides see.

    The server is checked in ``setup``: it answers, serves this policy, and has room for what will be asked. Rank 0 sends the weights, every
    rank asks for its own completions. The command that starts a fitting server is printed, and is part of every error.

    Args:
        url: Such as ``http://node7:8000``.
        timeout_s: Longest wait for the completions of a window, or for weights to be taken.
        connect_timeout_s: Longest wait for an answer that needs no computing.
        concurrency: Most requests of one rank in flight.
        served_model: What the server calls its model's source, where that differs from the trainer's; null = must be equal.
        push: See :class:`~.engine.VLLMEngine`.
        tolerance: See :class:`~.engine.VLLMEngine`.
        folder: Where weights are handed over: a disk that trainer and server see under one path; null = in the run's folder.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        concurrency: int = 256,
        served_model: str | None = None,
        push: Push = "auto",
        tolerance: float | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__(push, tolerance, folder)
        self.server = VLLMServer(url, timeout_s, connect_timeout_s, concurrency=concurrency)
        self.served_model = served_model
        self.max_model_len = None

    def _forget(self) -> None:
        super()._forget()
        # unique to this run: a server that outlives it may hold adapters of another one
        self._token = uuid.uuid4().hex[:8]
        self._name: str | None = None
        self._base_version = ""
        self._path: Path | None = None
        self._ahead: Future[list[list[Sample]]] | None = None

    def setup(self, model: nn.Module, end_ids: Sequence[int], pad_id: int, folder: Path | None = None) -> None:
        """As :meth:`~.engine.VLLMEngine.setup`; the server must be there and serve this policy.

        Raises:
            VLLMServerError: It does not answer within ``connect_timeout_s``, serves another model, or is too old.
        """
        super().setup(model, end_ids, pad_id, folder)
        config = base_model(model).config
        source = self.served_model or config.name_or_path
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.server.command = serve_command(
            source or "<folder of the policy>", dtype, self._rank, None, getattr(config, "_commit_hash", None)
        )
        version = self.server.version()
        if not supported(version):
            raise VLLMServerError(
                f"The server at {self.server.url} is vLLM {version}, and {OLDEST[0]}.{OLDEST[1]} or newer is needed; install that "
                f"and start {self.server.command}."
            )
        name, card = next(iter(self.server.models().items()))
        if source and str(card.get("root")) != source:
            raise VLLMServerError(
                f"The server at {self.server.url} serves {card.get('root')!r}, but the policy is {source!r}; start {self.server.command}, "
                "or say rollout.served_model."
            )
        self._base, self.max_model_len = name, int(card["max_model_len"])
        rank_zero_info(f"rollouts from vLLM {version} at {self.server.url}; to start it again: {self.server.command}")

    def _longest(self) -> int:
        assert self.max_model_len is not None
        return self.max_model_len

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> Future[list[list[Sample]]]:
        """See :class:`~..rollouts.SamplesAhead`; refuses what ``generate`` does before anything is asked of the server."""
        self._ahead = in_background(self._prepared(prompts, sampling, seeds), "rollouts")
        return self._ahead

    def _send(self, version: int, prompt: Sequence[int], bind: bool) -> None:
        if self._ahead is not None:  # no rank's completions may change their weights half way
            wait([self._ahead])
            gather_objects(None)

        def send() -> tuple[str | None, str, Any]:
            self._send_and_check(version, prompt, bind)
            return self._name, self._base_version, self.agreement

        self._name, self._base_version, self.agreement = agreed(send)

    def _put(self, name: str) -> None:
        name = f"theodolite-{self._token}-{name}"
        before, old_path = self._name, self._path
        if before is None:
            self._start_afresh()
        if self._by_adapter:
            self._path = self._write_adapter(name)
            self.server.load_adapter(name, str(self._path))
        else:
            self._path = write_weights(self.model, self.folder.resolve() / name)
            self.server.reload_weights(str(self._path), name)
        self._name = name
        if self._by_adapter and before is not None:
            self.server.unload_adapter(before)
        if old_path is not None:
            shutil.rmtree(old_path, ignore_errors=True)

    def _start_afresh(self) -> None:
        """Note the base weights, and delete what an earlier attempt at this run left in its folder when it was ended."""
        self._base_version = self.server.weight_version()
        if self._given_folder is None:  # a folder of one's own choice may hold what another run is using
            for left in self.folder.glob("theodolite-*"):
                shutil.rmtree(left, ignore_errors=True)

    def _reset_prefix_cache(self) -> None:
        self.server.reset_prefix_cache()

    def _draw(self, requests: Sequence[tuple[tuple[int, ...], int]], sampling: Sampling, ends: Sequence[int]) -> list[Drawn]:
        self._check_weights()
        model = self._name if self._by_adapter else self._base
        bodies = [self._body(prompt, seed, sampling, ends) | {"model": model} for prompt, seed in requests]
        choices = self.server.complete(bodies)
        self._check_weights()  # nor were they replaced meanwhile
        return [self._drawn(choice, prompt) for choice, (prompt, _) in zip(choices, requests, strict=True)]

    def _check_weights(self) -> None:
        """A server that was started anew has its own weights again; an adapter would be missed by name, full weights would not."""
        held = self.server.weight_version() == (self._base_version if self._by_adapter else self._name)
        held = held and (not self._by_adapter or self._name in self.server.models())
        if not held:
            raise VLLMServerError(
                f"The server at {self.server.url} no longer holds the weights {self._name}: it was started anew, or another run uses it. "
                "Continue from the last checkpoint with --ckpt_path."
            )

    def _body(self, prompt: tuple[int, ...], seed: int, sampling: Sampling, ends: Sequence[int]) -> dict[str, Any]:
        return {
            "prompt": list(prompt),
            "seed": seed,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            # whatever the model's generation config says besides would make it another distribution
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(ends),
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }

    def _drawn(self, choice: dict[str, Any], prompt: tuple[int, ...]) -> Drawn:
        ids, log_probs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if ids is None or log_probs is None:
            raise VLLMServerError(f"The server at {self.server.url} gives no token ids or log-probabilities; start {self.server.command}.")
        if choice.get("prompt_token_ids") not in (None, list(prompt)):
            raise VLLMServerError(f"The server at {self.server.url} changed a prompt's token ids; does it add tokens of its own?")
        values = tuple(float("nan") if value is None else float(value) for value in log_probs)
        return Drawn(tuple(ids), values, str(choice.get("finish_reason")))

    def offload(self) -> None:
        """Nothing of the trainer's memory is held."""

    def onload(self) -> None:
        """The server is always ready."""

    def teardown(self) -> None:
        """Forget the policy; the server stays, without this run's adapter."""
        name, path = self._name, self._path
        super().teardown()
        if name is None or path is None:  # only the rank that sent weights has a path
            return
        if self._by_adapter:
            try:
                self.server.unload_adapter(name)
            except VLLMServerError as error:  # the run is over, and the server may be gone before it
                rank_zero_info(f"{error}")
        shutil.rmtree(path, ignore_errors=True)


def supported(version: str) -> bool:
    """Whether a server of this version has the routes that are called; one that does not say a number has not been tried."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST
