"""Paired differences between runs of best-of-K over the same rows: documents are resampled once and both runs follow.

Two runs on the same activations rise and fall together with the documents that were chosen, so the interval of their difference is far
narrower than the two bands suggest. Every run writes the bootstrap replicates of its curves; those of two runs belong together row by row,
because replicates are made with the same seed from the same number of documents (:mod:`theodolite.functional.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from theodolite.best_of_k.curves import Curves, finite
from theodolite.functional.bootstrap import percentile_interval
from theodolite.provenance import write_bytes_atomic

SCHEMA = "theodolite best-of-k differences 1"
METRIC = "fve"
Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Difference:
    """FVE of one run minus that of another, scored by one reconstructor.

    Attributes:
        label: The run.
        against: The run that is subtracted.
        reconstructor: Name of the one that scores; each run has its own.
        role: ``selects`` or ``held out``.
        k_values: K.
        value: Difference for each K.
        ci_lower: Lower ends of the paired intervals over documents; None where there are none.
        ci_upper: Upper ends.
    """

    label: str
    against: str
    reconstructor: str
    role: str
    k_values: list[int]
    value: list[float | None]
    ci_lower: list[float | None]
    ci_upper: list[float | None]


def replicates_file(result: Path) -> Path:
    """Where the replicates of a result file lie."""
    return result.with_suffix(".replicates.safetensors")


def write_replicates(result: Path, curves: Curves) -> None:
    """Keep the (B, K) float64 replicates of every best-of-K curve's FVE beside a result file; B is 0 without bootstrap."""
    kept = {name: curve.replicates[METRIC].contiguous() for name, curve in curves.curves.items() if name.startswith("best_of_k.")}
    write_bytes_atomic(replicates_file(result), save(kept))


def differences_of(results: Sequence[Result], files: Sequence[Path]) -> list[Difference]:
    """Every run against the first, by the reconstructor that selects and by each held-out one that both have.

    Args:
        results: Comparable results.
        files: Their files.

    Raises:
        FileNotFoundError: A result's replicates are not beside it.
    """
    if len(results) < 2:
        return []
    replicates = [_read(path) for path in files]
    found: list[Difference] = []
    for result, own in zip(results[1:], replicates[1:], strict=True):
        for role, ours, theirs in _reconstructors(result["run"], results[0]["run"]):
            spread = own[f"best_of_k.{ours}"] - replicates[0][f"best_of_k.{theirs}"]
            found.append(_difference(result, results[0], role, (ours, theirs), spread))
    return found


def as_json(differences: Sequence[Difference], run: Mapping[str, Any]) -> dict[str, Any]:
    """Differences as plain data, with what they were measured on (``run`` of any of the results)."""
    measured = {name: run[name] for name in ("rows", "documents", "candidates", "intervals")}
    return {"schema": SCHEMA, "metric": METRIC, **measured, "differences": [asdict(each) for each in differences]}


def _read(result: Path) -> dict[str, Tensor]:
    path = replicates_file(result)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, so {result.name} cannot be paired with other runs: repeat its sweep, which is cached.")
    return load_file(path)


def _reconstructors(run: Mapping[str, Any], first: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Role, the run's own reconstructor and the first run's."""
    shared = [name for name in run["held_out_reconstructors"] if name in first["held_out_reconstructors"]]
    return [("selects", run["selecting_reconstructor"], first["selecting_reconstructor"]), *(("held out", name, name) for name in shared)]


def _difference(result: Result, first: Result, role: str, names: tuple[str, str], spread: Tensor) -> Difference:
    ours, theirs = (_estimate(each["curves"][f"best_of_k.{name}"]) for each, name in zip((result, first), names, strict=True))
    ends: list[list[float | None]] = [[None] * spread.shape[1]] * 2
    if len(spread):
        level = result["eval_config"]["confidence"]
        ends = [finite(end) for end in percentile_interval(spread, result["run"]["documents"], level)]
    label, against = result["run"]["label"], first["run"]["label"]
    return Difference(label, against, names[0], role, list(result["k_values"]), finite(ours - theirs), *ends)


def _estimate(curve: Mapping[str, Any]) -> Tensor:
    return torch.tensor([float("nan") if value is None else value for value in curve[METRIC]["value"]], dtype=torch.float64)
