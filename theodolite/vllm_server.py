"""Talks to a stock ``vllm serve`` over HTTP: token ids in; token ids and log-probabilities out; adapters and weights by path.

Nothing of vLLM is imported, so the server may live in any environment and on any machine. Every call ends within the stated limit, and
what goes wrong is one sentence with the remedy.
"""

from __future__ import annotations

import json
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for ``max_lora_rank``."""

RETRY_S = 0.2
"""Between two tries of a cache reset that was refused because blocks were still held."""


class VLLMServerError(RuntimeError):
    """The server is away, is another one, or refused; one sentence."""


def allowed_rank(rank: int) -> int:
    """The smallest ``max_lora_rank`` that holds an adapter of ``rank``.

    Raises:
        ValueError: There is none.
    """
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise ValueError(f"vLLM loads LoRA adapters of rank {LORA_RANKS[-1]} at most, and this one has rank {rank}; lower lora.r.")


def serve_command(model: str, dtype: str, max_lora_rank: int | None, max_model_len: int | None = None, revision: str | None = None) -> str:
    """The shell command that starts a server this client can work with.

    Args:
        model: Hub id or folder, as the trainer loads it.
        dtype: Of the policy, so that both engines round alike.
        max_lora_rank: Of the adapters that will be loaded; None = full weights are pushed.
        max_model_len: Longest prompt plus completion; None = the model's own.
        revision: Of the hub's repository.
    """
    switches = {"VLLM_SERVER_DEV_MODE": "1"} | ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if max_lora_rank else {})
    words = ["vllm", "serve", model, "--dtype", dtype, "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    words += ["--revision", revision] if revision else []
    words += ["--max-model-len", str(max_model_len)] if max_model_len else []
    words += ["--enable-lora", "--max-lora-rank", str(allowed_rank(max_lora_rank)), "--max-cpu-loras", "2"] if max_lora_rank else []
    return " ".join([*(f"{name}={value}" for name, value in switches.items()), shlex.join(words)])


class VLLMServer:
    """One server.

    Args:
        url: Such as ``http://node7:8000``.
        timeout_s: Longest wait for one call, generation of a whole batch included.
        connect_timeout_s: Longest wait for an answer that needs no computing.
        command: How to start the server, for messages.
        concurrency: Most requests in flight at once.
    """

    def __init__(
        self, url: str, timeout_s: float = 1800.0, connect_timeout_s: float = 20.0, command: str = "vllm serve ...", concurrency: int = 256
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is not the address of a vLLM server; write it like http://localhost:8000.")
        if timeout_s <= 0 or connect_timeout_s <= 0 or concurrency < 1:
            raise ValueError(
                f"A vLLM server needs positive timeouts and concurrency, got {timeout_s} s, {connect_timeout_s} s and {concurrency}."
            )
        self.url, self.timeout_s, self.connect_timeout_s = url.rstrip("/"), timeout_s, connect_timeout_s
        self.command, self.concurrency = command, concurrency

    def version(self) -> str:
        """Of vLLM."""
        return str(self._get("/version").get("version", "unknown"))

    def models(self) -> dict[str, dict[str, Any]]:
        """What is served, base model first, by name: ``root`` (path or hub id), ``max_model_len`` and ``parent`` (of adapters)."""
        cards = self._get("/v1/models").get("data")
        if not isinstance(cards, list) or not cards:
            raise VLLMServerError(f"{self.url} answers, but lists no models, so it is no vLLM server of completions; start {self.command}.")
        return {str(card["id"]): card for card in cards}

    def complete(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The single choice of every completion request, in order.

        Raises:
            VLLMServerError: One of them failed, or not all were answered within ``timeout_s``.
        """
        deadline = time.monotonic() + self.timeout_s

        def one(request: Mapping[str, Any]) -> dict[str, Any]:
            choices = self._call("/v1/completions", request, deadline).get("choices") or []
            if len(choices) != 1:
                raise VLLMServerError(f"{self.url} answered a request for one completion with {len(choices)}.")
            return choices[0]

        if not requests:
            return []
        pool = ThreadPoolExecutor(min(self.concurrency, len(requests)))
        try:
            return list(pool.map(one, requests))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after a failure, the others are not waited for

    def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter from a folder that the server can read."""
        self._call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, remedy="loading an adapter")

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter."""
        self._call("/v1/unload_lora_adapter", {"lora_name": name}, remedy="unloading an adapter")

    def reload_weights(self, path: str, version: str) -> None:
        """Replace all weights by those of a folder that the server can read, and name their version."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": path}, "timeout": self.timeout_s}
        self._call("/collective_rpc", body, remedy="replacing the weights")
        self._call("/update_weight_version", {"new_version": version}, remedy="naming the weights' version")

    def weight_version(self) -> str:
        """As the last :meth:`reload_weights` named it; ``default`` after a start."""
        return str(self._get("/weight_info").get("weight_version"))

    def reset_prefix_cache(self) -> None:
        """Forget keys and values of earlier weights. Retried while requests still hold blocks.

        Raises:
            VLLMServerError: It was refused until ``timeout_s`` had passed.
        """
        deadline = time.monotonic() + self.timeout_s
        while not self._call("/reset_prefix_cache", {}, deadline, remedy="resetting the prefix cache").get("success", True):
            if time.monotonic() + RETRY_S > deadline:
                raise VLLMServerError(f"{self.url} would not reset its prefix cache for {self.timeout_s:g} s; does someone else use it?")
            time.sleep(RETRY_S)

    def _get(self, route: str) -> dict[str, Any]:
        return self._call(route, None, time.monotonic() + self.connect_timeout_s)

    def _call(self, route: str, body: Mapping[str, Any] | None, deadline: float | None = None, remedy: str = "") -> dict[str, Any]:
        limit = max(0.01, (time.monotonic() + self.timeout_s if deadline is None else deadline) - time.monotonic())
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data, {"Content-Type": "application/json"})
        return self._guarded(lambda: _answer(request, limit), route, limit, remedy)

    def _guarded(self, call: Callable[[], dict[str, Any]], route: str, limit: float, doing: str) -> dict[str, Any]:
        try:
            return call()
        except urllib.error.HTTPError as error:
            raise VLLMServerError(self._refusal(error, route, doing)) from error
        except TimeoutError as error:
            raise VLLMServerError(self._silence(route, limit)) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise VLLMServerError(self._silence(route, limit)) from error
            raise VLLMServerError(f"No vLLM server answers at {self.url} ({error.reason}); start {self.command}.") from error
        except (OSError, ValueError) as error:  # the connection broke, or what came back is not JSON
            raise VLLMServerError(f"The vLLM server at {self.url} broke off its answer to {route} ({error}); did it die?") from error

    def _refusal(self, error: urllib.error.HTTPError, route: str, doing: str) -> str:
        said = _message(error)
        if error.code == 404 and doing and "adapter" not in said.lower():
            return f"The vLLM server at {self.url} does not offer {doing} ({route}); start {self.command}."
        return f"The vLLM server at {self.url} refused {route} ({error.code}): {said}"

    def _silence(self, route: str, limit: float) -> str:
        return (
            f"The vLLM server at {self.url} did not answer {route} within {limit:.0f} s; raise the timeout, or restart it if it is stuck."
        )


def _answer(request: urllib.request.Request, limit: float) -> dict[str, Any]:
    # no proxy: the server is part of the job, and a cluster's proxy for the outside would swallow the call
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=limit) as response:
        text = response.read().decode()
    found = json.loads(text) if text.lstrip().startswith("{") else {"text": text}
    return found


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        return " ".join(text.split())[:400]
    found = found.get("error", found) if isinstance(found, dict) else found
    return str(found.get("message", found.get("detail", found)) if isinstance(found, dict) else found)[:400]
