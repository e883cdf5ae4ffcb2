"""The coder itself: parameters, selection, decoding, normalisation. No Lightning, so it can be used inside any model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from theodolite.functional.activation_threshold import mean_of
from theodolite.functional.prefixes import resolve_prefixes
from theodolite.functional.sparse_codes import SparseCodes, above_threshold, topk_codes
from theodolite.functional.sparse_products import decode_blocks
from theodolite.functional.transcoder_losses import nested_reconstructions
from theodolite.seeds import derive_seed

from .selection import Moments

Activation: TypeAlias = Literal["topk", "batchtopk", "jumprelu"]
DecoderNorm: TypeAlias = Literal["unit", "free", "rescaled"]
Init: TypeAlias = Literal["tied", "random", "zeros"]
Normalise: TypeAlias = Literal["none", "scale", "standardise"]


class Transcoder(nn.Module):
    r"""Predicts a target from an input through sparse latents; with target = input it is a sparse autoencoder.

    .. math:: z = W_\text{enc} x + b_\text{enc},\quad a = \text{select}(z),\quad
        R_g = \sum_{i < p_g} a_i\, d_i + b_\text{dec}\; (+ W_\text{skip} x)

    in normalised units, :math:`x = s_\text{in}(x_\text{raw} - \mu_\text{in})` and :math:`y = s_\text{out}(y_\text{raw} - \mu_\text{out})`.
    Nothing is subtracted from the input but :math:`\mu_\text{in}`: the decoder's bias lives in another space.

    Args:
        d_in: Width of the input.
        d_out: Width of the target.
        latents: M.
        k: Active latents per token (``topk``), or on average (``batchtopk``); not used by ``jumprelu``.
        activation: Which latents are active. ``batchtopk`` keeps the k N largest of a batch in training and those above a threshold
            at inference.
        prefixes: Ends of the nested prefixes; None = one, all latents.
        skip: Add a linear map of the input (skip transcoder, arXiv 2501.18823).
        decoder_norm: ``unit`` keeps decoder rows on the sphere; ``free`` does not; ``rescaled`` does not either, but selects by
            pre-activation times row norm.
        init: Decoder rows equal the encoder's (``tied``, needs d_in = d_out), random, or zero (not with ``unit``).
        threshold: Initial threshold of ``jumprelu``.
        seed: Seed of the initialisation.

    Attributes:
        prefixes: (G,) int64 ends of the prefixes.
        threshold_state: (2,) float64 state of the running threshold of ``batchtopk``.
        calibrated_threshold: (M,) float32, NaN until :meth:`calibrate`.
        tokens_since_active: (M,) int64 tokens seen since each latent was last active.
        initialised: Scalar boolean: units and biases have been set from data.
    """

    def __init__(
        self, d_in: int, d_out: int, latents: int, k: int, activation: Activation = "batchtopk", prefixes: Sequence[int] | None = None,
        skip: bool = False, decoder_norm: DecoderNorm = "unit", init: Init = "tied", threshold: float = 0.001, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_settings(d_in, d_out, latents, k, activation, decoder_norm, init)
        self.d_in, self.d_out, self.latents, self.k = d_in, d_out, latents, k
        self.activation: Activation = activation
        self.decoder_norm: DecoderNorm = decoder_norm
        generator = torch.Generator().manual_seed(derive_seed("transcoder", seed))
        encoder = normalize(torch.randn(latents, d_in, generator=generator), dim=1)
        self.W_enc = nn.Parameter(encoder)
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.W_dec = nn.Parameter(_decoder(encoder, d_out, init, generator))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_in)) if skip else None
        self.log_threshold = nn.Parameter(torch.full((latents,), math.log(threshold))) if activation == "jumprelu" else None
        self.prefixes: Tensor
        self.register_buffer("prefixes", torch.tensor(resolve_prefixes(latents, prefixes)))
        self.threshold_state: Tensor
        self.register_buffer("threshold_state", torch.zeros(2, dtype=torch.float64))
        self.calibrated_threshold: Tensor
        self.register_buffer("calibrated_threshold", torch.full((latents,), math.nan))
        self.tokens_since_active: Tensor
        self.register_buffer("tokens_since_active", torch.zeros(latents, dtype=torch.int64))
        self.initialised: Tensor
        self.register_buffer("initialised", torch.tensor(False))
        for name, value in (("input_mean", torch.zeros(d_in)), ("target_mean", torch.zeros(d_out))):
            self.register_buffer(name, value)
        for name in ("input_scale", "target_scale"):
            self.register_buffer(name, torch.ones(()))
        self.input_mean: Tensor
        self.target_mean: Tensor
        self.input_scale: Tensor
        self.target_scale: Tensor

    # ------------------------------------------------------------------ units

    def normalise_input(self, inputs: Tensor) -> Tensor:
        """Raw input to normalised units, in float32."""
        return (inputs.float() - self.input_mean) * self.input_scale

    def normalise_target(self, target: Tensor) -> Tensor:
        """Raw target to normalised units, in float32."""
        return (target.float() - self.target_mean) * self.target_scale

    def denormalise_target(self, reconstruction: Tensor) -> Tensor:
        """Normalised reconstruction to the units of the raw target."""
        return reconstruction / self.target_scale + self.target_mean

    # ------------------------------------------------------------------ encoding

    def scores(self, inputs: Tensor) -> Tensor:
        """(N, M) pre-activations of normalised inputs, times the decoder's row norms where the selection is rescaled."""
        scores = torch.addmm(self.b_enc, inputs, self.W_enc.t())
        return scores * self.W_dec.detach().norm(dim=1) if self.decoder_norm == "rescaled" else scores

    def unscaled(self, codes: SparseCodes) -> SparseCodes:
        """Codes whose values are pre-activations again, from those of :meth:`scores`."""
        if self.decoder_norm != "rescaled":
            return codes
        norms = self.W_dec.detach().norm(dim=1)[codes.latents]
        return codes.with_values(torch.where(codes.values > 0, codes.values / norms, 0))

    @property
    def calibrated(self) -> bool:
        """Whether the inference threshold has been fixed."""
        return not bool(self.calibrated_threshold.isnan().any())

    @property
    def threshold(self) -> Tensor:
        """(M,) what a score must exceed at inference: calibrated, else what ``jumprelu`` learnt, else the running mean."""
        if self.calibrated:
            return self.calibrated_threshold
        if self.log_threshold is not None:
            return self.log_threshold.detach().exp()
        return mean_of(self.threshold_state).to(self.W_enc.dtype).expand(self.latents)

    @torch.no_grad()
    def encode(self, inputs: Tensor) -> SparseCodes:
        """Active latents of raw (N, d_in) inputs by the inference rule: a token's latents do not depend on its neighbours."""
        scores = self.scores(self.normalise_input(inputs))
        codes = topk_codes(scores, self.k) if self.activation == "topk" else above_threshold(scores, self.threshold)
        return self.unscaled(codes)

    # ------------------------------------------------------------------ decoding

    def base(self, inputs: Tensor) -> Tensor:
        """What the latents are added to, for normalised inputs: (d_out,) bias, or (N, d_out) bias and skip connection."""
        return self.b_dec if self.W_skip is None else torch.addmm(self.b_dec, inputs, self.W_skip.t())

    @torch.no_grad()
    def reconstructions(self, inputs: Tensor, codes: SparseCodes) -> Tensor:
        """(N, G, d_out) reconstructions by prefix in the target's own units, of raw inputs and their codes."""
        blocks = decode_blocks(codes, self.W_dec.detach(), self.prefixes)
        return self.denormalise_target(nested_reconstructions(blocks, self.base(self.normalise_input(inputs))))

    def forward(self, inputs: Tensor, prefix: int | None = None) -> Tensor:
        """Reconstruct: (..., d_in) raw inputs to (..., d_out) in the target's units and the input's dtype, without gradient.

        Args:
            inputs: Raw inputs.
            prefix: Which of the nested prefixes, counted from 0; None = all latents.
        """
        flat = inputs.reshape(-1, self.d_in)
        chosen = self.reconstructions(flat, self.encode(flat))[:, -1 if prefix is None else prefix]
        return chosen.to(inputs.dtype).view(*inputs.shape[:-1], self.d_out)

    # ------------------------------------------------------------------ training's own steps

    @torch.no_grad()
    def initialise(self, inputs: Moments, target: Moments, normalise: Normalise, centre_bias: bool) -> None:
        """Set units from the data's moments, and the decoder's bias to the mean target where ``centre_bias`` says so."""
        for name, moments in (("input", inputs), ("target", target)):
            power = moments.variance if normalise == "standardise" else moments.power
            if normalise != "none":
                width = len(moments.mean)
                getattr(self, f"{name}_scale").copy_((moments.count * width / power).sqrt())
            if normalise == "standardise":
                getattr(self, f"{name}_mean").copy_(moments.mean)
        if centre_bias:
            self.b_dec.copy_(self.normalise_target(target.mean))
        self.initialised.fill_(True)

    @torch.no_grad()
    def count_tokens(self, tokens: int, active: Tensor) -> None:
        """Note that ``tokens`` have passed, and which (M,) latents were active on any of them."""
        self.tokens_since_active.add_(tokens).masked_fill_(active, 0)

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from the decoder's gradient what would only change row norms (``unit``)."""
        if self.decoder_norm == "unit" and self.W_dec.grad is not None:
            self.W_dec.grad.addcmul_(self.W_dec, (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True), value=-1)

    @torch.no_grad()
    def renormalise_decoder(self) -> None:
        """Put decoder rows back on the sphere, after the step (``unit``)."""
        if self.decoder_norm == "unit":
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def calibrate(self, threshold: float | Tensor) -> None:
        """Fix the inference threshold, one for all latents or (M,); NaN goes back to the running or learnt one."""
        self.calibrated_threshold.copy_(torch.as_tensor(threshold))


def check_settings(d_in: int, d_out: int, latents: int, k: int, activation: str, decoder_norm: str, init: str) -> None:
    """Refuse what cannot work.

    Raises:
        ValueError: One sentence.
    """
    choices: dict[str, tuple[str, Sequence[str]]] = {
        "activation": (activation, ("topk", "batchtopk", "jumprelu")),
        "decoder_norm": (decoder_norm, ("unit", "free", "rescaled")),
        "init": (init, ("tied", "random", "zeros")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}.")
    if not 1 <= k <= latents:
        raise ValueError(f"k is {k}, which must lie between 1 and the {latents} latents.")
    if init == "tied" and d_in != d_out:
        raise ValueError(f"init is tied, but the input is {d_in} wide and the target {d_out}; choose random or zeros.")
    if init == "zeros" and decoder_norm != "free":
        raise ValueError(f"init is zeros, which has no row norm for decoder_norm {decoder_norm!r}; choose free, or another init.")


def _decoder(encoder: Tensor, d_out: int, init: Init, generator: torch.Generator) -> Tensor:
    rows: dict[Init, Callable[[], Tensor]] = {
        "tied": encoder.clone,
        "random": lambda: normalize(torch.randn(len(encoder), d_out, generator=generator), dim=1),
        "zeros": lambda: torch.zeros(len(encoder), d_out),
    }
    return rows[init]()
