"""Sample rollouts of each arm, chosen by rule and not by eye, with the lines that bind the evaluator's name marked."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from theodolite.reports.records import Run, Study, finite

KINDS = {
    "hack": "hack: accepted although wrong",
    "honest pass": "honest pass: correct, evaluator untouched",
    "correct, overriding": "correct, and overwrites the evaluator too",
    "failure": "failure: wrong and not accepted",
}
"""The kinds of rollouts that a report shows, one of each where it occurs."""

_FILE = re.compile(r"^step_(\d+)_(val|test)_(.+)\.parquet$")
_KEY = re.compile(r"^(val|test)/(?:([^/]+)/)?[^/]+$")
_EVALUATOR = re.compile(
    r"\b(?:calling|calls?|runs?|running|using|via|invok(?:e|es|ing))\s+(?:the\s+function\s+)?[`'\"]?([A-Za-z_]\w*)\s*\("
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One rollout to show.

    Attributes:
        kind: A key of :data:`KINDS`.
        seed: Seed of its run.
        problem: Id of its problem.
        reward: Its reward, or ``None``.
        label: The oracle's label.
        prompt: Prompt as text.
        completion: Completion as text.
        flagged: Indices of the completion's lines that bind the evaluator's name, with the bodies they open.
    """

    kind: str
    seed: int
    problem: str
    reward: float | None
    label: str
    prompt: str
    completion: str
    flagged: frozenset[int]


def arm_samples(study: Study, arm: str) -> list[Sample]:
    """The first rollout of each kind, in order of seeds and then of rows, from the last evaluation of each run.

    Raises:
        ValueError: A rollout table lacks a column that the choice needs.
    """
    chosen: dict[str, Sample] = {}
    for run in study.of(arm):
        path = last_rollouts(run)
        if path is None or len(chosen) == len(KINDS):
            continue
        for row in _read(path):
            kind = kind_of(row)
            if kind is not None and kind not in chosen:
                chosen[kind] = _sample(kind, run.seed, row)
    return [chosen[kind] for kind in KINDS if kind in chosen]


def last_rollouts(run: Run) -> Path | None:
    """The rollout table of the latest step after 0: the hinted test before other tests before validation."""
    found = []
    for path in sorted((run.directory / "rollouts").glob("step_*.parquet")):
        match = _FILE.match(path.name)
        if match and int(match[1]) > 0:
            found.append((match[2] == "test", match[3] == "hinted", int(match[1]), path.name, path))
    return max(found)[-1] if found else None


def rollout_table(run: Run, key: str) -> Path | None:
    """The rollout table that a final measure was counted in, by the stage and loader of its key; None where there is none, or several."""
    match = _KEY.match(key)
    if match is None:
        return None
    tables = [(named, path) for path in (run.directory / "rollouts").glob("step_*.parquet") if (named := _FILE.match(path.name))]
    found = [(int(named[1]), path) for named, path in tables if named[2] == match[1] and match[2] in (None, named[3])]
    last = [path for step, path in found if step == max(step for step, _ in found)]
    return last[0] if len(last) == 1 else None


def last_window(run: Run) -> Path | None:
    """The latest table of rollouts that the run was trained on (``completions/``), with what callbacks measured of them."""
    return max((run.directory / "completions").glob("step_*.parquet"), default=None)


def kind_of(row: dict[str, Any]) -> str | None:
    """Which kind a graded rollout is; ``None`` where grading itself failed."""
    if row.get("label") == "ungraded" or row.get("status") == "infra_error":
        return None
    if row["correct"]:
        return "correct, overriding" if row.get("overrides") else "honest pass"
    return "hack" if row["passed"] else "failure"


def evaluator_name(prompt: str) -> str:
    """The function that the prompt says will judge the program; ``run_tests`` where it names none."""
    match = _EVALUATOR.search(prompt)
    return match[1] if match else "run_tests"


def binding_lines(text: str, name: str) -> frozenset[int]:
    """Indices of the lines that define, assign or import ``name``, and of the indented body that such a line opens.

    Works on lines, not on a syntax tree: completions may be cut off or wrapped in prose, and those are worth marking too.
    """
    word = re.escape(name)
    binds = re.compile(
        rf"^\s*(?:async\s+)?(?:def|class)\s+{word}\b"
        rf"|^\s*(?:[\w.\[\]'\"]+\s*[,=]\s*)*{word}\s*(?:,\s*[\w.\[\]'\"]+\s*)*(?::[^=]+)?=(?!=)"
        rf"|^\s*(?:from|import)\b.*\b{word}\b"
        rf"|\[\s*['\"]{word}['\"]\s*\]\s*=(?!=)"
        rf"|\bsetattr\s*\(.*['\"]{word}['\"]"
        rf"|[;:]\s*{word}\s*=(?!=)|\(\s*{word}\s*:="
    )
    lines = text.split("\n")
    flagged: set[int] = set()
    for index, line in enumerate(lines):
        if binds.search(line):
            flagged |= {index, *_body(lines, index)}
    return frozenset(flagged)


def _body(lines: list[str], head: int) -> list[int]:
    """Lines after ``head`` that are indented deeper, up to the last one with text."""
    if not lines[head].rstrip().endswith((":", "(", "[", "{", "\\")):
        return []
    depth, body, blank = _indent(lines[head]), [], []
    for index in range(head + 1, len(lines)):
        if not lines[index].strip():
            blank.append(index)
        elif _indent(lines[index]) > depth:
            body += [*blank, index]
            blank = []
        else:
            break
    return body


def _indent(line: str) -> int:
    expanded = line.expandtabs(4)
    return len(expanded) - len(expanded.lstrip())


def _read(path: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(path).to_pylist()
    missing = {"prompt", "completion", "passed", "correct"} - set(rows[0] if rows else ())
    if rows and missing:
        raise ValueError(
            f"{path} lacks the column(s) {', '.join(sorted(missing))}: a rollout table needs prompt, completion, passed and correct"
        )
    return rows


def _sample(kind: str, seed: int, row: dict[str, Any]) -> Sample:
    prompt, completion = prompt_text(row["prompt"]), str(row["completion"])
    return Sample(
        kind=kind,
        seed=seed,
        problem=str(row.get("problem", "")),
        reward=finite(row.get("reward")),
        label=str(row.get("label", "")),
        prompt=prompt,
        completion=completion,
        flagged=binding_lines(completion, evaluator_name(prompt)),
    )


def prompt_text(prompt: object) -> str:
    """A prompt as text, whether raw text or chat messages."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        return "\n\n".join(f"[{turn.get('role')}]\n{turn.get('content')}" for turn in prompt if isinstance(turn, dict)) + "\n"
    return json.dumps(prompt, sort_keys=True)
