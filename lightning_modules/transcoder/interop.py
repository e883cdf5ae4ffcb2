"""Coders of other libraries: SAELens (read and write) and sparsify (read).

What a format cannot say is refused, not approximated: SAELens has no TopK transcoder, so one is written as JumpReLU only after its
threshold has been calibrated, and the file says so.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from theodolite.provenance import write_json_atomic
from theodolite.sites import parse_site, sparsify_sites

from .weights import SETTINGS_FILE, CoderWeights, load_own, save_tensors

SAELENS_WEIGHTS, SPARSIFY_WEIGHTS, CONFIG = "sae_weights.safetensors", "sae.safetensors", "cfg.json"
SAELENS_VERSION = "6.54.12"
"""Whose format is written; without it SAELens takes a config for one of before version 6."""
SAELENS_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_in_unscaled": "ln2.hook_normalized",
    "mlp_in": "mlp.hook_in",
    "mlp_out_raw": "mlp.hook_out",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
"""Names of our sites in the configs of SAELens."""


def load_weights(folder: str | Path) -> CoderWeights:
    """A coder from a folder of ours, of SAELens or of sparsify.

    Raises:
        ValueError: The folder holds none of them, or one that cannot be represented exactly.
    """
    folder = Path(folder)
    if (folder / SETTINGS_FILE).is_file():
        return load_own(folder)
    if (folder / SAELENS_WEIGHTS).is_file():
        return load_saelens(folder)
    if (folder / SPARSIFY_WEIGHTS).is_file():
        return load_sparsify(folder)
    raise ValueError(f"{folder} holds no coder: expected {SETTINGS_FILE}, {SAELENS_WEIGHTS} (SAELens) or {SPARSIFY_WEIGHTS} (sparsify).")


def load_saelens(folder: str | Path) -> CoderWeights:
    """A coder that SAELens saved: standard, topk, jumprelu, and its four kinds of transcoders.

    Raises:
        ValueError: Another architecture, a normalisation that has not been folded, or reshaped activations.
    """
    config = json.loads((Path(folder) / CONFIG).read_text())
    kind, metadata = config.get("architecture", "standard"), config.get("metadata") or config
    if "topk" in (config.get("activation_fn"), config.get("activation_fn_str")):  # before version 6
        kind, config["k"] = "topk", config["activation_fn_kwargs"]["k"]
    known = ("standard", "topk", "jumprelu", "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
    if kind not in known:
        raise ValueError(f"{folder} has the SAELens architecture {kind!r}; these can be loaded: {', '.join(known)}.")
    for name in ("normalize_activations", "reshape_activations"):
        if config.get(name) not in (None, False, "none"):
            raise ValueError(f"{folder} has {name} {config[name]!r}, which its weights do not contain; fold it in SAELens and save again.")
    state = {name: tensor.float() for name, tensor in load_file(Path(folder) / SAELENS_WEIGHTS).items()}
    weights = CoderWeights(
        state["W_enc"].t().contiguous(), state["b_enc"], state["W_dec"], state["b_dec"], state.get("W_skip"),
        None if kind == "topk" else state.get("threshold", torch.zeros_like(state["b_enc"])),
        k=int(config["k"]) if kind == "topk" else None,
        rescaled=bool(config.get("rescale_acts_by_decoder_norm", False)),
        input_site=_site(metadata.get("hook_name")),
        target_site=_site(metadata.get("hook_name_out") or metadata.get("hook_name")),
        model=metadata.get("model_name"),
    )  # fmt: skip
    return _without_input_bias(weights) if config.get("apply_b_dec_to_input", "transcoder" not in kind) else weights


def load_sparsify(folder: str | Path) -> CoderWeights:
    """A coder that sparsify saved; the folder's name is its hookpoint.

    Raises:
        ValueError: An activation other than TopK.
    """
    config = json.loads((Path(folder) / CONFIG).read_text())
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"{folder} has the sparsify activation {config['activation']!r}; only topk can be loaded.")
    state = {name: tensor.float() for name, tensor in load_file(Path(folder) / SPARSIFY_WEIGHTS).items()}
    try:
        sites = [str(site) for site in sparsify_sites(Path(folder).name, bool(config.get("transcode")))]
    except ValueError:
        sites = [None, None]  # a folder by another name: the weights are good without
    weights = CoderWeights(
        state["encoder.weight"], state["encoder.bias"], state["W_dec"], state["b_dec"], state.get("W_skip"), k=int(config["k"]),
        input_site=sites[0], target_site=sites[1],
    )  # fmt: skip
    return weights if config.get("transcode") else _without_input_bias(weights)


def save_saelens(weights: CoderWeights, folder: str | Path) -> None:
    """Write a folder that SAELens' ``load_from_disk`` reads: the same function, by its own rule of selection where it has it.

    Raises:
        ValueError: A TopK transcoder without a calibrated threshold.
    """
    kind = saelens_architecture(weights)
    tensors: dict[str, Tensor | None] = {
        "W_enc": weights.W_enc.t(), "b_enc": weights.b_enc, "W_dec": weights.W_dec, "b_dec": weights.b_dec, "W_skip": weights.W_skip
    }  # fmt: skip
    config: dict[str, Any] = {"architecture": kind, "d_in": weights.W_enc.shape[1], "d_sae": weights.W_enc.shape[0], "dtype": "float32"}
    config |= {"device": "cpu", "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none"}
    if kind == "topk":
        config |= {"k": weights.k, "rescale_acts_by_decoder_norm": weights.rescaled}
    else:
        weights = _threshold_on_pre_activations(weights)
        tensors["threshold"] = weights.threshold
    if "transcoder" in kind:
        config["d_out"] = weights.W_dec.shape[1]
    config["metadata"] = {
        "sae_lens_version": SAELENS_VERSION,
        "model_name": weights.model,
        "hook_name": _hook(weights.input_site),
        "hook_name_out": _hook(weights.target_site) if "transcoder" in kind else None,
        "matryoshka_widths": list(weights.prefixes),
        "selection": "topk, replaced by its calibrated threshold" if weights.k and kind != "topk" else None,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, Path(folder) / SAELENS_WEIGHTS)
    write_json_atomic(Path(folder) / CONFIG, config)


def saelens_architecture(weights: CoderWeights) -> str:
    """SAELens' name for a coder.

    Raises:
        ValueError: It has none.
    """
    autoencoder = weights.autoencoder and weights.W_skip is None
    if weights.k is not None and autoencoder:
        return "topk"
    if weights.threshold is None:
        raise ValueError(f"SAELens has no TopK transcoder (k={weights.k}); calibrate a threshold first, and it is written as JumpReLU.")
    return "jumprelu" if autoencoder else "jumprelu_transcoder" if weights.W_skip is None else "jumprelu_skip_transcoder"


def _threshold_on_pre_activations(weights: CoderWeights) -> CoderWeights:
    """A selection by rescaled scores as one by pre-activations."""
    if not weights.rescaled or weights.threshold is None:
        return weights
    norms = weights.W_dec.double().norm(dim=1)
    # a row of norm 0 has score 0, which exceeds no threshold
    threshold = torch.where(norms > 0, weights.threshold.double() / norms, torch.inf).float()
    return replace(weights, threshold=threshold, rescaled=False)


def _without_input_bias(weights: CoderWeights) -> CoderWeights:
    """Autoencoders that subtract the decoder's bias from their input: the same in the encoder's bias."""
    return replace(weights, b_enc=(weights.b_enc.double() - weights.W_enc.double() @ weights.b_dec.double()).float())


def _site(hook: str | None) -> str | None:
    return None if hook is None else str(parse_site(hook))


def _hook(site: str | None) -> str | None:
    if site is None:
        return None
    parsed = parse_site(site)
    return f"blocks.{parsed.layer}.{SAELENS_HOOKS[parsed.name]}"
