"""Builds policies: any causal language model of ``transformers``, from the hub, a folder or a random initialisation."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_flash_attn_2_available

from theodolite.seeds import derive_seed

ATTENTION = ("sdpa", "eager", "flash_attention_2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_policy_folder(policy: str, key: str = "model.policy") -> None:
    """Refuse a path without a model; what may be a hub id (at most one slash, no leading dot) is left to the hub.

    Args:
        policy: Hub id or folder.
        key: Where the config states it, for the message.

    Raises:
        ValueError: ``policy`` is a path and holds no ``config.json``.
    """
    if (policy.count("/") > 1 or policy.startswith((".", "/"))) and not (Path(policy) / "config.json").is_file():
        raise ValueError(f"{key} is the folder {policy!r}, which holds no config.json: export a model there, or give a hub id.")


def check_precision(precision: str) -> None:
    """Refuse to train in a precision that converts every parameter to half: steps of Adam are lost where weights have 8 bits.

    Args:
        precision: Of the trainer.

    Raises:
        ValueError: It is ``bf16-true`` or ``16-true``.
    """
    if precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision={precision} would round the trained weights and Adam's moments to half precision, adapters included; use "
            "32-true: model.dtype says what the base is held in."
        )


def check_lora(lora: dict[str, Any] | None, trainable: Sequence[str] | None, exports_without_base: bool) -> None:
    """Refuse adapter settings that PEFT does not know, or that say twice what is trained.

    Args:
        lora: Fields of ``peft.LoraConfig``; None = no adapter.
        trainable: Patterns of parameters to train.
        exports_without_base: Whether the trained policy is exported over a base that nobody can load.

    Raises:
        ValueError: They cannot work.
    """
    if lora is None:
        return
    if trainable is not None:
        raise ValueError(
            "model.lora and model.trainable exclude one another; with an adapter, choose its modules with lora.target_modules."
        )
    if exports_without_base:
        raise ValueError("model.lora over a random initialisation would export an adapter without its base; set model.export to false.")
    unknown = sorted(set(lora) - set(LoraConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"model.lora has the unknown key {unknown[0]!r}; the fields of peft.LoraConfig are valid, e.g. r, lora_alpha.")


def check_attention(attention: str | None, dtype: str | None = None, precision: str = "") -> None:
    """Refuse an attention kernel that is unknown, not installed, or cannot compute in what the model is held in.

    Args:
        attention: As ``model.attention``; None = whatever ``transformers`` chooses.
        dtype: Of the weights, where it is to be checked as well.
        precision: Of the trainer.

    Raises:
        ValueError: It cannot be used.
    """
    if attention not in (None, *ATTENTION):
        raise ValueError(f"model.attention is {attention!r}; choose one of {', '.join(ATTENTION)}.")
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError("model.attention=flash_attention_2 needs the package flash-attn and a GPU that it knows; use sdpa instead.")
    if attention == "flash_attention_2" and dtype == "float32" and precision.startswith("32"):
        raise ValueError("model.attention=flash_attention_2 computes in half precision only; set model.dtype to bfloat16, or use sdpa.")


def load_policy(
    policy: str | dict[str, Any],
    revision: str | None,
    dtype: str,
    seed: int,
    vocab_size: int | None = None,
    end_id: int | None = None,
    attention: str | None = None,
) -> nn.Module:
    """A causal language model.

    Args:
        policy: Hub id or folder, or the fields of a ``transformers`` config (``model_type`` and its sizes) for a random initialisation.
        revision: Hub revision.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        seed: Seed of a random initialisation; the global generator is left as it was.
        vocab_size: Vocabulary of a random initialisation, where its config does not say.
        end_id: Its end token likewise: an architecture's default ids mean nothing under another tokenizer.
        attention: Kernel of its attention layers; None = whatever ``transformers`` chooses.

    Returns:
        The model, in train mode.

    Raises:
        ValueError: For an unknown dtype, a missing ``model_type``, or a folder that holds no model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    kernel = {} if attention is None else {"attn_implementation": attention}  # a config may name one itself
    if isinstance(policy, str):
        check_policy_folder(policy)
        model = AutoModelForCausalLM.from_pretrained(policy, revision=revision, dtype=DTYPES[dtype], **kernel)
        return model.train()
    fields = dict(policy)
    if "model_type" not in fields:
        raise ValueError("model.policy is a config without model_type; name the architecture, for example model_type: qwen3.")
    if vocab_size is not None:
        fields.setdefault("vocab_size", vocab_size)
    fields = {"bos_token_id": None, "eos_token_id": end_id} | fields
    config = AutoConfig.for_model(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "policy initialisation"))
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], **kernel).train()


def load_tokenizer(tokenizer: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder, with a padding token (the end token where it has none)."""
    loaded = AutoTokenizer.from_pretrained(tokenizer, revision=revision)
    if loaded.pad_token_id is None:
        loaded.pad_token = loaded.eos_token
    return loaded


def add_lora(model: nn.Module, settings: dict[str, Any], seed: int) -> nn.Module:
    """Wrap a model in a LoRA adapter.

    Args:
        model: The base model.
        settings: Fields of ``peft.LoraConfig``. Dropout defaults to 0: with it, importance ratios are noise.
        seed: Seed of the adapter's initialisation; the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "adapter initialisation"))
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **({"lora_dropout": 0.0} | settings)))  # pyright: ignore[reportArgumentType]


def freeze_all_but(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Leave only parameters whose name matches a pattern trainable.

    Args:
        model: The model; ``requires_grad`` is changed in place.
        patterns: Shell-style patterns over parameter names, e.g. ``*.layers.*_proj.weight``.

    Returns:
        Names of the parameters that stay trainable.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"The pattern {pattern!r} matches no parameter; names look like {names[len(names) // 2]!r}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
