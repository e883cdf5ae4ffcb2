"""Where each activation site lies in each model family: the one place that knows module names.

A site is a point of a decoder block that means the same in every family. It is read from (or written to) the input or output of one
module of plain ``transformers``. The trap that this table exists for: ``post_attention_layernorm`` is the norm *before* the MLP in Llama
and Qwen3, and the norm *after* attention in Gemma-2 and Gemma-3; and what Gemma-2's MLP adds to the residual stream is not the output of
its MLP module but of the norm behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

SiteName: TypeAlias = Literal["resid_pre", "attn_out", "resid_mid", "mlp_in_unscaled", "mlp_in", "mlp_out_raw", "mlp_out", "resid_post"]
"""Names in the order in which a block computes them."""

SITES: dict[SiteName, str] = {
    "resid_pre": "residual stream entering the block",
    "attn_out": "what attention adds to the residual stream (after its own norm, where there is one)",
    "resid_mid": "residual stream between attention and MLP, before the MLP's norm",
    "mlp_in_unscaled": "resid_mid normalised, before the norm's weight and bias",
    "mlp_in": "the vector that the MLP reads: normalised, with weight and bias",
    "mlp_out_raw": "output of the MLP module itself",
    "mlp_out": "what the MLP adds to the residual stream (after its own norm, where there is one)",
    "resid_post": "residual stream leaving the block",
}


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Module names inside a decoder block.

    Attributes:
        blocks: Name of the list of blocks.
        attn: The attention module.
        mlp_norm: The norm whose output the MLP reads.
        attn_out: The module whose output is added after attention.
        mlp_out: The module whose output is added after the MLP.
        unit_offset: The MLP's norm multiplies by ``1 + weight`` instead of ``weight``.
    """

    blocks: str
    attn: str
    mlp_norm: str
    attn_out: str
    mlp_out: str
    unit_offset: bool

    def modules(self) -> tuple[str, ...]:
        """Everything a block must have to be of this layout."""
        return (self.attn, "mlp", self.mlp_norm, self.attn_out, self.mlp_out)


_GPT2 = BlockLayout("h", "attn", "ln_2", "attn", "mlp", False)
_PRE_NORM = BlockLayout("layers", "self_attn", "post_attention_layernorm", "self_attn", "mlp", False)
_PRE_NORM_OFFSET = BlockLayout("layers", "self_attn", "post_attention_layernorm", "self_attn", "mlp", True)
_SANDWICH = BlockLayout("layers", "self_attn", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm", True)

LAYOUTS: dict[str, BlockLayout] = {
    "gpt2": _GPT2,
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "gemma": _PRE_NORM_OFFSET,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
}
"""By ``model_type`` of the text config."""

End: TypeAlias = Literal["input", "output", "normalised"]


def site_module(layout: BlockLayout, name: SiteName) -> tuple[str, End]:
    """Module of a block ("" is the block itself) and the end of it at which a site lies.

    ``normalised`` is the input of a norm after its normalisation and before its weight, which no module outputs.
    """
    table: dict[SiteName, tuple[str, End]] = {
        "resid_pre": ("", "input"),
        "attn_out": (layout.attn_out, "output"),
        "resid_mid": (layout.mlp_norm, "input"),
        "mlp_in_unscaled": (layout.mlp_norm, "normalised"),
        "mlp_in": ("mlp", "input"),
        "mlp_out_raw": ("mlp", "output"),
        "mlp_out": (layout.mlp_out, "output"),
        "resid_post": ("", "output"),
    }
    return table[name]


TRANSFORMER_LENS: dict[str, SiteName] = {
    "hook_resid_pre": "resid_pre",
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_in": "resid_mid",
    "ln2.hook_normalized": "mlp_in_unscaled",
    "ln2.hook_normalized*ln2.w": "mlp_in",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_out": "mlp_out_raw",
    "hook_mlp_out": "mlp_out",
    "hook_resid_post": "resid_post",
}
"""Ends of TransformerLens names ``blocks.{layer}.{end}``, which SAELens writes into its configs, for models loaded without processing.

``hook_mlp_in`` is a copy of the residual stream *before* the norm, whatever its name says. ``ln2.hook_normalized`` is the normalised
vector before the weight (in TransformerLens 3; earlier versions differ between norm classes, and after ``fold_ln`` no weight is left).
``*ln2.w`` is not a TransformerLens name; it spells the usual product, which for a LayerNorm lacks the bias that ``mlp_in`` has.
"""
