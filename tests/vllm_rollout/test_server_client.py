"""The client of a vLLM server: a failure, a deadline or Ctrl-C ends it at once, whatever other requests are in flight."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fake_server import serving

from theodolite import doctor
from theodolite.doctor import Finding
from theodolite.vllm_server import VLLMServer, VLLMServerError

CHILD = """
import signal, sys
from theodolite.vllm_server import VLLMServer
signal.signal(signal.SIGINT, signal.default_int_handler)
VLLMServer(sys.argv[1], timeout_s=60).complete([{"fails": n == 2 and sys.argv[2] == "refusal"} for n in range(4)])
"""


class Stuck:
    """Refuses the requests that ask for it once all have arrived, and lets the others wait for a minute."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.arrived = threading.Semaphore(0)
        self.all_there, self.over = threading.Event(), threading.Event()

    def answer(self, route: str, body: Any) -> tuple[int, Any]:
        self.arrived.release()
        if self.fault == "trickle":
            return 200, {"choices": [{"token_ids": list(range(100))}]}
        (self.all_there if body["fails"] else self.over).wait(60)
        return 500, {"error": {"message": "the engine is dead"}}


@contextmanager
def stuck(fault: str = "") -> Iterator[tuple[Stuck, str]]:
    server = Stuck(fault)
    with serving(server) as url:
        try:
            yield server, url
        finally:
            server.over.set()


@pytest.mark.parametrize("end", ["refusal", "SIGINT"])
def test_a_process_ends_although_requests_are_in_flight(end: str) -> None:
    with stuck() as (server, url):
        child = subprocess.Popen([sys.executable, "-c", CHILD, url, end], stderr=subprocess.PIPE, text=True)
        try:
            assert all(server.arrived.acquire(timeout=30) for _ in range(4))
            started = time.monotonic()
            server.all_there.set()
            if end == "SIGINT":
                child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=50)
        finally:
            child.kill()
            child.wait()
        seconds = time.monotonic() - started
    assert child.returncode != 0
    assert ("refused /v1/completions (500): the engine is dead" if end == "refusal" else "KeyboardInterrupt") in said
    assert seconds < 40, "the other requests were waited for"


def test_an_answer_that_drips_is_given_up_at_the_limit_and_the_limit_is_named() -> None:
    with stuck("trickle") as (_, url):
        started = time.monotonic()
        with pytest.raises(VLLMServerError, match=r"did not answer /v1/completions within 0\.5 s"):
            VLLMServer(url, timeout_s=0.5).complete([{}, {}])
        with pytest.raises(VLLMServerError, match=r"did not answer /version within 0\.3 s"):
            VLLMServer(url, connect_timeout_s=0.3).version()
        assert time.monotonic() - started < 20, "which is half of what the drops of one answer take"


def test_answers_come_in_the_order_of_the_requests_with_few_threads() -> None:
    class Echo:
        fault = ""

        def answer(self, route: str, body: Any) -> tuple[int, Any]:
            time.sleep(0.01 * (3 - body["n"] % 3))
            return 200, {"choices": [{"n": body["n"]}]}

    with serving(Echo()) as url:
        assert VLLMServer(url, concurrency=3).complete([{"n": n} for n in range(10)]) == [{"n": n} for n in range(10)]
        assert VLLMServer(url).complete([]) == []


def test_the_doctor_asks_a_server_as_the_run_will() -> None:
    class Server:
        fault = ""

        def answer(self, route: str, body: Any) -> tuple[int, Any]:
            return 200, {"version": "0.32.0", "data": [{"id": "served", "root": "mirror/name", "max_model_len": 900}]}

    with serving(Server()) as url:
        common = {"policy": "org/name", "lora": {"lora_alpha": 8}}

        def finding(**given: Any) -> Finding:
            spec = {"class_path": "x.VLLMServerRollout", "init_args": {"url": url} | given}
            return doctor.vllm({"model": {"init_args": common | {"rollout": spec}}})

        assert finding(served_model="mirror/name").remedy == ""
        assert "--max-lora-rank 8" in finding().remedy, "PEFT's default rank"
        assert "start VLLM_SERVER_DEV_MODE=1 vllm serve org/name" in finding(push="full").remedy
        assert "lora" not in finding(push="full").remedy
        common["policy"] = {"model_type": "qwen3"}
        assert finding().remedy == "", "a policy without a name may be any"
        common["lora"] = {"r": 600}
        assert "push to full" in finding().remedy
