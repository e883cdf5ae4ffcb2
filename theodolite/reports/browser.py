"""The rollout browser: the final evaluation's rollouts of every run, searched and filtered in the page itself.

The data lie in the page as JSON in which no ``<`` is left, so that nothing a model wrote can end the element or open another; the script
shows them as text. A policy in the page's head allows that one script, by its hash, and no request whatever.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from typing import Any

import pyarrow.parquet as pq

from theodolite.reports.browser_script import SCRIPT
from theodolite.reports.records import Run, Study
from theodolite.reports.samples import binding_lines, evaluator_name, last_rollouts, prompt_text

PER_RUN = 96
"""Most rollouts of one run in the page: the first sample of each problem, in order of problems."""
SCORES = ("projected_score", "activation_score", "gradient_cos")
"""Columns of a rollout table that say how a rollout stands to the direction; the first that exists is shown."""


def content_policy() -> str:
    """The page's content security policy: this script, inline styles, embedded pictures, and no connection to anywhere."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def browser(study: Study) -> str:
    """Controls, data and script; a sentence where no run has a rollout table."""
    data = rollout_data(study)
    if not data["rows"]:
        return '<p class="absent">Rollouts: not measured.</p>'
    rule = (
        f"The first sample of each problem in the final evaluation, at most {PER_RUN} per run. Marked lines bind the evaluator's name. The "
        "reward is what training saw, the verdict is the oracle's."
    )
    controls = (
        '<div class="controls"><input id="rollout-search" type="search" placeholder="search prompts and programs" aria-label="search">'
        '<select id="rollout-arm" aria-label="arm"><option value="">all arms</option></select>'
        '<select id="rollout-label" aria-label="verdict"><option value="">all verdicts</option></select>'
        '<label><input id="rollout-override" type="checkbox"> overrides only</label><span id="rollout-count" class="small"></span></div>'
    )
    places = '<div id="rollout-list" class="cards"></div><button id="rollout-more" type="button" hidden>more</button>'
    return (
        f'<p class="small">{escape(rule)}</p>{controls}{places}<noscript><p>Searching needs JavaScript; samples are above.</p></noscript>'
        f'<script id="rollout-data" type="application/json">{_inert(data)}</script>\n<script>{SCRIPT}</script>'
    )


def rollout_data(study: Study) -> dict[str, Any]:
    """Runs, distinct prompts, and rows that name both by number."""
    prompts: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for number, run in enumerate(study.runs):
        rows += [_row(number, row, prompts) for row in _chosen(run)]
    return {"runs": [[run.arm, run.seed] for run in study.runs], "prompts": list(prompts), "rows": rows}


def _chosen(run: Run) -> list[dict[str, Any]]:
    path = last_rollouts(run)
    if path is None:
        return []
    wanted = ("problem", "sample", "prompt", "completion", "reward", "passed", "label", "status", "mechanism", "evaluator", *SCORES)
    table = pq.read_table(path)
    rows = table.select([name for name in wanted if name in table.column_names]).to_pylist()
    return [row for row in rows if not row.get("sample") and row.get("label") != "ungraded"][:PER_RUN]


def _row(run: int, row: dict[str, Any], prompts: dict[str, int]) -> dict[str, Any]:
    prompt, completion, reward = prompt_text(row["prompt"]), str(row["completion"]), row.get("reward")
    name = str(row.get("evaluator") or evaluator_name(prompt))
    score = next((row[key] for key in SCORES if isinstance(row.get(key), int | float)), None)
    return {
        "run": run,
        "problem": str(row.get("problem", "")),
        "prompt": prompts.setdefault(prompt, len(prompts)),
        "completion": completion,
        "reward": round(float(reward), 4) if isinstance(reward, int | float) else None,
        "passed": bool(row.get("passed")),
        "label": str(row.get("label", "")),
        "mechanism": str(row.get("mechanism") or ""),
        "marked": sorted(binding_lines(completion, name)),
        "score": None if score is None else round(float(score), 4),
    }


def _inert(data: dict[str, Any]) -> str:
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
