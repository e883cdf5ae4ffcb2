"""Runs of SPD (goodfire-ai/spd) as it writes them: where their files are, and what old configurations say in new words."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CONFIG, MODEL_CONFIG = "final_config.yaml", "model_config.yaml"
_ID = r"(?:[a-z0-9]-)?[a-z0-9]{8}"
_WANDB = re.compile(rf"(wandb:|https://wandb\.ai/)?(?P<entity>[^/\s:]+)/(?P<project>[^/\s]+)/(?:runs/)?(?P<id>{_ID})(?:[/?].*)?")


@dataclass(frozen=True)
class SPDRun:
    """A run's files.

    Attributes:
        name: As the user gave it.
        config: ``final_config.yaml`` in today's words.
        checkpoint: ``model_<step>.pth`` of the latest step, or the one asked for.
        folder: Where both are.
    """

    name: str
    config: dict[str, Any]
    checkpoint: Path
    folder: Path


def open_run(run: str, cache: str | Path, step: int | None = None) -> SPDRun:
    """Find a run, downloading it from Weights & Biases if it is not a local folder.

    Args:
        run: Local folder; or ``wandb:entity/project/runs/id``, with or without the prefix or ``runs/``, or the run's address.
        cache: Folder that downloads are kept in; what is there is not fetched again.
        step: Of the checkpoint; None = the latest.

    Raises:
        ValueError: If there is no such run, or it has no such checkpoint.
    """
    folder = Path(run)
    if not folder.is_dir():
        folder = download(run, cache, [CONFIG, checkpoint_pattern(step)])
    if not (folder / CONFIG).is_file():
        raise ValueError(f"model.run: {run} has no {CONFIG}, so it is no run of SPD.")
    names = [path.name for path in folder.iterdir()]
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    return SPDRun(run, migrated(config), folder / latest(names, checkpoint_pattern(step), run), folder)


def checkpoint_pattern(step: int | None) -> str:
    """Regular expression of the checkpoints' names, their step in the first group."""
    number = r"\d+" if step is None else str(step)
    return rf"model_({number})\.pth"


def latest(names: list[str], pattern: str, run: str) -> str:
    """The matching name with the largest number.

    Raises:
        ValueError: If none matches.
    """
    found = {int(match[1]): name for name in names if (match := re.fullmatch(pattern, name))}
    if not found:
        raise ValueError(f"model.run: {run} has no checkpoint {pattern.replace(chr(92), '')}; its files are {sorted(names)[:20]}.")
    return found[max(found)]


def download(run: str, cache: str | Path, patterns: list[str]) -> Path:
    """Fetch a run's files that match ``patterns`` (of several, the one with the largest number) into the cache; returns the folder.

    Raises:
        ValueError: If ``run`` is neither a folder nor a run's path, or a file is missing there.
    """
    match = _WANDB.fullmatch(run.strip())
    if match is None:
        raise ValueError(f"model.run: {run!r} is neither a folder nor a run like wandb:entity/project/runs/s-0123abcd.")
    import wandb  # seconds to import, and only runs that are not local need it

    folder = Path(cache) / f"{match['project']}-{match['id']}"
    folder.mkdir(parents=True, exist_ok=True)
    files = {file.name: file for file in wandb.Api().run(f"{match['entity']}/{match['project']}/{match['id']}").files()}
    for pattern in patterns:
        numbered = "(" in pattern
        name = latest(list(files), pattern, run) if numbered else pattern
        if name not in files:
            raise ValueError(f"model.run: {run} has no file {name}; its files are {sorted(files)[:20]}.")
        if not (folder / name).exists():
            # several ranks may fetch it at once: each into a folder of its own, and what is renamed is complete
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                files[name].download(root=temporary, replace=True)
                (Path(temporary) / name).replace(folder / name)
    return folder


def migrated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of any age in today's words, as far as a finished run is evaluated by it."""
    found = dict(config)
    if "C" in found:
        patterns = {"module_info": "target_module_patterns", "identity_module_info": "identity_module_patterns"}
        for new, old in patterns.items():
            listed = found.pop(old, None)
            found[new] = None if listed is None else [{"module_pattern": pattern, "C": found["C"]} for pattern in listed]
        del found["C"]
    if "ci_config" not in found:
        kind, hidden = found.pop("ci_fn_type", "vector_mlp"), found.pop("ci_fn_hidden_dims", [8])
        is_global = found.pop("use_global_ci", False) or kind.startswith("global_")
        kind = "global_shared_mlp" if is_global and not kind.startswith("global_") else kind
        found["ci_config"] = {"mode": "global" if is_global else "layerwise", "fn_type": kind, "hidden_dims": hidden}
    if "pretrained_model_name_hf" in found:
        found["pretrained_model_name"] = found.pop("pretrained_model_name_hf")
    old_place, new_place = "simple_stories_train.models.", "spd.pretrain.models."
    found["pretrained_model_class"] = str(found.get("pretrained_model_class", "")).replace(old_place, new_place)
    return found


def importance_config(ci_config: Mapping[str, Any]) -> dict[str, Any]:
    """``ci_config`` with the keys that its kind reads; SPD writes all keys of all kinds, unused ones empty."""
    return {key: value for key, value in ci_config.items() if value is not None}
