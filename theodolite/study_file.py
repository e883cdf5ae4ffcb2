"""A study as a YAML file: which arms, over which configs, with which seeds, from which warm start.

::

    title: what the study is about, in a few words
    base: [grpo/mini.yaml]               # config layers under every arm, lowest first, relative to the folder of configs
    options: [--data.test_problems=96]   # added to every run's command line
    steps: 36                            # optimizer steps of a run, for the progress bar
    seeds: [10, 11, 12, 13, 14]
    test: true                           # run the test protocol on the trained policy
    warm_start:                          # trained once, cached by content; the last phase's policy is every run's --model.policy
      - { name: warm_start, layers: [sft/mini.yaml], steps: 240 }
    hypotheses: act_one_hypotheses.yaml  # beside this file; copied into the study's folder before anything runs
    arms:
      vanilla: { title: no intervention, layers: [grpo/arms/vanilla.yaml] }
      random: { title: Haar-random directions, layers: [grpo/arms/random.yaml], control: true, note: "", options: [] }
    report: {...}                        # how the report reads it: see theodolite/reports/plan.py

Every run is ``theodolite fit`` with the base's layers, the arm's layers, ``--seed_everything`` and the options, in this order. Runs of one
seed see the same prompts in the same order, because nothing but the arm differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from theodolite.config_layers import closest

STUDY_KEYS = {"title", "base", "arms", "seeds", "steps", "options", "test", "warm_start", "hypotheses", "report"}
ARM_KEYS = {"title", "layers", "options", "note", "control"}


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm of a study.

    Attributes:
        name: Short name; also of its folders, ``<name>-<seed>``.
        title: What it is, in words.
        layers: Config layers over the base's.
        options: Options for its command line, after the study's.
        note: A remark that must stand beside its numbers.
        control: It exists to be compared with.
    """

    name: str
    title: str
    layers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    note: str = ""
    control: bool = False


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a warm start: its name, its config layers, and the most optimizer steps it takes."""

    name: str
    layers: tuple[str, ...]
    steps: int


@dataclass(frozen=True, slots=True)
class StudyFile:
    """A study; see the module's docstring for the fields.

    ``plan`` is what a report must know that the runs do not say: titles and order of the file's arms, which are controls, how it reads
    them. It is that of the whole file, also where only some arms are run.
    """

    path: Path
    title: str
    base: tuple[str, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    steps: int
    options: tuple[str, ...] = ()
    test: bool = True
    warm_start: tuple[Phase, ...] = ()
    hypotheses: Path | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arm_names(self) -> list[str]:
        """Names of the arms in the file's order."""
        return [arm.name for arm in self.arms]

    def layers(self) -> list[str]:
        """Every config layer that the study names, each once."""
        named = [*self.base, *(layer for phase in self.warm_start for layer in phase.layers)]
        return list(dict.fromkeys([*named, *(layer for arm in self.arms for layer in arm.layers)]))


def read_study_file(path: Path, configs: Path) -> StudyFile:
    """Read a study and check what can be checked without building anything.

    Args:
        path: The YAML file.
        configs: Folder that its layers are relative to.

    Raises:
        ValueError: The file is not one, a key is missing or unknown, a layer does not exist, or an arm or seed is named twice.
    """
    if not path.is_file():
        raise ValueError(f"There is no study file {path}; give a YAML file such as configs/experiment/act_one.yaml.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    raw = _mapping(path, "the study", content, {"title", "base", "arms", "seeds", "steps"}, STUDY_KEYS)
    study = StudyFile(
        path=path,
        title=str(raw["title"]),
        base=_texts(path, "base", raw["base"]),
        arms=tuple(_arm(path, name, entry) for name, entry in _named(path, raw["arms"]).items()),
        seeds=_seeds(path, raw["seeds"]),
        steps=int(raw["steps"]),
        options=_texts(path, "options", raw.get("options", [])),
        test=bool(raw.get("test", True)),
        warm_start=tuple(_phase(path, entry) for entry in raw.get("warm_start") or []),
        hypotheses=None if raw.get("hypotheses") is None else path.parent / str(raw["hypotheses"]),
    )
    study = replace(study, plan=_plan(study, raw.get("report") or {}))
    for layer in study.layers():
        if not (configs / layer).is_file():
            known = sorted(str(file.relative_to(configs)) for file in configs.rglob("*.y*ml")) if configs.is_dir() else []
            raise ValueError(f"{path}: there is no config {configs / layer}{closest(layer, known)}.")
    if study.hypotheses is not None and not study.hypotheses.is_file():
        raise ValueError(f"{path}: hypotheses names {study.hypotheses}, which does not exist; it lies beside the study file.")
    return study


def _plan(study: StudyFile, report: Mapping[str, Any]) -> dict[str, Any]:
    arms = {arm.name: {"title": arm.title, "note": arm.note, "control": arm.control} for arm in study.arms}
    return {"title": study.title, "arms": arms} | dict(report)


def _mapping(path: Path, where: str, value: object, needed: set[str], known: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {where} must be a mapping with the keys {', '.join(sorted(needed))}, not {value!r}.")
    for key in value:
        if key not in known | needed:
            raise ValueError(f"{path}: {where} has the unknown key {key!r}{closest(str(key), known)}.")
    missing = sorted(needed - set(value))
    if missing:
        raise ValueError(f"{path}: {where} lacks {', '.join(missing)}.")
    return value


def _named(path: Path, value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path}: arms must be a mapping of names to arms, and hold at least one.")
    return {str(name): entry for name, entry in value.items()}


def _arm(path: Path, name: str, entry: object) -> Arm:
    if not name.replace("_", "").replace(".", "").isalnum():
        raise ValueError(f"{path}: the arm {name!r} names folders; use letters, digits, dots and underscores.")
    raw = _mapping(path, f"arm {name}", entry, {"title"}, ARM_KEYS)
    layers, options = (_texts(path, f"arm {name}: {key}", raw.get(key, [])) for key in ("layers", "options"))
    return Arm(name, str(raw["title"]), layers, options, str(raw.get("note", "")), bool(raw.get("control", False)))


def _phase(path: Path, entry: object) -> Phase:
    raw = _mapping(path, "a phase of warm_start", entry, {"name", "layers", "steps"}, {"layers", "steps"})
    return Phase(str(raw["name"]), _texts(path, "warm_start: layers", raw["layers"]), int(raw["steps"]))


def _texts(path: Path, where: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{path}: {where} must be a list of texts, not {value!r}.")
    return tuple(value)


def _seeds(path: Path, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, int) for item in value) or len(set(value)) < len(value):
        raise ValueError(f"{path}: seeds must be a list of different whole numbers, not {value!r}.")
    return tuple(value)
