"""How much memory a GRPO run of a language model needs on one rank, from its config, before anything is loaded: ``--print_memory``.

Counts bytes of what is really there: weights (twice where a frozen copy is kept), what is trained with its gradient and Adam's moments, the
cache of one rollout batch, activations of one microbatch, and its logits. Sizes come from the model's own config, built on the meta device,
and activations from a forward pass there: what autograd keeps is asked of autograd. What a framework's allocator wastes on top is not
counted; leave it a tenth. Weights in shards over ranks (``ModelParallelStrategy``) are counted as one rank holds and gathers them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from theodolite.doctor import in_shards
from theodolite.memory_estimate import GIB
from theodolite.sharded_memory import shards_memory

FUSED_ATTENTION = "theodolite_counted_attention"
LOGIT_BYTES = 16
"""Per logit where most are held: four float32 arrays while the softmax is differentiated. ``split_backward`` needs none of them."""

PHASES = (
    ("cache of a rollout batch", "weights gathered to sample", "shards of gradients"),
    ("activations of a microbatch", "logits of a microbatch", "weights gathered for the gradient", "whole gradients"),
    ("weights gathered for the gradient", "whole gradients", "their sum over ranks"),
)
"""Sampling, a microbatch's gradient, and the sum of gradients over ranks: what is held in them alone."""


@dataclass(frozen=True, slots=True)
class RolloutSize:
    """Sizes of a run on one rank.

    Attributes:
        rollouts: Completions that are sampled at once.
        micro: Sequences per gradient pass.
        prompt: Longest prompt in tokens.
        completion: Longest completion in tokens.
        token_budget: Most completion tokens per gradient pass, where a longer one goes alone; None = as many as ``micro`` rows have.
    """

    rollouts: int
    micro: int
    prompt: int
    completion: int
    token_budget: int | None = None

    @property
    def scored(self) -> int:
        """Most completion tokens of one gradient pass. Rows are not fewer for a budget: short ones fit it in any number up to ``micro``."""
        tokens = self.micro * self.completion
        return tokens if self.token_budget is None else min(tokens, max(self.token_budget, self.completion))


def meta_model(policy: str | Mapping[str, Any], dtype: torch.dtype, lora: Mapping[str, Any] | None) -> nn.Module:
    """The policy without any storage, with its adapter.

    Raises:
        ValueError: Its config cannot be had.
    """
    if isinstance(policy, str):
        try:
            config = AutoConfig.from_pretrained(policy)
        except OSError as error:
            raise ValueError(
                f"the config of {policy!r} cannot be had ({' '.join(str(error).split())[:120]}); name a folder that holds one."
            ) from error
    else:
        config = AutoConfig.for_model(**dict(policy))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # as it is trained: without dropout
        return model if lora is None else get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora)).eval()  # pyright: ignore[reportArgumentType]


def policy_memory(
    model: nn.Module,
    size: RolloutSize,
    trainable: list[str] | None = None,
    reference: bool = False,
    merged: bool = False,
    samples: bool = True,
    recomputed: bool = False,
    shards: int = 1,
    split: bool = False,
) -> dict[str, int]:
    """Bytes by what they are for.

    Args:
        model: On the meta device, with its adapter.
        size: Of the run.
        trainable: Patterns of the trained parameters, where there is no adapter; None = all.
        reference: A frozen copy is kept (without an adapter: for a KL term, or for drift).
        merged: A copy with the adapter folded in is kept for sampling.
        samples: The model itself samples, with a cache of a whole rollout batch; False = another engine does.
        recomputed: Layers keep their input and are computed once more going backwards, one after the other.
        shards: Ranks over which weights, gradients and moments are sharded; 1 = each holds all of them.
        split: In shards, the gradient gathers all weights at once (``split_backward``).
    """
    parameters = {id(p): (name, p) for name, p in model.named_parameters()}.values()
    config: Any = cast(Any, model).config.get_text_config()
    weights = sum(p.numel() * p.element_size() for _, p in parameters)
    wanted = [p for name, p in parameters if p.requires_grad and (trainable is None or any(fnmatchcase(name, t) for t in trainable))]
    frozen = [p for _, p in parameters if not any(p is other for other in wanted)]
    trained = sum(p.numel() * p.element_size() for p in wanted)  # adapters are float32 over a rounded base
    item = next(iter(parameters))[1].element_size()
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    longest = size.prompt + -(-size.scored // size.micro)
    activations = kept_for_backward(model, size.micro, longest, frozen)
    if recomputed:
        activations = 2 * activations // layers + layers * size.micro * longest * hidden * item  # one layer's, with their gradients
    held = {"weights": weights * (1 + reference + merged), "gradients": trained, "optimizer": 2 * trained}
    if shards > 1:
        held = shards_memory(model, wanted, shards, int(reference), merged, split)
    return held | {
        "cache of a rollout batch": samples * 2 * item * size.rollouts * (size.prompt + size.completion) * layers * heads * width,
        "activations of a microbatch": activations,
        "logits of a microbatch": LOGIT_BYTES * size.scored * int(config.vocab_size),
    }


def kept_for_backward(model: nn.Module, rows: int, tokens: int, frozen: Sequence[nn.Parameter] = ()) -> int:
    """Bytes that autograd keeps of a forward pass over padded rows, besides parameters and logits, where attention runs in a fused kernel.

    Args:
        model: On the meta device, where this costs neither memory nor products.
        rows: Sequences.
        tokens: Of each, padding included.
        frozen: Parameters that get no gradient, besides those that say so themselves.

    Raises:
        ValueError: The architecture decides by values what it computes, so nothing can be counted without any.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # by storage: views of one tensor are kept once; held, so that no later one gets its address

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    positions = torch.arange(tokens, device="meta").expand(rows, tokens)
    with _without_gradient(frozen), _fused_attention(model, keep), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        try:
            model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
        except RuntimeError as error:
            kind = getattr(model.config, "model_type", type(model).__name__)
            raise ValueError(f"activations of {kind} models cannot be counted without values ({error}).") from error
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


@contextmanager
def _without_gradient(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, these parameters get no gradient."""
    changed = [parameter.requires_grad_(False) for parameter in parameters if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_()


@contextmanager
def _fused_attention(model: nn.Module, keep: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, attention computes nothing and keeps what a fused kernel does: queries, keys and values of all heads, its output, the mask.

    On the meta device the kernel would be the one that keeps all scores. A model that attends without kernels keeps them anyhow.
    """

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any) -> tuple[Tensor, None]:
        rows, heads, tokens, _ = query.shape
        out = query.new_empty(rows, tokens, heads, value.shape[-1])
        if not (query.requires_grad or key.requires_grad or value.requires_grad):
            return out, None
        for part in (key, value):  # repeated over the queries' heads, where these are more
            keep(part if part.shape[1] == heads else part.new_empty(rows, heads, *part.shape[2:]))
        for part in (query, out, query.new_empty(rows, 1, tokens, key.shape[2])):  # each layer makes numbers of the mask
            keep(part)
        return out.requires_grad_(), None

    config: Any = cast(Any, model).config.get_text_config()
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[FUSED_ATTENTION] = attend
    try:
        if before != "eager":
            config._attn_implementation = FUSED_ATTENTION
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[FUSED_ATTENTION]


def describe(parts: Mapping[str, int]) -> str:
    """The estimate as text, with :func:`at_most`."""
    rows = [*parts.items(), ("at most, on one rank", at_most(parts))]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}} {value / GIB:8.2f} GiB" for name, value in rows)


def at_most(parts: Mapping[str, int]) -> int:
    """Bytes at the largest of the phases, which do not happen at once. Every other part is held in all of them."""
    largest = max(sum(parts.get(name, 0) for name in phase) for phase in PHASES)
    return largest + sum(size for name, size in parts.items() if not any(name in phase for phase in PHASES))


def estimate(tree: Mapping[str, Any], ranks: int) -> str:
    """:func:`needs` as text."""
    size, parts = needs(tree, ranks)
    said = f"{size.rollouts} rollouts at once, microbatches of {size.micro}, up to {size.prompt} + {size.completion} tokens"
    return f"{said}\n{describe(parts)}"


def needs(tree: Mapping[str, Any], ranks: int) -> tuple[RolloutSize, dict[str, int]]:
    """Sizes and bytes of a configuration as plain data: ``model`` and ``data`` with their ``init_args``.

    Args:
        tree: All layers of a command line, merged.
        ranks: Number of processes.

    Raises:
        ValueError: The configuration is not one of a policy that samples.
    """
    model, data = ((tree.get(name) or {}).get("init_args") or {} for name in ("model", "data"))
    if "policy" not in model or "prompts_per_step" not in data:
        raise ValueError("--print_memory estimates GRPO runs: it needs model.policy and data.prompts_per_step.")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[model.get("dtype", "float32")]
    rollouts = int(data["prompts_per_step"]) // ranks * int(model.get("group_size", 8))
    size = RolloutSize(
        rollouts=rollouts,
        micro=int(model.get("micro_batch_size") or rollouts),
        prompt=int(data.get("max_prompt_tokens") or 1536),
        completion=int(model.get("max_new_tokens", 512)),
        token_budget=None if model.get("token_budget") is None else int(model["token_budget"]),
    )
    lora = model.get("lora")
    copies = lora is None and (float(model.get("beta", 0)) > 0 or bool(model.get("eval_drift")))
    built = meta_model(model["policy"], dtype, lora)
    samples = not model.get("rollout")
    flags = {name: bool(model.get(key)) for name, key in (("merged", "merge_adapter"), ("recomputed", "gradient_checkpointing"))}
    split = bool(model.get("split_backward")) and not flags["recomputed"]
    shards = ranks if in_shards(tree) else 1
    return size, policy_memory(built, size, model.get("trainable"), copies, samples=samples, shards=shards, split=split, **flags)
