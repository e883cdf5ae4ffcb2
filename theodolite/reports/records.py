"""Reads a study directory, or directories of runs, into plain records. Files alone: nothing of what wrote them is imported.

A study directory holds one directory per run (``run.json``, ``metrics.jsonl``, ``timings.jsonl``, and where they exist ``config.yaml``,
``manifest.json`` and ``rollouts/``), ``timings.json``, and ``study.json`` where a sweep made it. A run of ``theodolite fit`` has no
``run.json``: named by itself, its arm is its folder's name and its seed that of its config. What was not measured stays ``None`` here; no
value is filled in, interpolated or guessed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from theodolite.reports.arms import arm_order, known_title
from theodolite.reports.plan import RATES, Plan, read_plan

__all__ = ["RATES", "Run", "Study", "finite", "read_metrics", "read_run", "read_study"]

_RUN_NAME = re.compile(r"^(?P<arm>.+)-(?P<seed>\d+)$")


@dataclass(frozen=True, slots=True)
class Run:
    """One arm with one seed.

    Attributes:
        directory: Where its files lie.
        arm: Name of the intervention.
        seed: Seed of the reinforcement learning (prompts and sampling).
        title: What the arm is, in words.
        note: A remark that must stand beside its numbers, or the empty string.
        command: The command that repeats it.
        configs: The configs that it was started with.
        seconds: Wall time, or ``None``.
        series: ``series[key][step]`` is the logged value, or ``None`` where it was logged as not finite.
        manifest: Provenance as the run wrote it, empty where there is none.
        hack_key: What the final hack rate is logged under.
    """

    directory: Path
    arm: str
    seed: int
    title: str
    note: str
    command: str
    configs: tuple[str, ...]
    seconds: float | None
    series: dict[str, dict[int, float | None]] = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    hack_key: str = "test/hinted/hack_rate"

    def curve(self, key: str) -> dict[int, float]:
        """The finite values of ``key`` by step, in order of steps."""
        values = self.series.get(key, {})
        return {step: value for step in sorted(values) if (value := values[step]) is not None}

    def final(self, key: str) -> float | None:
        """The value of ``key`` at the last step after 0 that logged it; ``None`` if there is none or it was not finite."""
        values = self.series.get(key, {})
        last = max((step for step in values if step > 0), default=None)
        return None if last is None else values[last]

    def base(self, name: str) -> float | None:
        """Value of the untrained policy: ``base/<name>`` where logged, else ``val/<name>`` at step 0."""
        explicit = self.series.get(f"base/{name}")
        if explicit:
            return explicit[max(explicit)]
        return self.series.get(f"val/{name}", {}).get(0)

    @property
    def finished(self) -> bool:
        """The run has its final held-out hack rate."""
        return self.final(self.hack_key) is not None


@dataclass(frozen=True, slots=True)
class Study:
    """All runs of a study, arms in reporting order, seeds ascending.

    Attributes:
        directory: The study directory.
        runs: Every run that has a ``run.json``, finished or not.
        absent: ``(arm, seed, why)`` for each combination of planned arms and seeds that has no final measurement.
        seconds: Wall seconds by phase of the whole study.
        cpu_count: Cores of the machine, or ``None``.
        plan: What the study says of itself.
    """

    directory: Path
    runs: tuple[Run, ...]
    absent: tuple[tuple[str, int, str], ...]
    seconds: dict[str, float]
    cpu_count: int | None
    plan: Plan = field(default_factory=Plan)

    @property
    def arms(self) -> list[str]:
        """Names of the arms: those of the plan in its order, then known ones in their usual order, then the others by name."""
        return _ordered({run.arm for run in self.runs}, self.plan)

    @property
    def titles(self) -> dict[str, str]:
        """What every arm is, in words."""
        return {arm: self.title(arm) for arm in self.arms}

    @property
    def controls(self) -> set[str]:
        """Arms that the plan calls controls."""
        return {arm for arm, about in self.plan.arms.items() if about.get("control")}

    @property
    def seeds(self) -> list[int]:
        """All seeds that any arm was run with."""
        return sorted({run.seed for run in self.runs})

    def of(self, arm: str) -> list[Run]:
        """The runs of one arm by seed."""
        return [run for run in self.runs if run.arm == arm]

    def title(self, arm: str) -> str:
        """What the arm is, in words; the arm's name where no run says."""
        return next((run.title for run in self.of(arm) if run.title), "") or known_title(arm) or arm

    def note(self, arm: str) -> str:
        """The arm's remark, or the empty string."""
        return next((run.note for run in self.of(arm) if run.note), "")


def read_study(study_dir: Path, *more: Path) -> Study:
    """Read every run of a study, or of several directories.

    Args:
        study_dir: Directory that holds one directory per run, or a run's directory.
        more: Further ones; plan and timings are the first directory's.

    Raises:
        FileNotFoundError: A directory does not exist.
        ValueError: There is no run, a file is not what it should be, or two runs claim the same arm and seed.
    """
    plan, folders, runs = read_plan(study_dir), [], []
    for path in (study_dir, *more):
        if not path.is_dir():
            raise FileNotFoundError(
                f"study directory {path} does not exist: give the directory that holds one <arm>-<seed> directory per run"
            )
        if (path / "run.json").is_file() or (path / "metrics.jsonl").is_file():
            runs.append(read_run(path, plan))
            continue
        inside = sorted(folder for folder in path.iterdir() if folder.is_dir())
        folders += inside
        runs += [read_run(folder, plan) for folder in inside if (folder / "run.json").is_file()]
    if not runs:
        raise ValueError(f"{study_dir} holds no run: expected directories <arm>-<seed> with a run.json each")
    _refuse_duplicates(runs)
    rank = {arm: index for index, arm in enumerate(_ordered({run.arm for run in runs}, plan))}
    runs.sort(key=lambda run: (rank[run.arm], run.seed))
    timings = _read_object(study_dir / "timings.json") if (study_dir / "timings.json").is_file() else {}
    cpu_count = timings.get("cpu_count")
    return Study(
        directory=study_dir,
        runs=tuple(runs),
        absent=tuple(_absent(runs, folders, plan, _failures(study_dir))),
        seconds={str(phase): float(value) for phase, value in timings.get("seconds", {}).items() if finite(value) is not None},
        cpu_count=cpu_count if isinstance(cpu_count, int) else None,
        plan=plan,
    )


def _ordered(arms: Iterable[str], plan: Plan) -> list[str]:
    present = set(arms)
    planned = [arm for arm in plan.arms if arm in present]
    return planned + arm_order(present - set(planned))


def read_run(directory: Path, plan: Plan | None = None) -> Run:
    """Read one run directory.

    Raises:
        ValueError: ``run.json`` lacks its arm or seed, or a file is malformed.
    """
    plan = plan or Plan()
    about = _read_object(directory / "run.json") if (directory / "run.json").is_file() else _plain_run(directory)
    if not isinstance(about.get("arm"), str) or not isinstance(about.get("seed"), int):
        raise ValueError(f'{directory / "run.json"} must name its run: {{"arm": text, "seed": whole number, ...}}')
    logs = [path for path in (directory / "metrics.jsonl", directory / "timings.jsonl") if path.is_file()]
    manifest = directory / "manifest.json"
    return Run(
        directory=directory,
        arm=about["arm"],
        seed=about["seed"],
        title=str(plan.arms.get(about["arm"], about).get("title") or about.get("arm_title") or ""),
        note=str(plan.arms.get(about["arm"], about).get("note") or ""),
        command=str(about.get("command") or ""),
        configs=tuple(str(path) for path in about.get("config") or ()),
        seconds=finite(about.get("seconds")),
        series={key: values for path in logs for key, values in read_metrics(path).items()},
        manifest=_read_object(manifest) if manifest.is_file() else {},
        hack_key=plan.measures["hack_rate"],
    )


def _plain_run(directory: Path) -> dict[str, Any]:
    """What ``run.json`` would say of a run that no study started."""
    path = directory / "config.yaml"
    seed = yaml.safe_load(path.read_text(encoding="utf-8")).get("seed_everything") if path.is_file() else None
    match = _RUN_NAME.match(directory.name)
    if not isinstance(seed, int) and match is None:
        raise ValueError(f"{directory} says neither in a config.yaml nor in its name (<arm>-<seed>) which seed it had")
    arm = match["arm"] if match else directory.name
    return {"arm": arm, "seed": seed if isinstance(seed, int) else int(match["seed"] if match else 0)}


def read_metrics(path: Path) -> dict[str, dict[int, float | None]]:
    """Read ``metrics.jsonl`` into ``series[key][step]``; where a step logs a key twice, the later row holds.

    A broken last line belongs to a run that is still writing (or was killed) and is left out.

    Raises:
        ValueError: Any other line is not a JSON object with a whole ``step``.
    """
    series: dict[str, dict[int, float | None]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number} is not JSON ({error.msg}): every line must be one object") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f'{path} line {number} has no whole "step": every row must say at which step it was measured')
        for key, value in row.items():
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                series.setdefault(key, {})[row["step"]] = finite(value)
    series.pop("step", None)
    return series


def finite(value: object) -> float | None:
    """The value as a float; None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error.msg} at line {error.lineno}): it must hold one object") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object, not a {type(content).__name__}")
    return content


def _refuse_duplicates(runs: list[Run]) -> None:
    seen: dict[tuple[str, int], Path] = {}
    for run in runs:
        first = seen.setdefault((run.arm, run.seed), run.directory)
        if first is not run.directory:
            raise ValueError(f"{first} and {run.directory} both claim arm {run.arm!r} with seed {run.seed}: keep one of them")


def _absent(runs: list[Run], folders: Iterable[Path], plan: Plan, failures: dict[tuple[str, int], str]) -> list[tuple[str, int, str]]:
    """Combinations of arm and seed without a final measurement, each once, and why; also of arms that the plan names and nobody ran."""
    by_key = {(run.arm, run.seed): run for run in runs}
    seeds = sorted({run.seed for run in runs})
    bare = [_RUN_NAME.match(folder.name) for folder in folders if _left_behind(folder)]
    begun = {(match["arm"], int(match["seed"])) for match in bare if match}
    arms = _ordered({run.arm for run in runs} | set(plan.arms), plan)
    absent = []
    for arm, seed in [*((arm, seed) for arm in arms for seed in seeds), *sorted(begun)]:
        run = by_key.get((arm, seed))
        if run is None:
            unknown = "directory without run.json" if (arm, seed) in begun else "no such run"
            absent.append((arm, seed, failures.get((arm, seed), unknown)))
        elif not run.finished:
            absent.append((arm, seed, "no final evaluation"))
    return list(dict.fromkeys(absent))


def _failures(study_dir: Path) -> dict[tuple[str, int], str]:
    """Why runs failed, as the sweep that started them says in its ``runs.json``."""
    path = study_dir / "runs.json"
    records = _read_object(path).get("runs", []) if path.is_file() else []
    return {(one["arm"], one["seed"]): f"failed: {one['error']}" for one in records if one.get("state") == "failed"}


def _left_behind(folder: Path) -> bool:
    """A run that was begun here and did not get as far as its record."""
    return not (folder / "run.json").is_file() and any((folder / name).is_file() for name in ("metrics.jsonl", "log.txt"))
