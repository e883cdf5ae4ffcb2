"""The commands and manifests behind a report, as HTML."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from theodolite.reports.formatting import NOT_MEASURED
from theodolite.reports.records import Run, Study

_LONGEST = 300


def provenance(study: Study) -> str:
    """The command of every run, what all manifests share, and folded away what differs."""
    commands = "\n".join(f"{run.arm}-{run.seed}  {run.command or NOT_MEASURED}" for run in study.runs)
    parts = ["<p>The command of every run:</p>", _block(commands)]
    flat = [flatten(run.manifest) for run in study.runs]
    if not any(flat):
        return "\n".join([*parts, f"<p>Manifests: {NOT_MEASURED}.</p>"])
    shared, differing = split_manifests(flat)
    if shared:
        parts += [f"<p>The same in all {len(flat)} runs:</p>", _block("\n".join(f"{key}: {value}" for key, value in shared.items()))]
    if differing:
        own = "".join(_own_lines(run, differing) for run in study.runs)
        parts.append(f"<details><summary>What differs between runs</summary>{own}</details>")
    return "\n".join(parts)


def split_manifests(flat: list[dict[str, str]]) -> tuple[dict[str, str], list[str]]:
    """Entries that all manifests agree on, and the keys of those on which they differ."""
    keys = sorted(set().union(*flat))
    shared = {key: flat[0][key] for key in keys if key in flat[0] and all(other.get(key) == flat[0][key] for other in flat)}
    return shared, [key for key in keys if key not in shared]


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Leaves of nested JSON as ``{"a.b.c": text}``; long ones are cut and end in dots."""
    if isinstance(value, dict):
        leaves: dict[str, str] = {}
        for name in sorted(value):
            leaves |= flatten(value[name], f"{prefix}.{name}" if prefix else str(name))
        return leaves
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return {prefix: text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."}


def _own_lines(run: Run, keys: list[str]) -> str:
    own = flatten(run.manifest)
    lines = "\n".join(f"{key}: {own.get(key, NOT_MEASURED)}" for key in keys)
    return f"<h3>{escape(run.directory.name)}</h3>{_block(lines)}"


def _block(text: str) -> str:
    return f'<pre class="block">{escape(text)}</pre>'
