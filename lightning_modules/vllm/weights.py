"""The policy's weights in a form that vLLM loads: a plain LoRA adapter, or every tensor under its Hugging Face name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from theodolite.provenance import write_text_atomic
from theodolite.vllm_server import allowed_rank

from ..merged_adapter import adapted_layers, merged_adapter

PEFT_PREFIX = "base_model.model."


def has_adapter(model: nn.Module) -> bool:
    """Whether any layer carries a LoRA adapter."""
    return bool(adapted_layers(model))


def adapter_rank(model: nn.Module) -> int:
    """Rank of the adapter that :func:`stacked_adapter` writes.

    Raises:
        ValueError: vLLM cannot apply this adapter, or something besides the adapter is trained and would never reach the sampler.
    """
    ranks = []
    for parent, name, layer in adapted_layers(model):
        if not isinstance(layer.get_base_layer(), nn.Linear):
            raise ValueError(f"vLLM applies LoRA to linear layers, and {name} of {type(parent).__name__} is none; leave it out of lora.")
        ranks.append(sum(layer.r[adapter] for adapter in layer.active_adapters if adapter in layer.lora_A))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and ".lora_" not in name]
    if trained:
        raise ValueError(f"{trained[0]} is trained beside the adapter, and an adapter would not carry it to vLLM; use push: full.")
    allowed_rank(max(ranks))
    return max(ranks)


def check_product(model: nn.Module) -> None:
    """Refuse an adapter that is more than a product of two matrices added to each weight: neither its file nor a merge holds the rest.

    Raises:
        ValueError: It is DoRA, has a bias of its own, or keeps second copies of whole modules.
    """
    for _, _, layer in adapted_layers(model):
        if any(layer.use_dora.get(adapter, False) for adapter in layer.active_adapters):
            raise ValueError("vLLM does not apply DoRA; set lora.use_dora to false.")
        if any(layer.lora_bias.get(adapter, False) for adapter in layer.active_adapters):
            raise ValueError("vLLM does not apply an adapter's own bias; set lora.lora_bias to false.")
    copies = [name for name, _ in model.named_parameters() if ".modules_to_save." in name]
    if copies:
        raise ValueError(
            f"{copies[0]} is trained beside the adapter as a second copy, and vLLM has one place for both; leave it out of "
            "lora.modules_to_save."
        )


def stacked_adapter(model: nn.Module) -> dict[str, Tensor]:
    r"""One plain LoRA with the effect of all active adapters, whatever their ranks, scalings and number.

    With :math:`\Delta W = \sum_k s_k B_k A_k`, A is the :math:`A_k` on top of one another and B the :math:`s_k B_k` side by side, filled
    with zeros to one rank R for all layers; its own scaling is 1 (``lora_alpha`` = R).

    Args:
        model: A PEFT model.

    Returns:
        ``{prefix}{module}.lora_A.weight`` (R, d_in) and ``{prefix}{module}.lora_B.weight`` (d_out, R), on the CPU.
    """
    rank, found = adapter_rank(model), {}
    names = {id(module): name for name, module in model.named_modules()}
    for _, _, layer in adapted_layers(model):
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A and not layer.disable_adapters]
        base = layer.get_base_layer().weight
        a = base.new_zeros(rank, base.shape[1], dtype=torch.float32)
        b = base.new_zeros(base.shape[0], rank, dtype=torch.float32)
        row = 0
        for adapter in active:
            stop = row + layer.r[adapter]
            a[row:stop] = layer.lora_A[adapter].weight.detach()
            b[:, row:stop] = layer.scaling[adapter] * layer.lora_B[adapter].weight.detach()
            row = stop
        name = PEFT_PREFIX + names[id(layer)].removeprefix(PEFT_PREFIX)
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = a.cpu(), b.cpu()
    return found


def write_adapter(model: nn.Module, folder: Path) -> Path:
    """Write :func:`stacked_adapter` as a PEFT folder, whole or not at all."""
    tensors = stacked_adapter(model)
    rank = adapter_rank(model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
    }
    partial = _fresh(folder)
    save_file(tensors, partial / "adapter_model.safetensors")
    write_text_atomic(partial / "adapter_config.json", json.dumps(config, indent=2))
    return _in_place(partial, folder)


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under its Hugging Face name, adapters merged in; a tied output head is named too.

    vLLM warns and goes on with what it had where a tied head is missing. Must be exhausted before the model is used otherwise.
    """
    with torch.no_grad(), merged_adapter(model):
        names = set()
        for raw_name, parameter in model.named_parameters():
            name = raw_name.removeprefix(PEFT_PREFIX)
            names.add(name)
            yield name, parameter.detach()
        head = _output_head(model)
        if head is not None and head[0] not in names:
            yield head[0], head[1].detach()


def write_weights(model: nn.Module, folder: Path) -> Path:
    """Write :func:`full_weights` and the config as a folder that vLLM loads, whole or not at all."""
    partial = _fresh(folder)
    save_file({name: tensor.cpu().clone().contiguous() for name, tensor in full_weights(model)}, partial / "model.safetensors")
    base_model(model).config.save_pretrained(partial)
    return _in_place(partial, folder)


def base_model(model: nn.Module) -> Any:
    """The ``transformers`` model under an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Changes whenever a parameter is replaced or written in place; costs no pass over the values."""
    return tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())


def _output_head(model: nn.Module) -> tuple[str, Tensor] | None:
    head = base_model(model).get_output_embeddings()
    if head is None:
        return None
    inner = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    name = next(name for name, module in model.named_modules(remove_duplicate=False) if module in (head, inner))
    return name.removeprefix(PEFT_PREFIX) + ".weight", inner.weight


def _fresh(folder: Path) -> Path:
    partial = folder.with_name(folder.name + ".part")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _in_place(partial: Path, folder: Path) -> Path:
    partial.rename(folder)
    return folder
