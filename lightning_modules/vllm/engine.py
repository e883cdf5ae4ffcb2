"""What both vLLM engines share: when weights are sent, that they arrived, and what an answer must look like."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from theodolite.distributed import gather_objects

from ..decoding import Sampling
from ..rollouts import Sample
from .agreement import Agreement, Drawn, check_binding, compare, probe_prompt, probe_sampling
from .weights import adapter_rank, base_model, check_product, fingerprint, has_adapter, write_adapter

Push = Literal["auto", "adapter", "full"]

LOWEST_TEMPERATURE = 0.01
"""vLLM raises whatever is below, with no more than a warning."""


class VLLMEngine(ABC):
    """A sampler with weights and numerics of its own.

    Weights are sent when they changed: the adapter alone under a new name and path, or all tensors. After each time the prefix cache is
    forgotten and a fixed sequence is computed by both sides; the first time, an adapter of random numbers must show its effect.

    Args:
        push: ``adapter`` sends the LoRA adapter, ``full`` all weights with the adapter merged in (rounded, in bfloat16); ``auto`` = the
            adapter where there is one.
        tolerance: Largest mean absolute difference of log-probabilities between sampler and trainer; null = by dtype.
        folder: Where weights are handed over; null = ``sampler/`` in the run's folder.
    """

    own_numerics = True

    def __init__(self, push: Push = "auto", tolerance: float | None = None, folder: str | None = None) -> None:
        if push not in ("auto", "adapter", "full"):
            raise ValueError(f"rollout.push is {push!r}; choose auto, adapter or full.")
        if tolerance is not None and tolerance <= 0:
            raise ValueError(f"rollout.tolerance is {tolerance}; it must be positive: two engines never agree to the last bit.")
        self.push, self.tolerance, self._given_folder = push, tolerance, folder
        self.agreement: Agreement | None = None
        self._temporary: str | None = None
        self._forget()

    def _forget(self) -> None:
        self._model: nn.Module | None = None
        self._end_ids: tuple[int, ...] = ()
        self._version, self._state = -1, ()
        self._pushes = 0

    def setup(self, model: nn.Module, end_ids: Sequence[int], pad_id: int, folder: Path | None = None) -> None:
        """Bind to the policy and refuse what vLLM could not do with it; no engine is built and no weight sent yet.

        Raises:
            ValueError: An adapter that vLLM cannot apply, or that could not be merged for it.
        """
        self._model, self._end_ids = model, tuple(end_ids)
        if self.push == "adapter" and not has_adapter(model):
            raise ValueError("rollout.push is adapter, but the policy has none; set model.lora, or push: full.")
        self._by_adapter = self.push != "full" and has_adapter(model)
        check_product(model)
        self._rank = adapter_rank(model) if self._by_adapter else None
        self.folder = Path(self._given_folder) if self._given_folder else folder / "sampler" if folder else self._temporary_folder()

    def _temporary_folder(self) -> Path:
        self._temporary = self._temporary or tempfile.mkdtemp(prefix="theodolite-sampler-")
        return Path(self._temporary)

    @property
    def model(self) -> Any:
        """The trainer's model. Raises ``RuntimeError`` before ``setup``."""
        if self._model is None:
            raise RuntimeError("The rollout engine was asked to work before setup.")
        return self._model

    def sync(self, version: int) -> None:
        """Send the weights if they changed, and see that they arrived. All ranks must call it.

        Raises:
            DisagreementError: They did not.
            VLLMServerError: The server is away, or refuses them.
        """
        state = fingerprint(self.model)
        if not any(gather_objects(version != self._version or state != self._state)):  # one rank alone must not wait for the others
            return
        prompt = probe_prompt(base_model(self.model).config.get_text_config().vocab_size, self._longest())
        self._send(version, prompt, bind=self._by_adapter and not self._pushes)
        self._version, self._state, self._pushes = version, state, self._pushes + 1
        if self._pushes == 1 and self.agreement is not None:
            rank_zero_info(f"sampler and trainer agree to {self.agreement.mean:.1e} on average, {self.agreement.largest:.1e} at most.")

    @abstractmethod
    def _send(self, version: int, prompt: Sequence[int], bind: bool) -> None:
        """Hand the weights over and check them; on every rank, or on one for all."""

    def _send_and_check(self, version: int, prompt: Sequence[int], bind: bool) -> None:
        """One process's part of :meth:`_send`."""
        if bind:
            check_binding(self.model, prompt, lambda: self._loud_draw(prompt), self.tolerance)
        self._put(f"v{version}-{self._pushes}")
        self._reset_prefix_cache()
        drawn = self._probe(prompt)
        self.agreement = compare(self.model, prompt, drawn, self.tolerance, f"After weight version {version} was sent")

    def _loud_draw(self, prompt: Sequence[int]) -> Drawn:
        self._put("binding-check")
        return self._probe(prompt)

    def _probe(self, prompt: Sequence[int]) -> Drawn:
        drawn = self._draw([(tuple(prompt), 0)], probe_sampling(), ends=())[0]
        check_answer(drawn, probe_sampling().max_new_tokens, ())
        return drawn

    def _write_adapter(self, name: str) -> Path:
        """The adapter in a folder of its own name: vLLM's prefix cache tells adapters apart by name and path."""
        return write_adapter(self.model, self.folder.resolve() / name)

    @abstractmethod
    def _put(self, name: str) -> None:
        """Make the sampler compute with the weights as they are now, known under ``name``."""

    @abstractmethod
    def _reset_prefix_cache(self) -> None:
        """Forget what was computed with earlier weights."""

    @abstractmethod
    def _draw(self, requests: Sequence[tuple[tuple[int, ...], int]], sampling: Sampling, ends: Sequence[int]) -> list[Drawn]:
        """One completion for each (prompt, seed)."""

    @abstractmethod
    def _longest(self) -> int:
        """Most tokens of a prompt and its completion together."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[list[Sample]]:
        """See :class:`~..rollouts.RolloutEngine`. Log-probabilities of truncated sampling (top_p, top_k) are over the kept set.

        Raises:
            RuntimeError: Before ``setup`` or ``sync``, with weights that changed since, or for an answer that is not one.
            ValueError: A prompt that leaves no room for ``max_new_tokens``, a temperature that vLLM would change, or as many seed lists as
                there are prompts were not given.
        """
        return self._prepared(prompts, sampling, seeds)()

    def _prepared(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> Callable[[], list[list[Sample]]]:
        """Whatever :meth:`generate` refuses before it asks, refused now; what is left to do does not look at the policy."""
        _ = self.model
        if self._version < 0:
            raise RuntimeError("The rollout engine was asked to generate before it was given weights; call sync first.")
        if fingerprint(self.model) != self._state:
            raise RuntimeError("The policy changed after the sampler was given its weights; call sync between that and generate.")
        if sampling.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"vLLM samples at temperature {LOWEST_TEMPERATURE} at least, not at {sampling.temperature}; greedy decoding is top_k=1."
            )
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts came with {len(seeds)} lists of seeds; each prompt needs one.")
        room = self._longest() - sampling.max_new_tokens
        too_long = max((len(prompt) for prompt in prompts), default=0)
        if too_long > room:
            raise ValueError(
                f"A prompt has {too_long} tokens, and {room} fit beside max_new_tokens={sampling.max_new_tokens}; start vLLM with a "
                f"max_model_len of {too_long + sampling.max_new_tokens} or more."
            )
        requests = [(tuple(prompt), seed) for prompt, group in zip(prompts, seeds, strict=True) for seed in group]
        version, ends, bounds = self._version, self._end_ids, np.cumsum([0, *(len(group) for group in seeds)])

        def draw() -> list[list[Sample]]:
            drawn = self._draw(requests, sampling, ends) if requests else []
            for answer in drawn:
                check_answer(answer, sampling.max_new_tokens, ends)
            flat = [Sample(a.ids, a.log_probs, "stop" if a.finish == "stop" else "length", version) for a in drawn]
            return [flat[a:b] for a, b in itertools.pairwise(bounds)]

        return draw

    @abstractmethod
    def offload(self) -> None:
        """Give memory back for the training phase, where the engine shares the trainer's device."""

    @abstractmethod
    def onload(self) -> None:
        """Be ready to generate again."""

    def teardown(self) -> None:
        """Forget the policy; idempotent."""
        self._forget()
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None


def check_answer(drawn: Drawn, most: int, ends: Sequence[int]) -> None:
    """Refuse an answer that training could not rely on.

    Raises:
        RuntimeError: An aborted request, a completion without tokens or of the wrong length, one that stopped without an end token.
    """
    fault = None
    if drawn.finish not in ("stop", "length"):
        fault = f"ended with {drawn.finish!r} instead of stop or length"
    elif not 0 < len(drawn.ids) <= most or len(drawn.ids) != len(drawn.log_probs):
        fault = f"has {len(drawn.ids)} tokens and {len(drawn.log_probs)} log-probabilities where 1 to {most} of both were asked for"
    elif drawn.finish == "stop" and drawn.ids[-1] not in ends:
        fault = f"stopped at token {drawn.ids[-1]}, which is no end token of the policy; start vLLM with --generation-config vllm"
    elif drawn.finish == "length" and len(drawn.ids) < most:
        fault = f"was cut after {len(drawn.ids)} of {most} tokens; start vLLM with a larger max_model_len"
    if fault:
        raise RuntimeError(f"A completion of vLLM {fault}.")
