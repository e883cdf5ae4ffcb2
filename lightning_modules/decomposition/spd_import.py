"""Evaluate a finished run of SPD (goodfire-ai/spd): its target, components and causal-importance functions, from its own files.

Run it::

    theodolite validate --config configs/decomposition/pgd_recon.yaml --model.run wandb:goodfire/spd/runs/s-b9582efc
    theodolite validate --config configs/decomposition/pgd_recon.yaml --model.run folder/of/a/run

A run is ``final_config.yaml`` and ``model_<step>.pth``, which also holds the target's weights. The target's shape is read from those, from
``model_config.yaml`` beside them or in the run that trained the target, or given as ``model.target``. Names of older checkpoints and
configurations are understood. Checkpoints are read with ``weights_only``: nothing in them is executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from theodolite.functional.decomposition_losses import ReconKind
from theodolite.provenance import file_hash

from .component_model import ComponentModel
from .decomposition import Decomposition
from .module import DecompositionModule
from .spd_config import MODEL_CONFIG, SPDRun, download, importance_config, open_run
from .targets.build import Target
from .targets.llama_simple_mlp import LlamaSimpleMLP
from .targets.toy_models import TMS, ResidMLP

KINDS = {"LlamaSimpleMLP": "llama_simple_mlp", "TMSModel": "tms", "ResidMLP": "resid_mlp"}
LLAMA_KEYS = {"vocab_size", "n_layer", "n_head", "n_embd", "n_intermediate", "n_ctx", "rotary_base", "rotary_adjacent_pairs"}


class SPDRunModule(DecompositionModule):
    """A finished SPD run, to be evaluated. Offers ``MaskedReconstruction``.

    Args:
        run: Local folder of the run, or ``wandb:entity/project/runs/id``.
        checkpoint_step: Which ``model_<step>.pth``; null = the latest.
        target_config: Shape of a LlamaSimpleMLP target in the words of its ``model_config.yaml``, where that file cannot be found.
        metrics: Evaluations besides those of callbacks; see :class:`DecompositionModule`.
        use_delta: Attack the delta component, too; null = as the run was trained.
        seed: Of masks and attacks; null = the run's ``seed_everything``.
        micro_batch_size: Rows per forward pass of ``metrics``.
        cache: Folder that downloads are kept in.
    """

    def __init__(
        self,
        run: str,
        checkpoint_step: int | None = None,
        target_config: dict[str, Any] | None = None,
        metrics: list[dict[str, Any]] = [],  # noqa: B006  (never changed; jsonargparse shows it in --help)
        use_delta: bool | None = None,
        seed: int | None = None,
        micro_batch_size: int | None = None,
        cache: str = "runs/spd_cache",
    ) -> None:
        found = open_run(run, cache, checkpoint_step)
        config = found.config
        super().__init__(
            target={"kind": target_kind(found)},
            modules=_patterns(config["module_info"]),
            ci_fn=importance_config(config["ci_config"]),
            metrics=metrics,
            identity_modules=_patterns(config.get("identity_module_info") or []),
            tie=False,  # checkpoints hold both of a tied pair
            sigmoid=config.get("sigmoid_type", "leaky_hard"),
            sampling=config.get("sampling", "continuous"),
            use_delta=config.get("use_delta_component", True) if use_delta is None else use_delta,
            output_loss=config["output_loss_type"],
            seed=seed,
            micro_batch_size=micro_batch_size,
        )
        self.spd_run, self.model_id = found, run
        self._target_config, self._cache = target_config, cache

    def configure_model(self) -> None:
        """Build the target and load the run's weights; once."""
        if self.built is not None:
            return
        state = torch.load(self.spd_run.checkpoint, map_location="cpu", weights_only=True)
        state = {current_name(name): tensor for name, tensor in state.items()}
        kind = cast(ReconKind, self.output_loss)
        # other targets are not the classes that the run names: they give their output itself
        attribute = self.spd_run.config.get("pretrained_model_output_attr") if self.target_spec["kind"] == "hf" else None
        self.target = Target(spd_target(self.spd_run, state, self._target_config, self._cache), kind, attribute)
        model = ComponentModel(self.target.module, self.module_counts, self.identity_modules, output_attr=attribute)
        self.built = Decomposition(model, self.ci_fn_spec, self.sigmoid, self.sampling, self.use_delta, kind)
        load_spd_state(self.built, state)

    @property
    def provenance(self) -> dict[str, Any]:
        """The run, its checkpoint and the checkpoint's hash, for the manifest."""
        checkpoint = self.spd_run.checkpoint
        return {"spd_run": {"run": self.spd_run.name, "checkpoint": checkpoint.name, "sha256": file_hash(checkpoint)}}


def _patterns(infos: list[dict[str, Any]]) -> dict[str, int]:
    return {info["module_pattern"]: info["C"] for info in infos}


def current_name(name: str) -> str:
    """Today's name of a parameter in a checkpoint of any age."""
    name = name.replace("_gates.", "_ci_fns.")
    if name.startswith("patched_model."):
        name = "target_model." + name.removeprefix("patched_model.")
    if name.endswith(".original.weight"):
        name = name.removesuffix(".original.weight") + ".weight"
    match = re.fullmatch(r"(?:target_model\.)?(.+)\.components\.([UV])", name)
    if match:
        name = f"_components.{match[1].replace('.', '-')}.{match[2]}"
    return f"ci_fn.{name}" if name.startswith("_ci_fns.") else name


def load_spd_state(decomposition: Decomposition, state: Mapping[str, Tensor]) -> None:
    """Load target, components and causal-importance functions from a checkpoint with today's names.

    Raises:
        ValueError: If anything is missing, left over, or of another shape: a number would be that of another model.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("target_model."):
            if name != "target_model.W_U":  # a ResidMLP's, which was seen to be its W_E transposed
                renamed["model.target." + name.removeprefix("target_model.")] = tensor
        elif name.startswith("_components."):
            if not name.endswith(".bias"):  # a copy of the target's
                renamed["model.components." + name.removeprefix("_components.")] = tensor
        else:
            renamed[re.sub(r"(^|\.)_", r"\1", name)] = tensor
    tied = {"model.target.lm_head.weight": "model.target.wte.weight"}
    own = decomposition.state_dict()
    renamed |= {name: renamed[source] for name, source in tied.items() if name in own and name not in renamed and source in renamed}
    missing, unknown = sorted(own.keys() - renamed.keys()), sorted(renamed.keys() - own.keys())
    if missing or unknown:
        raise ValueError(f"The checkpoint does not fit its configuration: it lacks {missing[:3]} and has {unknown[:3]} too many.")
    wrong = [name for name, tensor in renamed.items() if tensor.shape != own[name].shape]
    if wrong:
        shapes = f"{tuple(renamed[wrong[0]].shape)}, and the configuration says {tuple(own[wrong[0]].shape)}"
        raise ValueError(f"The checkpoint's {wrong[0]} is {shapes}.")
    decomposition.load_state_dict(renamed)


# ---------------------------------------------------------------------- targets


def spd_target(run: SPDRun, state: Mapping[str, Tensor], given: Mapping[str, Any] | None, cache: str | Path) -> torch.nn.Module:
    """The target model of a run, its weights still to be loaded.

    Raises:
        ValueError: If the target has options that are not known here.
    """
    weights = {name.removeprefix("target_model."): t for name, t in state.items() if name.startswith("target_model.")}
    kind = target_kind(run)
    if kind == "llama_simple_mlp":
        return llama_from_config(given or _model_config(run, cache))
    if kind == "tms":
        n_hidden, n_features = weights["linear1.weight"].shape
        return TMS(n_features, n_hidden, sum(name.startswith("hidden_layers.") for name in weights))
    if kind == "resid_mlp":
        return _resid_mlp(weights)
    model: Any = AutoModelForCausalLM.from_pretrained(run.config["pretrained_model_name"], dtype=torch.float32)
    model.config.use_cache = False
    return model


def target_kind(run: SPDRun) -> str:
    """Our name of the class that the run decomposes.

    Raises:
        ValueError: If it is not known here.
    """
    module, _, name = run.config["pretrained_model_class"].rpartition(".")
    kind = KINDS.get(name, "hf" if module.partition(".")[0] == "transformers" else None)
    if kind is None:
        raise ValueError(
            f"model.run: {run.name} decomposes a {name or 'model without a class'}; {', '.join(KINDS)} and causal language models of "
            "transformers can be imported."
        )
    return kind


def llama_from_config(config: Mapping[str, Any]) -> LlamaSimpleMLP:
    """A LlamaSimpleMLP from SPD's ``model_config.yaml``.

    Raises:
        ValueError: If it has an option that this implementation does not.
    """
    head = config["n_embd"] // config["n_head"]
    expected = {"mlp_bias": False, "attn_bias": False, "rotary_dim": head, "rms_norm_eps": 1e-6}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"The target's {key} is {config[key]}; only {value} is implemented for it.")
    fields = {key: config[key] for key in LLAMA_KEYS if key in config}
    grouped = config.get("use_grouped_query_attention", True)
    return LlamaSimpleMLP(**fields, n_key_value_heads=config.get("n_key_value_heads") if grouped else None)


def _model_config(run: SPDRun, cache: str | Path) -> dict[str, Any]:
    """``model_config.yaml``: beside the run, beside the target's local checkpoint, or in the run that trained the target."""
    named = run.config.get("pretrained_model_path") or run.config.get("pretrained_model_name")
    folders = [run.folder] if named is None else [run.folder, Path(named), Path(named).parent, Path(named).parent.parent]
    found = next((folder / MODEL_CONFIG for folder in folders if (folder / MODEL_CONFIG).is_file()), None)
    if found is None and named is None:
        raise ValueError(f"model.run: {run.name} does not say what its target looks like; give model.target_config.")
    if found is None:
        found = download(str(named), cache, [MODEL_CONFIG]) / MODEL_CONFIG
    return yaml.safe_load(found.read_text(encoding="utf-8"))


def _resid_mlp(weights: Mapping[str, Tensor]) -> ResidMLP:
    if any(name.endswith(".bias") for name in weights) or not torch.equal(weights["W_U"], weights["W_E"].T):
        raise ValueError("model.run: only a ResidMLP without biases whose unembedding is its embedding's transpose can be imported.")
    n_features, d_embed = weights["W_E"].shape
    return ResidMLP(n_features, d_embed, weights["layers.0.mlp_in.weight"].shape[0], sum(n.endswith("mlp_in.weight") for n in weights))
