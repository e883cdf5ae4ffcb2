"""Estimated activations and logits beside what autograd keeps, and the most that is alive, in real passes of tiny models."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from theodolite.lightning_modules.policy import DTYPES, add_lora, freeze_all_but, load_policy
from theodolite.lightning_modules.recomputation import recomputing
from theodolite.lightning_modules.scoring import completion_log_probs, pad_sequences, shared_prefix_log_probs
from theodolite.policy_memory import LOGIT_BYTES, RolloutSize, kept_for_backward, meta_model, policy_memory
from theodolite.protocols import TokenSequence

VOCABULARY, ROWS, PROMPT, COMPLETION = 61, 3, 40, 24
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"}
COMMON: dict[str, Any] = {"num_hidden_layers": 3, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "hidden_size": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "qwen3, wide heads": {
        "model_type": "qwen3",
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "llama": {"model_type": "llama", "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4},
    "llama, wide MLP": {"model_type": "llama", "intermediate_size": 400, "num_attention_heads": 8, "num_key_value_heads": 2},
}
POLICIES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "float32 adapter over bfloat16": ("bfloat16", LORA),
    "adapter of the attention": ("bfloat16", LORA | {"target_modules": ["q_proj", "v_proj"]}),
    "float32 with an adapter": ("float32", LORA),
    "float32": ("float32", None),
}


def sequences() -> list[TokenSequence]:
    """Of nearly one length: the estimate is that of the longest."""
    prompt = tuple(range(2, 2 + PROMPT))
    return [TokenSequence(prompt[: PROMPT - (i == 0)], tuple(range(2 + i, 2 + i + COMPLETION))) for i in range(ROWS)]


def policy(shape: dict[str, Any], dtype: str, lora: dict[str, Any] | None) -> nn.Module:
    model = load_policy(COMMON | shape, None, dtype, 0)
    return (model if lora is None else add_lora(model, lora, 0)).eval()


def padded(model: nn.Module) -> Tensor:
    return completion_log_probs(model, pad_sequences(sequences(), 0, "cpu"))


def shared(model: nn.Module) -> Tensor:
    return shared_prefix_log_probs(model, sequences(), 0, "cpu")[0]


def saved_bytes(model: nn.Module, path: Callable[[nn.Module], Tensor]) -> int:
    """Of what a real pass keeps, besides parameters and logits."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] != (VOCABULARY,):
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        path(model)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


FEW = [("qwen3", "float32 adapter over bfloat16"), ("qwen3, wide heads", "adapter of the attention"), ("llama, wide MLP", "float32")]
REST = [pytest.param(shape, kind, marks=pytest.mark.slow) for shape in SHAPES for kind in POLICIES if (shape, kind) not in FEW]


@pytest.mark.parametrize(("shape", "kind"), [*FEW, *REST])
def test_activations_are_those_that_autograd_keeps(shape: str, kind: str) -> None:
    dtype, lora = POLICIES[kind]
    model = policy(SHAPES[shape], dtype, lora)
    estimated = kept_for_backward(meta_model(COMMON | SHAPES[shape], DTYPES[dtype], lora), ROWS, PROMPT + COMPLETION)
    assert 0.95 < estimated / saved_bytes(model, padded) < 1.15
    assert saved_bytes(model, shared) < estimated, "shared prompts only save"


def test_layers_below_the_first_trained_one_keep_nothing() -> None:
    shape, trained = COMMON | SHAPES["qwen3"], ["model.layers.2.*"]
    model = policy(SHAPES["qwen3"], "float32", None)
    freeze_all_but(model, trained)
    meta = meta_model(shape, torch.float32, None)
    size = RolloutSize(rollouts=ROWS, micro=ROWS, prompt=PROMPT, completion=COMPLETION)
    parts = policy_memory(meta, size, trained)
    assert 0.95 < parts["activations of a microbatch"] / saved_bytes(model, padded) < 1.15
    assert parts["activations of a microbatch"] < 0.5 * policy_memory(meta, size)["activations of a microbatch"]
    assert all(parameter.requires_grad for parameter in meta.parameters()), "counting leaves the model as it was"


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self._gone, storage._cdata)
        return found

    def _gone(self, place: int) -> None:
        self.live -= self.sizes.pop(place)


@pytest.mark.parametrize(("dtype", "path"), [("bfloat16", shared), pytest.param("float32", padded, marks=pytest.mark.slow)])
def test_logits_are_those_of_the_moment_when_most_are_alive(path: Callable[[nn.Module], Tensor], dtype: str) -> None:
    thin = {"model_type": "llama", "intermediate_size": 8, "num_attention_heads": 1, "hidden_size": 8, "num_hidden_layers": 1}
    model = policy(thin | {"vocab_size": 2048}, dtype, LORA)
    with Live() as live:
        path(model).sum().backward()
    assert 0.9 < LOGIT_BYTES * ROWS * COMPLETION * 2048 / live.most < 1.1


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_most_that_is_alive_with_layers_computed_once_more_and_without(recomputed: bool) -> None:
    shape, lora = COMMON | SHAPES["qwen3"] | {"num_hidden_layers": 12}, LORA | {"target_modules": ["q_proj", "v_proj"]}
    model = policy(shape, "float32", lora)
    size = RolloutSize(rollouts=ROWS, micro=ROWS, prompt=PROMPT, completion=COMPLETION)
    parts = policy_memory(meta_model(shape, torch.float32, lora), size, recomputed=recomputed)
    live = Live()
    live.sizes = dict.fromkeys((tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())), 0)  # not counted
    with live, recomputing(model) if recomputed else nullcontext():
        padded(model).sum().backward()
    estimated = sum(parts[f"{name} of a microbatch"] for name in ("activations", "logits")) + parts["gradients"]
    assert 0.9 < estimated / live.most < 1.3


def test_a_model_that_looks_at_values_is_refused() -> None:
    shape = COMMON | SHAPES["llama"] | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(ValueError, match="activations of llama models cannot be counted without values"):
        kept_for_backward(meta_model(shape, torch.float32, None), 1, 8)
