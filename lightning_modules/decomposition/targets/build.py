"""From a configuration to a target model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from theodolite.config_layers import closest
from theodolite.functional.decomposition_losses import ReconKind
from theodolite.seeds import derive_seed

from .llama_simple_mlp import LlamaSimpleMLP
from .toy_models import TMS, InductionHead, ResidMLP, ToyModel, train_toy

TRAINING = {"steps": 3000, "batch_size": 1024, "lr": 5e-3, "probability": 0.05}
"""Defaults of training a toy target on the spot."""


@dataclass(frozen=True)
class Target:
    """A model to decompose.

    Attributes:
        module: The model.
        output_loss: How its output is compared.
        output_attr: Where its output tensor is; see :func:`~theodolite.lightning_modules.decomposition.component_model.output_tensor`.
        features: Number of features, for a model of features; None for tokens.
        tied: Pairs of modules whose weights are transposes of one another.
        provenance: How it came about, for the manifest.
    """

    module: nn.Module
    output_loss: ReconKind
    output_attr: str | None = None
    features: int | None = None
    tied: tuple[tuple[str, str], ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)


def build_target(spec: Mapping[str, Any], seed: int) -> Target:
    """Build a target; toys are trained on the spot, as a function of the configuration and the seed.

    Args:
        spec: ``kind`` and the fields of that kind: ``tms`` (``n_features``, ``n_hidden``, ``n_identity``), ``resid_mlp`` (``n_features``,
            ``d_embed``, ``d_mlp``, ``n_layers``), ``induction`` (``vocabulary``, ``width``, ``length``, ``n_layers``), each with
            :data:`TRAINING`'s keys; ``llama_simple_mlp`` (its arguments, and ``weights``: a safetensors file, else random); ``hf``
            (``model``, ``revision``).
        seed: Of training and random weights.

    Raises:
        ValueError: If there is no such kind, or a key does not belong to it.
    """
    check_target(spec)
    fields = {key: value for key, value in spec.items() if key != "kind"}
    return BUILDERS[spec["kind"]](fields, derive_seed("target", seed))


def check_target(spec: Mapping[str, Any]) -> None:
    """Refuse an unknown kind before anything is built. Raises ``ValueError``."""
    kind = spec.get("kind")
    if kind not in BUILDERS:
        raise ValueError(f"model.target: there is no kind {kind!r}{closest(str(kind), BUILDERS)}.")
    for key in spec:
        if key != "kind" and key not in KEYS[kind]:
            raise ValueError(f"model.target: {kind} has no key {key!r}{closest(key, KEYS[kind])}.")


def _toy(make: Callable[..., ToyModel], fields: Mapping[str, Any], seed: int) -> tuple[ToyModel, dict[str, Any]]:
    training = TRAINING | {key: fields[key] for key in TRAINING if key in fields}
    model = make(**{key: value for key, value in fields.items() if key not in TRAINING})
    with torch.random.fork_rng(devices=[]):
        loss = train_toy(model, seed, int(training["steps"]), int(training["batch_size"]), training["lr"], training["probability"])
    rank_zero_info(f"target trained for {training['steps']} steps to a loss of {loss:.3g}")
    return model, {"target": {"seed": seed, "loss": loss, **training}}


def _tms(fields: Mapping[str, Any], seed: int) -> Target:
    model, provenance = _toy(TMS, fields, seed)
    assert isinstance(model, TMS)
    return Target(model, "mse", features=model.n_features, tied=(("linear1", "linear2"),), provenance=provenance)


def _resid_mlp(fields: Mapping[str, Any], seed: int) -> Target:
    model, provenance = _toy(ResidMLP, fields, seed)
    assert isinstance(model, ResidMLP)
    return Target(model, "mse", features=model.n_features, provenance=provenance)


def _induction(fields: Mapping[str, Any], seed: int) -> Target:
    model, provenance = _toy(InductionHead, fields, seed)
    return Target(model, "kl", provenance=provenance)


def _llama_simple_mlp(fields: Mapping[str, Any], seed: int) -> Target:
    model = LlamaSimpleMLP(**{key: value for key, value in fields.items() if key != "weights"})
    weights = fields.get("weights")
    if weights is None:
        model.initialise(torch.Generator().manual_seed(seed))
    else:
        state = load_file(Path(weights))
        model.load_state_dict({"lm_head.weight": state["wte.weight"]} | state)
    return Target(model, "kl", provenance={"target": {"seed": seed, "weights": weights}})


def _hf(fields: Mapping[str, Any], seed: int) -> Target:
    revision = fields.get("revision")
    model = AutoModelForCausalLM.from_pretrained(fields["model"], revision=revision, attn_implementation="sdpa", dtype=torch.float32)
    model.config.use_cache = False
    return Target(model, "kl", "logits", provenance={"target": {"model": fields["model"], "revision": revision}})


BUILDERS: dict[str, Callable[[Mapping[str, Any], int], Target]] = {
    "tms": _tms,
    "resid_mlp": _resid_mlp,
    "induction": _induction,
    "llama_simple_mlp": _llama_simple_mlp,
    "hf": _hf,
}

KEYS: dict[str, set[str]] = {
    "tms": {"n_features", "n_hidden", "n_identity", *TRAINING},
    "resid_mlp": {"n_features", "d_embed", "d_mlp", "n_layers", *TRAINING},
    "induction": {"vocabulary", "width", "length", "n_layers", *TRAINING},
    "llama_simple_mlp": {
        *("vocab_size", "n_layer", "n_head", "n_embd", "n_intermediate", "n_ctx", "n_key_value_heads"),
        *("rotary_base", "rotary_adjacent_pairs", "weights"),
    },
    "hf": {"model", "revision"},
}
"""Keys by kind."""
