"""Which engine samples, as a config names it."""

from __future__ import annotations

import importlib
from typing import Any

from .rollouts import HFRollout, RolloutEngine


def build_engine(spec: dict[str, Any] | None, merge_adapter: bool) -> RolloutEngine:
    """The rollout engine a config names; nothing is loaded or connected before its ``setup``.

    Args:
        spec: ``{"class_path": ..., "init_args": {...}}`` with the full name of a class, or the own name of one in
            :mod:`theodolite.lightning_modules.vllm`; None = the trainer's own model decodes.
        merge_adapter: Of the trainer's own sampler.

    Raises:
        ValueError: The class is not there, is no engine, or refuses its arguments.
    """
    if spec is None:
        return HFRollout(merge_adapter=merge_adapter)
    if merge_adapter:
        raise ValueError("model.merge_adapter is a setting of the trainer's own sampler; leave it out beside model.rollout.")
    path = str(spec.get("class_path", ""))
    module, _, name = path.rpartition(".")
    try:
        owner = getattr(importlib.import_module(module or "theodolite.lightning_modules.vllm"), name)
        # what the command line sets (--model.rollout.init_args.url=...) arrives beside the class, not inside its arguments
        given = {key: value for key, value in spec.items() if key not in ("class_path", "init_args")}
        engine = owner(**((spec.get("init_args") or {}) | given))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"model.rollout names {path!r}, which cannot be made: {error}") from error
    if not isinstance(engine, RolloutEngine):
        raise ValueError(f"model.rollout names {path!r}, which is no rollout engine; see theodolite.lightning_modules.vllm.")
    return engine
