"""One folder of reference values, in one precision."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from theodolite.functional.component_masks import ComponentMask
from theodolite.lightning_modules.decomposition.ci_functions import ImportanceFunction
from theodolite.lightning_modules.decomposition.component_model import ComponentModel
from theodolite.lightning_modules.decomposition.targets.llama_simple_mlp import Attention, LlamaSimpleMLP

DEFAULT = Path(__file__).parents[3] / "shared" / "golden" / "spd_components"
VARIABLE = "SPD_COMPONENTS_DIRS"
PRECISIONS = {"float64": (torch.float64, "f64", 1e-9), "float32": (torch.float32, "f32", 1e-5)}


def folders() -> list[Path]:
    named = os.environ.get(VARIABLE)
    if named:
        return [Path(folder) for folder in named.split(os.pathsep) if folder]
    return [DEFAULT] if (DEFAULT / "expected.json").exists() else []


class ToyTarget(nn.Module):
    def __init__(self, d_in: int, d_hidden: int, d_mid: int, d_out: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(d_in, d_hidden)
        self.conv = Conv1D(d_mid, d_hidden)
        self.lin2 = nn.Linear(d_mid, d_out, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.conv(F.gelu(self.lin1(inputs)))))


class SPDFixture:
    """Inputs, references and settings; floats in ``precision``."""

    def __init__(self, folder: Path, precision: str) -> None:
        self.dtype, suffix, self.tolerance = PRECISIONS[precision]
        self.precision = precision
        self.settings: dict[str, Any] = json.loads((folder / "expected.json").read_text())
        self.values: dict[str, Any] = self.settings["values"]
        raw = load_file(folder / "fixture.safetensors")
        self.inputs = {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in raw.items()}
        self.reference = load_file(folder / f"reference_{suffix}.safetensors")

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Inputs under a prefix, which is cut off."""
        return {name.removeprefix(prefix): t for name, t in self.inputs.items() if name.startswith(prefix)}

    def expected(self, prefix: str) -> dict[str, Tensor]:
        """References under a prefix, which is cut off."""
        return {name.removeprefix(prefix): t for name, t in self.reference.items() if name.startswith(prefix)}

    def scalar(self, key: str, name: str | None = None) -> float:
        """An expected number; ``correct`` where the recorded one is known to be wrong."""
        entry = self.values[key]
        found = entry.get("correct", {}) if isinstance(entry.get("correct"), dict) else {}
        if name is not None:
            return found.get(name, entry[self.precision][name])
        return entry.get("correct", entry[self.precision])

    def order(self, kind: str) -> list[str]:
        return self.settings["module_order"][kind]

    def model(self, kind: str) -> ComponentModel:
        """The component model of fixture kind ``lm``, ``emb`` or ``toy``, with its weights."""
        part = "toy" if kind == "toy" else "lm"
        target = self._toy() if kind == "toy" else self._lm()
        counts = {name: self.settings["module_to_c"][kind][name] for name in self.order(kind)}
        identity = {name.removesuffix(".pre_identity"): c for name, c in counts.items() if name.endswith(".pre_identity")}
        model = ComponentModel(target, {n: c for n, c in counts.items() if not n.endswith(".pre_identity")}, identity)
        assert model.names == self.order(kind)
        model = model.to(self.dtype)
        for name, site in model.sites.items():
            with torch.no_grad():
                for matrix in ("V", "U"):
                    getattr(site.components, matrix).copy_(self.inputs[f"{part}/components/{name}/{matrix}"])
        return model

    def _lm(self) -> nn.Module:
        s = self.settings["target_model"]
        groups = s["n_key_value_heads"] if s.get("use_grouped_query_attention", True) else None
        target = LlamaSimpleMLP(s["vocab_size"], s["n_layer"], s["n_head"], s["n_embd"], s["n_intermediate"], s["n_ctx"], groups)
        tables = torch.stack([self.inputs["lm/rotary_cos"], self.inputs["lm/rotary_sin"]])
        target = target.to(self.dtype)
        weights = self.tensors("lm/target/")
        target.load_state_dict(weights | {tied: weights[source] for tied, source in self.settings["tied"].items()})
        for block in target.h:
            assert isinstance(block.attn, Attention)
            assert torch.allclose(block.attn.rotary.to(self.dtype), tables[:, : s["n_ctx"]], atol=1e-6)
            block.attn.rotary = tables
        return target

    def _toy(self) -> nn.Module:
        s = self.settings["toy_model"]
        target = ToyTarget(s["d_in"], s["d_hidden"], s["d_mid"], s["d_out"]).to(self.dtype)
        target.load_state_dict(self.tensors("toy/target/"))
        return target

    def batch(self, kind: str, index: int = 0) -> Tensor:
        return self.inputs[f"toy/input/{index}" if kind == "toy" else f"lm/tokens/{index}"]

    def importance_function(self, variant: str, model: ComponentModel) -> ImportanceFunction:
        function = ImportanceFunction(model, self.settings["ci_variants"][variant]["ci_config"]).to(self.dtype)
        state = {own_name(name): t for name, t in self.tensors(f"ci/{variant}/param/").items()}
        state |= {own_name(name): t for name, t in self.tensors(f"ci/{variant}/buffer/").items()}
        function.load_state_dict(state)
        return function

    def masks(self, kind: str, names: list[str], delta: bool, routing: bool) -> dict[str, ComponentMask]:
        """Recorded masks as fresh leaves that need a gradient."""
        part = "toy" if kind == "toy" else "lm"

        def leaf(key: str) -> Tensor:
            return self.inputs[f"{part}/masks/{key}"].clone().requires_grad_()

        return {
            name: ComponentMask(
                leaf(f"component/{name}"),
                leaf(f"delta/{name}") if delta else None,
                self.inputs[f"{part}/masks/routing/{name}"] if routing else None,
            )
            for name in names
        }


def own_name(name: str) -> str:
    """SPD's name of a parameter as ours: without leading underscores."""
    return re.sub(r"(^|\.)_", r"\1", name)


def largest_error(found: Tensor, expected: Tensor, smallest_scale: float = 1e-12) -> float:
    """Largest difference relative to the tensor's largest entry (or ``smallest_scale``: gradients that are zero up to rounding)."""
    scale = max(smallest_scale, float(expected.abs().max())) if expected.numel() else 1.0
    return float((found.detach().to(torch.float64) - expected.to(torch.float64)).abs().max()) / scale
