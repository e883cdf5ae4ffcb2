"""The folder ``talkative`` of a run: everything that training could change, and the settings it belongs to."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from theodolite.provenance import file_hash, write_json_atomic

if TYPE_CHECKING:
    from .module import TalkativeModule

SCHEMA_VERSION = 1


def stored_tensors(module: TalkativeModule) -> dict[str, Tensor]:
    """All parameters and buffers but those that a hub id or folder can give back: of a frozen or adapted model, its base."""
    frozen_base = module.verbaliser_settings.train != "full" and isinstance(module.verbaliser_settings.model, str)
    trained = {f"verbaliser.{name}" for name, p in module.writer.named_parameters() if p.requires_grad}
    kept: dict[str, Tensor] = {}
    addresses: dict[int, str] = {}
    for name, tensor in module.state_dict().items():
        if frozen_base and name.startswith("verbaliser.lm.") and name not in trained:
            continue
        if addresses.setdefault(tensor.data_ptr(), name) == name or tensor.numel() == 0:  # a tied matrix is stored once
            kept[name] = tensor.detach().cpu().contiguous()
    return kept


def described(module: TalkativeModule) -> dict[str, Any]:
    """The settings as JSON has them."""
    parts = {name: None if part is None else asdict(part) for name, part in module.settings.items()}
    return json.loads(json.dumps({"schema_version": SCHEMA_VERSION, "dtype": module.dtype_name, **parts}))


def save_weights(module: TalkativeModule, folder: Path) -> None:
    """Write ``talkative.safetensors`` and then ``talkative.json``, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "talkative.safetensors.part"
    save_file(stored_tensors(module), temporary)
    temporary.replace(folder / "talkative.safetensors")
    facts = described(module) | {"sha256": file_hash(folder / "talkative.safetensors")}
    write_json_atomic(folder / "talkative.json", facts)


def load_weights(module: TalkativeModule, folder: Path) -> None:
    """Load what :func:`save_weights` wrote.

    Raises:
        ValueError: If the folder was made with other settings, or its tensors were changed or do not fit.
    """
    facts, ours = json.loads((folder / "talkative.json").read_text()), described(module)
    for part, value in ours.items():
        theirs = facts.get(part)
        if value is None or theirs is None or not isinstance(value, dict):
            differing = [""] if value != theirs and not (part == "held_out" and value is None) else []
        else:
            differing = [f".{key}" for key in value if key != "train" and value[key] != theirs.get(key)]
        if differing:
            raise ValueError(f"model.weights {folder} was trained with another model.{part}{differing[0]}; use the settings in its json.")
    path = folder / "talkative.safetensors"
    if file_hash(path) != facts["sha256"]:
        raise ValueError(f"{path} is not the file that {folder}/talkative.json describes; export it again.")
    tensors = load_file(path)
    expected = stored_tensors(module)
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ValueError(f"model.weights {folder} lacks {missing[0]}; use the settings in its talkative.json.")
    state = {name: tensor for name, tensor in tensors.items() if name in expected}
    module.load_state_dict(state, strict=False)
