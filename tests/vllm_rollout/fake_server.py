"""A server with the routes, bodies and answers of ``vllm serve``, computed by ``transformers`` and PEFT, that can be told to go wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from safetensors.torch import load_file

from theodolite.lightning_modules.decoding import Sampling, draw, uniform_streams
from theodolite.lightning_modules.policy import load_policy

DEVELOPMENT = ("/reset_prefix_cache", "/collective_rpc", "/weight_info", "/update_weight_version")
"""Routes that a server has under VLLM_SERVER_DEV_MODE=1 only."""


class Answering(Protocol):
    """What can be served; ``fault`` names what goes wrong below the level of answers."""

    fault: str

    def answer(self, route: str, body: Any) -> tuple[int, Any]: ...


class FakeVLLM:
    """What one server holds.

    Args:
        folder: Of the base model.
        max_model_len: Longest prompt plus completion.
    """

    def __init__(self, folder: Path, max_model_len: int = 400) -> None:
        self.folder, self.max_model_len, self.fault = folder, max_model_len, ""
        self.requests: list[tuple[str, Any]] = []
        self.lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """As after a crash: the base model, no adapters."""
        self.base: Any = load_policy(str(self.folder), None, "float32", 0).eval()
        self.peft: Any = None
        self.adapters: dict[str, str] = {}
        self.weight_version = "default"

    def answer(self, route: str, body: Any) -> tuple[int, Any]:
        self.requests.append((route, body))
        handler = {
            "/version": lambda: {"version": "0.32.0"},
            "/v1/models": self.models,
            "/v1/completions": lambda: self.complete(body),
            "/v1/load_lora_adapter": lambda: self.load(body["lora_name"], body["lora_path"]),
            "/v1/unload_lora_adapter": lambda: self.unload(body["lora_name"]),
            "/reset_prefix_cache": lambda: {"success": self.fault != "held blocks"},
            "/collective_rpc": lambda: self.reload(body["kwargs"]["weights_path"]),
            "/update_weight_version": lambda: self.rename(body["new_version"]),
            "/weight_info": lambda: {"weight_version": self.weight_version},
        }.get(route)
        if handler is None or (self.fault == "no development routes" and route in DEVELOPMENT):
            return 404, {"detail": "Not Found"}
        found = handler()
        return found if isinstance(found, tuple) else (200, found)

    def models(self) -> dict[str, Any]:
        root = "someone/else" if self.fault == "another model" else str(self.folder)
        base = {"id": str(self.folder), "root": root, "max_model_len": self.max_model_len}
        return {"object": "list", "data": [base, *({"id": name, "parent": base["id"]} for name in self.adapters)]}

    def load(self, name: str, path: str) -> Any:
        if not Path(path, "adapter_config.json").is_file():
            return 404, {"error": {"message": f"Loading lora {name} failed: No adapter found for {path}", "code": 404}}
        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded.", "code": 400}}
        if self.peft is None:
            self.peft = PeftModel.from_pretrained(self.base, path, adapter_name=name).eval()
        elif not (self.fault == "stale" and self.adapters):
            self.peft.load_adapter(path, adapter_name=name)
        if self.fault == "stale" and self.adapters:
            self.adapters[name] = next(iter(self.adapters.values()))
        else:
            self.adapters[name] = name
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> Any:
        if self.adapters.pop(name, None) is None:
            return 404, {"error": {"message": f"The lora adapter '{name}' cannot be found.", "code": 404}}
        return f"Success: LoRA adapter '{name}' removed successfully."

    def reload(self, path: str) -> Any:
        weights = load_file(Path(path, "model.safetensors"))
        if self.fault == "head not loaded":
            weights.pop("lm_head.weight")
        missing = self.base.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys
        return {"results": [None]}

    def rename(self, version: str) -> Any:
        self.weight_version = version
        return {"success": True, "new_version": version}

    def complete(self, body: Any) -> Any:
        name = body["model"]
        if name not in self.adapters and name != str(self.folder):
            return 404, {"error": {"message": f"The model `{name}` does not exist.", "code": 404}}
        if self.fault == "slow":
            time.sleep(15)
        assert body["ignore_eos"] is True
        assert body["logprobs"] == 0
        assert body["return_token_ids"] is True
        with self.lock:
            model = self._select(name)
            with model.disable_adapter() if self.fault == "unbound adapter" and name in self.adapters else nullcontext():
                ids, values, finish = self._sample(model, body)
        prompt = [1, *body["prompt"]] if self.fault == "added token" else body["prompt"]
        finish = "abort" if self.fault == "abort" else finish
        choice = {"index": 0, "finish_reason": finish, "token_ids": ids, "prompt_token_ids": prompt, "logprobs": {"token_logprobs": values}}
        return {"object": "text_completion", "model": name, "choices": [choice]}

    def _select(self, name: str) -> Any:
        if self.peft is None:
            return self.base
        if name in self.adapters:
            self.peft.base_model.enable_adapter_layers()
            self.peft.set_adapter(self.adapters[name])
        else:
            self.peft.base_model.disable_adapter_layers()
        return self.peft

    @torch.no_grad()
    def _sample(self, model: Any, body: Any) -> tuple[list[int], list[float], str]:
        """Ids, log-probabilities and finish reason: the draws of the trainer's own sampler, one token at a time."""
        sampling = Sampling(body["max_tokens"], body["temperature"], body["top_p"], body["top_k"])
        ids, values, inputs, cache = [], [], body["prompt"], None
        for uniform in uniform_streams([body["seed"]], sampling.max_new_tokens).unbind(1):
            done = model(input_ids=torch.tensor([inputs]), past_key_values=cache, use_cache=True)
            cache, logits = done.past_key_values, done.logits[:, -1]
            token, log_prob = draw(logits, uniform, sampling)
            ids.append(int(token))
            values.append(float(logits.log_softmax(-1)[0, ids[-1]]) if self.fault == "raw log-probabilities" else float(log_prob))
            if ids[-1] in body["stop_token_ids"]:
                return ids, values, "stop"
            inputs = ids[-1:]
        return ids, values, "length"


class Backlogged(ThreadingHTTPServer):
    """Lets as many connections wait as a client opens at once; with the default of five, others are refused on a busy machine."""

    daemon_threads, request_queue_size = True, 256


@contextmanager
def serving(fake: Answering) -> Iterator[str]:
    """Serve it on a free port of this machine; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: Any) -> None:
            if fake.fault == "broken connection" and self.path == "/v1/completions":
                self.connection.close()
                return
            code, found = fake.answer(self.path, body)
            text = (found if isinstance(found, str) else json.dumps(found)).encode()
            try:
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                size = 1 if fake.fault == "trickle" else max(1, len(text))
                for start in range(0, len(text), size):
                    self.wfile.write(text[start : start + size])
                    time.sleep(0.1 if fake.fault == "trickle" else 0.0)
            except OSError:  # the client has given up meanwhile
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = Backlogged(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
