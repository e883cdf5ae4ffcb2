"""The policy that every run of a study starts from: trained once, phase after phase, and cached by all that decides its weights."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path

from rich.console import Console

from theodolite.provenance import content_hash, file_hash, tree_hash, write_json_atomic
from theodolite.study import Job, clear_run
from theodolite.study_file import Phase
from theodolite.study_progress import run_with_progress

SOURCES = ("datamodules", "lightning_modules", "seeds.py", "batch_arithmetic.py", "sandbox")
"""What the weights are a function of, beside configs and libraries: relative to the package."""
LIBRARIES = ("torch", "transformers", "tokenizers", "lightning", "numpy")
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def warm_start(phases: tuple[Phase, ...], configs: Path, cache: Path, console: Console) -> tuple[Path | None, list[str]]:
    """Train the phases that the cache does not hold; two studies share the phases that they begin with.

    Args:
        phases: In order; each starts from the policy of the one before.
        configs: Folder that their layers are relative to.
        cache: Where policies are kept, by a hash of what made them.
        console: Where progress is shown.

    Returns:
        Folder of the last phase's policy (None without phases), and sentences about failures.
    """
    policy: Path | None = None
    for phase, (home, key) in zip(phases, _homes(phases, configs, cache), strict=True):
        source = [] if policy is None else [f"--model.policy={policy}"]
        policy = home / "policy"
        if _cached(home, key):
            console.print(f"{phase.name}: cached in {home}")
            continue
        clear_run(home)  # a finished run whose weights are gone or changed must not count as done
        args = ("fit", *(f"--config={configs / layer}" for layer in phase.layers), *source, *QUIET)
        failures = run_with_progress([Job(home, args, {"phase": phase.name}, test=False, steps=phase.steps)], 1, console)
        weights = None if failures else _weights(policy)
        if weights is None:
            return policy, failures or [f"{phase.name} ended without a policy: there are no *.safetensors in {policy}."]
        write_json_atomic(home / "done.json", {"key": key, "weights": weights})
    return policy, []


def policy_folder(phases: tuple[Phase, ...], configs: Path, cache: Path) -> Path | None:
    """Where the last phase's policy is, or will be; None without phases."""
    homes = _homes(phases, configs, cache)
    return homes[-1][0] / "policy" if homes else None


def cached_phases(phases: tuple[Phase, ...], configs: Path, cache: Path) -> int:
    """How many of the phases need not be trained."""
    return sum(_cached(home, key) for home, key in _homes(phases, configs, cache))


def _homes(phases: tuple[Phase, ...], configs: Path, cache: Path) -> list[tuple[Path, str]]:
    """Folder and key of every phase."""
    keys = [phase_key(phases[: index + 1], configs) for index in range(len(phases))]
    return [(cache / "warm_start" / f"{phase.name}-{key[:16]}", key) for phase, key in zip(phases, keys, strict=True)]


def phase_key(phases: tuple[Phase, ...], configs: Path) -> str:
    """Hash of everything that decides the weights after the last of these phases: names, configs, sources and library versions."""
    paths: list[Path] = []
    for source in SOURCES:
        found = importlib.util.find_spec(f"theodolite.{source.removesuffix('.py')}")
        assert found is not None
        paths += [Path(p) for p in found.submodule_search_locations or [str(found.origin)]]
    files = sorted(file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]))
    layers = [[phase.name, [file_hash(configs / layer) for layer in phase.layers]] for phase in phases]
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return content_hash({"sources": tree_hash(files), "phases": layers, "libraries": libraries})


def _cached(home: Path, key: str) -> bool:
    marker, weights = home / "done.json", _weights(home / "policy")
    if not marker.is_file() or weights is None:
        return False
    record = json.loads(marker.read_text(encoding="utf-8"))
    return record.get("key") == key and record.get("weights") == weights


def _weights(policy: Path) -> str | None:
    """Hash of a policy's weights, in one file or in shards; None where there are none."""
    files = sorted(policy.glob("*.safetensors"))
    if [file.name for file in files] == ["model.safetensors"]:
        return file_hash(files[0])
    return content_hash({file.name: file_hash(file) for file in files}) if files else None
