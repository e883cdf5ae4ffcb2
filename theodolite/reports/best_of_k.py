"""Results of a best-of-K sweep as JSON and parquet. The same scores give the same bytes: nothing here looks at a clock.

The JSON's schema is described field by field in ``docs/best_of_k.md``. It holds every field of the format that earlier talkative
autoencoders wrote (``results_by_k`` with ``avg_mse``, ``variance_recovery``, ``r_squared``, ... and ``summary``), beside the metrics under
names that say what they are.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from theodolite.best_of_k.curves import Curves, finite, gains, summary_of
from theodolite.provenance import content_hash, write_bytes_atomic, write_json_atomic
from theodolite.reports.best_of_k_differences import write_replicates

SCHEMA = "theodolite best-of-k 1"
PAIRING = ("bootstrap_replicates", "bootstrap_seed", "confidence")
"""Settings that must agree for intervals of differences."""


def result_of(curves: Curves, settings: Mapping[str, Any], checkpoint: str | None, label: str) -> dict[str, Any]:
    """One run's results as plain data.

    Args:
        curves: All curves of the run.
        settings: Of the sweep, as a config states them.
        checkpoint: What was measured; None = the weights of the run itself.
        label: Short name of the run.
    """
    scores = curves.scores
    failed, documents = scores.column("failed"), len(set(curves.documents))
    described = {name: summary_of(curve, curves) for name, curve in curves.curves.items()}
    per_k = [name for name in described if name.startswith("best_of_k.") or name in ("mean_of_k", "null")]
    return {
        "schema": SCHEMA,
        "checkpoint_path": checkpoint,
        "eval_config": dict(settings),
        "run": {
            "label": label,
            "temperature": scores.candidates.drawing.temperature,
            "candidates": scores.n,
            "rows": scores.rows,
            "documents": documents,
            "row_ids_hash": content_hash(list(curves.ids)),
            "bank": content_hash(dict(scores.table.key)),
            "verbaliser": scores.candidates.key["verbaliser"],
            "reconstructors": {name: reader.fingerprint() for name, reader in scores.reconstructors.items()},
            "selecting_reconstructor": curves.selecting,
            "held_out_reconstructors": scores.names[1:],
            "failed_candidates": int(failed.sum()),
            "rows_with_failed_candidates": int(failed.any(1).sum()),
            "failed_greedy": int(scores.column("greedy_failed").sum()),
            "intervals": f"{curves.resampling.level:g} by documents" if curves.resampled else None,
        },
        "k_values": curves.ks,
        "curves": described,
        "gains": {name: gains(curves.curves[name], curves) for name in per_k},
        "fve_without_largest_norms": curves.without_largest_norms(),
        "results_by_k": _results_by_k(curves),
        "summary": _summary(curves),
    }


def write_texts(path: Path, curves: Curves) -> None:
    """Every candidate text with its errors as parquet, one row per (row, candidate); candidate -1 is the greedy text."""
    scores, d = curves.scores, curves.target.shape[1]
    n, rows = scores.n, scores.rows
    contexts = scores.table.rows(range(rows)).texts
    sampled = scores.candidates.texts(range(rows), n, rows)
    greedy = scores.greedy.texts(range(rows), 1, rows)
    columns: dict[str, Any] = {
        "id": [row_id for row_id in curves.ids for _ in range(n + 1)],
        "document": [document for document in curves.documents for _ in range(n + 1)],
        "context": [context for context in contexts for _ in range(n + 1)],
        "candidate": list(range(-1, n)) * rows,
        "text": [text for one, many in zip(greedy, sampled, strict=True) for text in (*one, *many)],
        "failed": torch.cat([scores.column("greedy_failed")[:, None], scores.column("failed")], dim=1).flatten().tolist(),
    }
    for name in scores.names:
        both = torch.cat([scores.column(f"greedy.{name}")[:, None], scores.column(f"error.{name}")], dim=1)
        columns[f"mse.{name}"] = (both / d).flatten().tolist()
    buffer = io.BytesIO()
    pd.DataFrame(columns).to_parquet(buffer, index=False)
    write_bytes_atomic(path, buffer.getvalue())


def write_result(folder: Path, name: str, curves: Curves, result: Mapping[str, Any]) -> Path:
    """Write ``<name>.json``, ``<name>.parquet`` and the resampled curves that differences are made of; returns the first."""
    path = folder / f"{name}.json"
    write_texts(path.with_suffix(".parquet"), curves)
    write_replicates(path, curves)
    write_json_atomic(path, result)
    return path


def check_comparable(results: list[Mapping[str, Any]]) -> None:
    """Refuse results that cannot stand in one figure.

    Raises:
        ValueError: If they are of other rows, K or schemas, or resampled otherwise; the message names the first difference.
    """
    for result in results:
        if result.get("schema") != SCHEMA:
            raise ValueError(f"A result has the schema {result.get('schema')!r}, this library reads {SCHEMA!r}.")
    first = results[0]
    for other in results[1:]:
        for what, ours, theirs in (
            ("bank", first["run"]["bank"], other["run"]["bank"]),
            ("rows", first["run"]["row_ids_hash"], other["run"]["row_ids_hash"]),
            ("k_values", first["k_values"], other["k_values"]),
            *((name, first["eval_config"][name], other["eval_config"][name]) for name in PAIRING),
        ):
            if ours != theirs:
                labels = f"{first['run']['label']!r} and {other['run']['label']!r}"
                raise ValueError(f"The results {labels} differ in {what} ({ours} and {theirs}); they cannot be compared in one report.")


def _results_by_k(curves: Curves) -> list[dict[str, Any]]:
    """One entry per K for the selecting reconstructor: our names first, then those of the earlier format."""
    name = f"best_of_k.{curves.selecting}"
    described, row_errors, norms = summary_of(curves.curves[name], curves), curves.row_errors(), curves.target.norm(dim=1)
    bca = curves.bca(name, "fve_residual_centred")
    replicates = curves.curves[name].replicates
    n, d = curves.target.shape
    variance = float(curves.target.var(dim=0, correction=1).sum()) if n > 1 else None
    entries: list[dict[str, Any]] = []
    for index, k in enumerate(curves.ks):
        entry: dict[str, Any] = {"k": k}
        for metric, values in described.items():
            low, high = values["ci_lower"][index], values["ci_upper"][index]
            entry |= {metric: values["value"][index], f"{metric}_ci_lower": low, f"{metric}_ci_upper": high}
        for theirs, ours in (("mse", "mse"), ("variance_recovery", "fve_residual_centred"), ("r_squared", "r2_scalar_mean")):
            spread = replicates[ours][:, index]
            entry |= {
                theirs: described[ours]["value"][index],
                f"{theirs}_std": float(spread.std()) if len(spread) else None,
                f"{theirs}_ci_lower": described[ours]["ci_lower"][index],
                f"{theirs}_ci_upper": described[ours]["ci_upper"][index],
            }
        spread, recovered = replicates["fve_residual_centred"][:, index], entry["variance_recovery"]
        bias = float(spread.mean()) - recovered if len(spread) and recovered is not None else None
        squared = float(row_errors[:, index].mean()) * d
        entry |= {
            "avg_mse": entry["mse"],
            "variance_recovery_bias": bias,
            "variance_recovery_bias_corrected": None if bias is None else recovered - bias,
            "variance_recovery_bca_ci_lower": bca[0][index],
            "variance_recovery_bca_ci_upper": bca[1][index],
            "mse_for_new_variance": squared,
            "mse_variance_recovery": 1 - squared / variance if variance else None,
            "total_positions": n,
            "original_variance": variance,
            "original_mean": float(curves.target.mean()),
            "mse_values": finite(row_errors[:, index]),
            "activation_norms": finite(norms),
        }
        entries.append(entry)
    return entries


def _summary(curves: Curves) -> dict[str, Any]:
    """The lists that plotting scripts of the earlier format read."""
    estimate = curves.curves[f"best_of_k.{curves.selecting}"].estimate
    return {
        "k_values": curves.ks,
        "mse_values": finite(estimate["mse"]),
        "variance_recovery_values": finite(estimate["fve_residual_centred"]),
        "r_squared_values": finite(estimate["r2_scalar_mean"]),
        "fve_values": finite(estimate["fve"]),
        "new_variance_recovery_values": finite(estimate["fve_residual_centred"]),
        "new_variance_recovery_mse_values": finite(estimate["fve"]),
    }
