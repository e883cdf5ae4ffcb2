"""The rollout browser: programs of every run, searched and filtered in the page.

Shown are the final evaluation and the last logged window of training, and of each arm's first seed also what validation saw on the way.
The data lie in the page as JSON in which no ``<`` is left, so that nothing a model wrote can end the element or open another; the script
shows them as text. A policy in the page's head allows that one script, by its hash, and no request whatever.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from theodolite.reports.browser_script import SCRIPT
from theodolite.reports.records import Run, Study, finite
from theodolite.reports.samples import binding_lines, evaluator_name, last_rollouts, last_window, prompt_text

PER_RUN = 96
"""Most rollouts of one table in the page: the first sample of each problem, in order of problems."""
PER_STEP = 12
"""Most rollouts of one table of validation, of which every run has several: always the same problems, so that their change can be read."""
COLUMNS = ("problem", "sample", "prompt", "completion", "reward", "passed", "label", "overrides", "mechanism")
FEATURE = "feature/"
"""What callbacks measured of a rollout in training (a detector's flag, a score) stands in columns of this prefix."""


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
        f"The first sample of each problem, at most {PER_RUN} per table: of the final evaluation, and of the last window of training that "
        f"was logged, with what detectors and scores said of it. Of each arm's first seed also {PER_STEP} problems of every validation, "
        "each in order of steps. Marked lines bind the evaluator's name. The reward is the environment's, "
        "before anything that an arm does to it; the verdict is the oracle's."
    )
    controls = (
        '<div class="controls"><input id="rollout-search" type="search" placeholder="search prompts and programs" aria-label="search">'
        '<select id="rollout-arm" aria-label="arm"><option value="">all arms</option></select>'
        '<select id="rollout-label" aria-label="verdict"><option value="">all verdicts</option></select>'
        '<select id="rollout-place" aria-label="where from"><option value="">from everywhere</option></select>'
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
    first = {run.arm: min(other.seed for other in study.runs if other.arm == run.arm) for run in study.runs}
    for number, run in enumerate(study.runs):
        for place, chosen in _places(run, on_the_way=run.seed == first[run.arm]).items():
            rows += [_row(number, place, row, prompts) for row in chosen]
    return {"runs": [[run.arm, run.seed] for run in study.runs], "prompts": list(prompts), "rows": rows}


def _places(run: Run, on_the_way: bool) -> dict[str, list[dict[str, Any]]]:
    """Rows to show by where they are from."""
    final, window = last_rollouts(run), last_window(run)
    tables = sorted((run.directory / "rollouts").glob("step_*_val_*.parquet")) if on_the_way else []
    validated = [row for path in tables if path != final for row in _chosen(path, PER_STEP)]
    problems = list(dict.fromkeys(row.get("problem") for row in validated))
    found = {"evaluation": [] if final is None else _chosen(final, PER_RUN)}
    found["validation"] = sorted(validated, key=lambda row: problems.index(row.get("problem")))
    return found | {"training": [] if window is None else _chosen(window, PER_RUN)}


def _chosen(path: Path, most: int) -> list[dict[str, Any]]:
    present = pq.read_schema(path).names
    wanted = [name for name in present if name in COLUMNS or name.startswith(FEATURE)]
    rows = pq.read_table(path, columns=wanted).to_pylist()
    return [row | {"file": path.stem} for row in rows if not row.get("sample") and row.get("label") != "ungraded"][:most]


def _row(run: int, place: str, row: dict[str, Any], prompts: dict[str, int]) -> dict[str, Any]:
    prompt, completion, reward = prompt_text(row["prompt"]), str(row["completion"]), finite(row.get("reward"))
    scores = {name.removeprefix(FEATURE): finite(value) for name, value in row.items() if name.startswith(FEATURE)}
    return {
        "run": run,
        "place": place,
        "file": row["file"],
        "problem": str(row.get("problem", "")),
        "prompt": prompts.setdefault(prompt, len(prompts)),
        "completion": completion,
        "reward": None if reward is None else round(reward, 4),
        "passed": bool(row.get("passed")),
        "label": str(row.get("label", "")),
        "overrides": bool(row.get("overrides")),
        "mechanism": str(row.get("mechanism") or ""),
        "marked": sorted(binding_lines(completion, evaluator_name(prompt))),
        "scores": {name: round(value, 4) for name, value in scores.items() if value is not None},
    }


def _inert(data: dict[str, Any]) -> str:
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
