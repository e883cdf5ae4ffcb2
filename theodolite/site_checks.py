"""Checks the sites of any model against the model's own arithmetic: ``python -m theodolite.site_checks --model=<hub id or folder>``.

The identities hold bit for bit in a decoder block, in every precision. Where one does not, a name in the table means something else in
this model, and nothing measured there can be trusted.
"""

from __future__ import annotations

import argparse
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from theodolite.site_tables import SITES, SiteName, site_module
from theodolite.sites import ActivationSite, collect_sites, find_blocks, mlp_input_affine


def check_sites(model: nn.Module, layer: int, **inputs: Any) -> dict[str, float]:
    """Largest deviation from each identity of one layer; 0.0 where it holds bit for bit.

    Args:
        model: The language model, in evaluation mode.
        layer: Decoder layer.
        inputs: Of its forward, for example ``input_ids``.

    Returns:
        By identity. ``mlp_in = mlp_in_unscaled * scale + shift`` is relative to the largest entry and exact up to rounding only.
    """
    found = {site.name: value for site, value in collect_sites(model, [ActivationSite(layer, name) for name in SITES], **inputs).items()}
    blocks = find_blocks(model)
    block = blocks.modules[layer]

    def run(site: SiteName, x: Tensor) -> Tensor:
        return cast(Any, block.get_submodule(site_module(blocks.layout, site)[0]))(x)

    with torch.no_grad():
        scale, shift = mlp_input_affine(model, layer)
        rebuilt = found["mlp_in_unscaled"].float() * scale + (0.0 if shift is None else shift)
        pairs = {
            "mlp(mlp_in) = mlp_out_raw": (run("mlp_in", found["mlp_in"]), found["mlp_out_raw"]),
            "norm(resid_mid) = mlp_in": (run("resid_mid", found["resid_mid"]), found["mlp_in"]),
            "resid_mid + mlp_out = resid_post": (found["resid_mid"] + found["mlp_out"], found["resid_post"]),
            "resid_pre + attn_out = resid_mid": (found["resid_pre"] + found["attn_out"], found["resid_mid"]),
        }
    deviations = {name: float((a.float() - b.float()).abs().max()) for name, (a, b) in pairs.items()}
    wide = found["mlp_in"].float()
    return deviations | {"mlp_in = mlp_in_unscaled * scale + shift": float((rebuilt - wide).abs().max() / wide.abs().max())}


def main() -> None:
    """Print the identities of the first, middle and last layer."""
    parser = argparse.ArgumentParser(prog="python -m theodolite.site_checks", description=__doc__)
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    model = cast(nn.Module, AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))).eval()
    blocks = find_blocks(model)
    for layer in sorted({0, len(blocks.modules) // 2, len(blocks.modules) - 1}):
        print(f"layer {layer}, for example mlp_out is {blocks.module_name(ActivationSite(layer, 'mlp_out'))}")
        for name, deviation in check_sites(model, layer, input_ids=torch.arange(16)[None] + 3, use_cache=False).items():
            print(f"  {name:<42} {deviation:.3g}")


if __name__ == "__main__":
    main()
