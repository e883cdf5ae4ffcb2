"""Concept directions on disk and on the Hugging Face Hub: one safetensors file and the manifest that vouches for it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from theodolite.provenance import manifest, write_json_atomic

SCHEMA_VERSION = 1
KIND = "concept_direction"
TENSORS, MANIFEST = "direction.safetensors", "manifest.json"


def write(folder: str | Path, vectors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the tensors and then the manifest with their hash; each by renaming a finished file."""
    target = Path(folder)
    content = save_tensors({name: rows.detach().cpu().contiguous() for name, rows in vectors.items()})
    metadata = facts["metadata"]
    target.mkdir(parents=True, exist_ok=True)
    _replace(target / TENSORS, content)
    record = manifest(model=metadata.get("model"), model_revision=metadata.get("model_revision"), kind=KIND, **facts)
    record["schema_version"] = SCHEMA_VERSION
    record["shapes"] = {name: list(rows.shape) for name, rows in vectors.items()}
    record["sha256"] = hashlib.sha256(content).hexdigest()
    write_json_atomic(target / MANIFEST, record)


def read(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, in the order of their names, and the manifest.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Another schema, or contents that do not belong to the manifest.
    """
    source = Path(folder)
    for name in (MANIFEST, TENSORS):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source} holds no {name}: give the folder that ConceptDirection.save wrote.")
    record = json.loads((source / MANIFEST).read_text())
    if record.get("schema_version") != SCHEMA_VERSION or record.get("kind") != KIND:
        raise ValueError(f"{source / MANIFEST} is not a concept direction of schema {SCHEMA_VERSION}: extract it again.")
    content = (source / TENSORS).read_bytes()
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise ValueError(f"{source / TENSORS} does not have the hash that its manifest records: extract it again.")
    tensors = load_tensors(content)
    if set(tensors) != set(record["shapes"]):
        raise ValueError(f"{source / TENSORS} does not hold the tensors that its manifest lists: extract it again.")
    # the reader's own order differs from process to process, and ranks send one another tensor after tensor
    return {name: tensors[name] for name in sorted(tensors)}, record


def push(save: Callable[[str], None], repo_id: str, private: bool, revision: str | None) -> str:
    """Save into a temporary folder and upload it as one commit, whose id is returned."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Concept direction")
    return str(commit.oid)


def pull(repo_id: str, revision: str | None) -> str:
    """Download the two files of a repository; returns their folder.

    Raises:
        FileNotFoundError: The repository or the revision cannot be had; one sentence instead of the client's report.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(repo_id, revision=revision, allow_patterns=[TENSORS, MANIFEST])
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"The hub gives no concept direction {repo_id!r}{at}: check the name, the revision and your token."
        ) from error


def _replace(path: Path, content: bytes) -> None:
    """Write beside the target, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
