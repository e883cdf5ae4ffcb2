"""A trained coder as plain tensors in the model's own units: what is saved, converted and exchanged with other libraries."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from theodolite.provenance import file_hash, manifest, write_json_atomic

from .transcoder import Transcoder

WEIGHTS_FILE, SETTINGS_FILE = "transcoder.safetensors", "transcoder.json"
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold")


@dataclass(frozen=True)
class CoderWeights:
    """A coder without normalisation or training state: ``R = select(W_enc x + b_enc) W_dec + b_dec + W_skip x`` in raw units.

    Attributes:
        W_enc: (M, d_in).
        b_enc: (M,).
        W_dec: (M, d_out).
        b_dec: (d_out,).
        W_skip: (d_out, d_in), or None.
        threshold: (M,) what a score must exceed, or None where ``k`` selects.
        k: Active latents per token where they are chosen by rank, else None.
        rescaled: Scores are pre-activations times the decoder's row norms.
        prefixes: Ends of the nested prefixes.
        input_site: Where the input was read, ``mlp_in.8``; None if unknown.
        target_site: Where the target was read.
        model: Hub id or folder of the language model.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None = None
    threshold: Tensor | None = None
    k: int | None = None
    rescaled: bool = False
    prefixes: tuple[int, ...] = ()
    input_site: str | None = None
    target_site: str | None = None
    model: str | None = None

    @property
    def autoencoder(self) -> bool:
        """Whether it reconstructs what it reads."""
        return self.input_site is not None and self.input_site == self.target_site

    def facts(self) -> dict[str, Any]:
        """Everything but tensors, as plain data."""
        plain = {name: value for name, value in asdict(replace(self, **dict.fromkeys(TENSORS, None))).items() if name not in TENSORS}
        return plain | {"prefixes": list(self.prefixes)}


def weights_of(coder: Transcoder, **sites: str | None) -> CoderWeights:
    r"""A coder's weights with its units folded in, exactly up to rounding.

    .. math:: W_\text{enc} \to s_\text{in} W_\text{enc},\quad b_\text{enc} \to b_\text{enc} - s_\text{in} W_\text{enc} \mu_\text{in},\quad
        W_\text{dec} \to W_\text{dec} / s_\text{out},\quad b_\text{dec} \to b_\text{dec} / s_\text{out} + \mu_\text{out}

    Scores do not change, so thresholds do not either; a selection rescaled by row norms keeps its norms by carrying the factor
    :math:`s_\text{out}` in its threshold.

    Args:
        coder: The coder.
        sites: ``input_site``, ``target_site``, ``model``.
    """
    with torch.no_grad():
        wide = {name: p.detach().double() for name, p in coder.named_parameters()}
        s_in, s_out = coder.input_scale.double(), coder.target_scale.double()
        W_enc, W_dec, skip = wide["W_enc"] * s_in, wide["W_dec"] / s_out, wide.get("W_skip")
        b_dec = wide["b_dec"] / s_out + coder.target_mean.double()
        if skip is not None:
            skip = skip * s_in / s_out
            b_dec = b_dec - skip @ coder.input_mean.double()
        rescaled = coder.decoder_norm == "rescaled"
        threshold = None if coder.activation == "topk" and not coder.calibrated else coder.threshold.double()
        return CoderWeights(
            W_enc.float().cpu(), (wide["b_enc"] - W_enc @ coder.input_mean.double()).float().cpu(), W_dec.float().cpu(),
            b_dec.float().cpu(), None if skip is None else skip.float().cpu(),
            None if threshold is None else (threshold / s_out if rescaled else threshold).float().cpu(),
            coder.k if coder.activation == "topk" else None, rescaled, tuple(coder.prefixes.tolist()), **sites,
        )  # fmt: skip


def coder_from(weights: CoderWeights) -> Transcoder:
    """A coder that computes what the weights say, in raw units and with its threshold fixed."""
    m, d_in = weights.W_enc.shape
    coder = Transcoder(
        d_in, weights.W_dec.shape[1], m, weights.k or 1, "jumprelu" if weights.k is None else "topk", weights.prefixes or None,
        weights.W_skip is not None, "rescaled" if weights.rescaled else "free", "random",
    )  # fmt: skip
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
            tensor = getattr(weights, name)
            if tensor is not None:
                getattr(coder, name).copy_(tensor)
        if weights.threshold is not None:
            coder.calibrate(weights.threshold)
            if coder.log_threshold is not None:
                coder.log_threshold.copy_(weights.threshold.clamp_min(torch.finfo(torch.float32).tiny).log())
        coder.initialised.fill_(True)
    return coder


def convert_mlp_input(weights: CoderWeights, scale: Tensor, shift: Tensor | None, to: str) -> CoderWeights:
    r"""The same function of the vector before the norm's weight, or after it.

    With :math:`x_\text{mlp\_in} = x_\text{unscaled} \odot g + h`: :math:`W_\text{unscaled} = W \operatorname{diag}(g)` and
    :math:`b_\text{unscaled} = b + W h`.

    Args:
        weights: Of a coder that reads ``mlp_in`` or ``mlp_in_unscaled``.
        scale: (d_in,) g, from :func:`theodolite.sites.mlp_input_affine`.
        shift: (d_in,) h, or None.
        to: ``mlp_in_unscaled`` or ``mlp_in``.

    Raises:
        ValueError: The coder reads another site, or a scale of 0 cannot be undone.
    """
    name, _, layer = (weights.input_site or "").partition(".")
    if {name, to} != {"mlp_in", "mlp_in_unscaled"}:
        raise ValueError(f"A coder of {weights.input_site} cannot be converted to {to}; only mlp_in and mlp_in_unscaled convert exactly.")
    g = scale.detach().double().cpu()
    h = torch.zeros_like(g) if shift is None else shift.detach().double().cpu()
    if to == "mlp_in":
        if bool((g == 0).any()):
            raise ValueError("The norm's weight has zeros, so what they erase cannot be read from mlp_in.")
        g, h = 1 / g, -h / g

    def moved(matrix: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return (matrix.double() * g).float(), (bias.double() + matrix.double() @ h).float()

    W_enc, b_enc = moved(weights.W_enc, weights.b_enc)
    W_skip, b_dec = (None, weights.b_dec) if weights.W_skip is None else moved(weights.W_skip, weights.b_dec)
    return replace(weights, W_enc=W_enc, b_enc=b_enc, W_skip=W_skip, b_dec=b_dec, input_site=f"{to}.{layer}")


def save_weights(weights: CoderWeights, folder: str | Path, **facts: Any) -> None:
    """Write ``transcoder.safetensors``, and ``transcoder.json`` with its hash and whatever ``facts`` say; the latter last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({name: getattr(weights, name) for name in TENSORS}, folder / WEIGHTS_FILE)
    content = manifest(None, model=weights.model, files={"weights": folder / WEIGHTS_FILE}, transcoder=weights.facts(), **facts)
    write_json_atomic(folder / SETTINGS_FILE, content)


def load_own(folder: str | Path) -> CoderWeights:
    """Read what :func:`save_weights` wrote.

    Raises:
        ValueError: The weights are not those that the manifest vouches for.
    """
    folder = Path(folder)
    content = json.loads((folder / SETTINGS_FILE).read_text())
    if content["content_hashes"]["weights"] != file_hash(folder / WEIGHTS_FILE):
        raise ValueError(f"{folder / WEIGHTS_FILE} is not the file that {SETTINGS_FILE} describes; export the coder again.")
    facts = content["transcoder"]
    return CoderWeights(**load_file(folder / WEIGHTS_FILE), **facts | {"prefixes": tuple(facts["prefixes"])})


def save_tensors(tensors: dict[str, Tensor | None], path: Path) -> None:
    """Write the tensors that are there as safetensors, atomically."""
    partial = path.with_name(f".{path.name}.part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, partial)
    partial.replace(path)
