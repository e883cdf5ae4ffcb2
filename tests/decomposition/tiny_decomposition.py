"""A decomposition of a few hundred numbers, every loss and measure on it, and what a rank of several computes. As a script: one rank."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from theodolite.distributed import sum_gradients
from theodolite.lightning_modules.decomposition.component_model import ComponentModel
from theodolite.lightning_modules.decomposition.decomposition import Decomposition
from theodolite.lightning_modules.decomposition.evaluation import Evaluation, build_measures
from theodolite.lightning_modules.decomposition.registry import OBJECTIVES, build_entry
from theodolite.lightning_modules.decomposition.step import StepBatch, microbatches, step_gradients
from theodolite.lightning_modules.decomposition.targets.llama_simple_mlp import LlamaSimpleMLP

MODULES = {"h.*.attn.[qk]_proj": 5, "h.*.attn.o_proj": 4, "h.*.mlp.c_fc": 6, "wte": 3}
CI_FN = {
    "mode": "global",
    "fn_type": "global_shared_transformer",
    "simple_transformer_ci_cfg": {"d_model": 8, "n_blocks": 1, "mlp_hidden_dim": [8], "attn_config": {"n_heads": 2}},
}
ATTACK = {"n_steps": 2, "step_size": 0.1, "init": "random"}
LOSSES: list[dict[str, Any]] = [
    {"name": "faithfulness", "coeff": 2.0},
    {"name": "importance_minimality", "coeff": 0.01, "pnorm": 0.9, "beta": 0.5, "p_anneal_final_p": 0.4, "p_anneal_start_frac": 0.0},
    {"name": "importance_minimality", "key": "mlp_minimality", "modules": "*mlp*", "coeff": 0.02, "pnorm": 1.2, "beta": 0.2},
    {"name": "unmasked_recon", "coeff": 0.3},
    {"name": "ci_masked_recon", "coeff": 0.5},
    {"name": "ci_masked_recon", "scope": "subset", "coeff": 0.5},
    {"name": "stochastic_recon", "coeff": 1.0, "samples": 2},
    {"name": "stochastic_recon", "scope": "layerwise", "coeff": 0.7},
    {"name": "stochastic_recon", "scope": "subset", "routing": {"probability": 0.6}, "coeff": 0.7},
    {"name": "stochastic_hidden_acts_recon", "coeff": 0.4},
    {"name": "ci_hidden_acts_recon", "coeff": 0.4},
    {"name": "pgd_recon", "coeff": 0.6, **ATTACK},
    {"name": "pgd_recon", "scope": "subset", "coeff": 0.6, "mask_scope": "unique_per_datapoint", **ATTACK},
    {"name": "pgd_hidden_acts_recon", "coeff": 0.2, **ATTACK},
]
MEASURES: list[dict[str, Any]] = [
    *({key: value for key, value in spec.items() if key != "coeff"} for spec in LOSSES),
    {"name": "ci_l0", "threshold": 0.1, "groups": {"attn": ["h.*.attn.*"]}},
    {"name": "component_density"},
    {"name": "ce_kl"},
    {"name": "subset_ce_kl", "subsets": {"mlp": {"include": ["*mlp*"]}, "rest": {"exclude": ["*mlp*"]}}},
    {"name": "attention_patterns", "n_heads": 2, "n_key_value_heads": 1, "q_proj_path": "*q_proj", "k_proj_path": "*k_proj"},
    {"name": "attention_patterns", "n_heads": 2, "n_key_value_heads": 1, "q_proj_path": "*q_proj", "k_proj_path": "*k_proj", "masks": "ci"},
]
ROWS, LENGTH = 8, 5


def tiny(dtype: torch.dtype, **settings: Any) -> Decomposition:
    target = LlamaSimpleMLP(vocab_size=11, n_layer=1, n_head=2, n_embd=8, n_intermediate=8, n_ctx=LENGTH, n_key_value_heads=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + (parameter.ndim == 1))
    arguments: dict[str, Any] = {"sigmoid": "leaky_hard", "use_delta": True, "output_loss": "kl"} | settings
    parts = Decomposition(ComponentModel(target, MODULES), CI_FN, **arguments)
    parts.initialise(3)
    return parts.to(dtype)


def tokens() -> Tensor:
    return torch.randint(0, 11, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))


def numbers(rank: int, ranks: int, micro: int | None, dtype: torch.dtype, sampling: str = "continuous") -> dict[str, Any]:
    """Losses, gradients and measures of the global batch."""
    parts = tiny(dtype, sampling=sampling)
    own = tokens()[rank::ranks]
    objectives = [build_entry(spec, OBJECTIVES, "losses") for spec in LOSSES]
    batch = StepBatch(microbatches(own, rank, ranks, micro), ROWS, (0, "train", 7), 7, 0.3)
    shares = step_gradients(parts, objectives, batch, lambda loss: loss.backward())
    parameters = dict(parts.named_parameters())
    sum_gradients(parameters.values())
    values = torch.stack([share.to(torch.float64) for share in shares.values()])
    if ranks > 1:
        dist.all_reduce(values)
    evaluation = Evaluation(parts, build_measures(MEASURES), 0, 0.3, micro)
    with torch.no_grad():
        for index in range(2):
            evaluation.add((own + index) % 11, index, rank, ranks)
        measured = evaluation.compute(None)
    gradients = {name: p.grad.tolist() for name, p in parameters.items() if p.grad is not None and p.requires_grad}
    return {"losses": dict(zip(shares, values.tolist(), strict=True)), "measures": measured, "gradients": gradients}


def main(folder: str, rank: int, ranks: int) -> None:
    store = f"file://{folder}/store-{ranks}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    for name, micro, dtype in (("float64", None, torch.float64), ("float64-micro", 1, torch.float64), ("float32", None, torch.float32)):
        found = numbers(rank, ranks, micro, dtype)
        if rank == ranks - 1:
            (Path(folder) / f"{ranks}-{name}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
