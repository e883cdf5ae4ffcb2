"""Talks to a stock ``vllm serve`` over HTTP: token ids in; token ids and log-probabilities out; adapters and weights by path.

Nothing of vLLM is imported, so the server may live in any environment and on any machine. Every call ends within the stated limit, and
what goes wrong is one sentence with the remedy.
"""

from __future__ import annotations

import json
import queue
import shlex
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for ``max_lora_rank``."""

TIMEOUT_S = 1200.0
"""Longest wait for one call. Shorter than what ranks wait for one another (30 minutes), so that it is this sentence that ends a run."""

CONNECT_TIMEOUT_S = 20.0
"""Longest wait for an answer that needs no computing."""

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
        self,
        url: str,
        timeout_s: float = TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        command: str = "vllm serve ...",
        concurrency: int = 256,
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
            VLLMServerError: One of them failed, or not all were answered within ``timeout_s``; the others are not waited for.
        """
        answers = self._answers("/v1/completions", requests, _Limit.of(self.timeout_s)) if requests else []
        found = [answer.get("choices") or [] for answer in answers]
        for choices in found:
            if len(choices) != 1:
                raise VLLMServerError(f"{self.url} answered a request for one completion with {len(choices)}.")
        return [choices[0] for choices in found]

    def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter from a folder that the server can read."""
        self._call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, doing="loading an adapter")

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter."""
        limit = _Limit.of(self.connect_timeout_s)
        self._call("/v1/unload_lora_adapter", {"lora_name": name}, limit, "unloading an adapter")

    def reload_weights(self, path: str, version: str) -> None:
        """Replace all weights by those of a folder that the server can read, and name their version."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": path}, "timeout": self.timeout_s}
        self._call("/collective_rpc", body, doing="replacing the weights")
        self._call("/update_weight_version", {"new_version": version}, doing="naming the weights' version")

    def weight_version(self) -> str:
        """As the last :meth:`reload_weights` named it; ``default`` after a start."""
        limit = _Limit.of(self.connect_timeout_s)
        return str(self._call("/weight_info", None, limit, "naming the weights' version").get("weight_version"))

    def reset_prefix_cache(self) -> None:
        """Forget keys and values of earlier weights. Retried while requests still hold blocks.

        Raises:
            VLLMServerError: It was refused until ``timeout_s`` had passed.
        """
        limit = _Limit.of(self.timeout_s)
        while not self._call("/reset_prefix_cache", {}, limit, "resetting the prefix cache").get("success", True):
            if time.monotonic() + RETRY_S > limit.deadline:
                raise VLLMServerError(f"{self.url} would not reset its prefix cache for {limit.seconds:g} s; does someone else use it?")
            time.sleep(RETRY_S)

    def _get(self, route: str) -> dict[str, Any]:
        return self._call(route, None, _Limit.of(self.connect_timeout_s))

    def _call(self, route: str, body: Mapping[str, Any] | None, limit: _Limit | None = None, doing: str = "") -> dict[str, Any]:
        return self._answers(route, [body], limit or _Limit.of(self.timeout_s), doing)[0]

    def _answers(self, route: str, bodies: Sequence[Mapping[str, Any] | None], limit: _Limit, doing: str = "") -> list[dict[str, Any]]:
        try:
            return _in_time(lambda body: self._ask(route, body, limit, doing), bodies, self.concurrency, limit)
        except TimeoutError as error:
            raise VLLMServerError(
                f"The vLLM server at {self.url} did not answer {route} within {limit.seconds:g} s; raise the timeout, or restart it if it "
                "is stuck."
            ) from error

    def _ask(self, route: str, body: Mapping[str, Any] | None, limit: _Limit, doing: str) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data, {"Content-Type": "application/json"})
        try:
            return _answer(request, limit.left())
        except urllib.error.HTTPError as error:
            raise VLLMServerError(self._refusal(error, route, doing)) from error
        except TimeoutError:
            raise
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise error.reason from error
            raise VLLMServerError(f"No vLLM server answers at {self.url} ({error.reason}); start {self.command}.") from error
        except (OSError, ValueError, HTTPException) as error:  # the connection broke, or what came back is not JSON
            raise VLLMServerError(f"The vLLM server at {self.url} broke off its answer to {route} ({error}); did it die?") from error

    def _refusal(self, error: urllib.error.HTTPError, route: str, doing: str) -> str:
        said = _message(error)
        if error.code == 404 and doing and "adapter" not in said.lower():
            return f"The vLLM server at {self.url} does not offer {doing} ({route}); start {self.command}."
        return f"The vLLM server at {self.url} refused {route} ({error.code}): {said}"


@dataclass(frozen=True, slots=True)
class _Limit:
    """A longest wait that has begun.

    Attributes:
        seconds: Its length, for messages.
        deadline: Its end, on the monotonic clock.
    """

    seconds: float
    deadline: float

    @classmethod
    def of(cls, seconds: float) -> _Limit:
        """Begins now."""
        return cls(seconds, time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds until its end. Raises ``TimeoutError`` after it."""
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        return remaining


def _in_time(work: Callable[[S], T], items: Sequence[S], workers: int, limit: _Limit) -> list[T]:
    """``work`` of every item, in order, in threads that nobody waits for after a failure, the limit or the end of the process.

    A socket's own timeout counts from byte to byte, so a server that drips would never reach it; and an executor's threads are joined when
    the interpreter ends, so Ctrl-C would hang for as long as the server does.

    Raises:
        TimeoutError: Not all were done within the limit.
        Exception: What ``work`` raised first.
    """
    waiting: queue.SimpleQueue[tuple[int, S]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, T | Exception]] = queue.SimpleQueue()
    given_up = threading.Event()
    for numbered in enumerate(items):
        waiting.put(numbered)

    def run() -> None:
        while not given_up.is_set():
            try:
                index, item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, work(item)))
            except Exception as error:  # handed to the caller
                done.put((index, error))

    for _ in range(min(workers, len(items))):
        threading.Thread(target=run, daemon=True, name="vllm request").start()
    found: dict[int, T] = {}
    try:
        while len(found) < len(items):
            index, value = done.get(timeout=limit.left())
            if isinstance(value, Exception):
                raise value
            found[index] = value
    except queue.Empty:
        raise TimeoutError from None
    finally:
        given_up.set()
    return [found[index] for index in range(len(items))]


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
