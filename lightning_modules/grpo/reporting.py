"""The numbers and tables of a window."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from theodolite.distributed import gather_objects, world_size
from theodolite.functional.advantages import has_signal
from theodolite.protocols import Grade, Verdict, Window

from ..evaluation import add_sums, completion_row, outcome_sums, write_completions
from .window import foreign

Sums = dict[str, tuple[float, float]]


def rollout_sums(window: Window, verdicts: Sequence[Verdict]) -> Sums:
    """(sum, count) pairs of this rank's rollouts: reward and oracle side by side.

    Everything is of the policy's own rollouts; those of another source appear under that source's name.
    """
    own = [i for i, rollout in enumerate(window.rollouts) if not foreign(rollout)]
    rollouts = [window.rollouts[i] for i in own]
    outcomes = outcome_sums([Grade(window.rewards[i], verdicts[i]) for i in own], [rollout.finish for rollout in rollouts])
    scored = [window.rewards[i].value for i in own if window.rewards[i].value == window.rewards[i].value]
    lengths = [len(r.sampler_log_probs) for r in rollouts]
    signal = has_signal(window.values, window.group_size)
    surprise = -sum(sum(r.sampler_log_probs) for r in rollouts)
    return (
        {f"{name}_rate": pair for name, pair in outcomes.items()}
        | {
            "reward_mean": (sum(scored), len(scored)),
            "completion_tokens": (sum(lengths), len(lengths)),
            "entropy_estimate": (surprise, sum(lengths)),
            "groups_with_signal": (float(signal.sum()), len(signal)),
        }
        | _components(window, own)
        | _sources(window)
    )


def _components(window: Window, own: Sequence[int]) -> Sums:
    found: Sums = {}
    for name in sorted({name for i in own for name in window.rewards[i].parts}):
        values = [value for i in own if (value := window.rewards[i].parts.get(name, float("nan"))) == value]
        found[f"reward/{name}"] = (sum(values), len(values))
    return found


def _sources(window: Window) -> Sums:
    """Share and mean reward of every source but the policy; every rank counts towards a source that only one of them has."""
    total = len(window.rollouts)
    others = [(rollout.source, window.rewards[i].value) for i, rollout in enumerate(window.rollouts) if foreign(rollout)]
    names = sorted(set().union(*gather_objects({source for source, _ in others})))
    found: Sums = {"foreign_fraction": (len(others), total)} if names else {}
    for name in names:
        values = [value for source, value in others if source == name]
        scored = [value for value in values if value == value]
        found |= {f"{name}/reward_mean": (sum(scored), len(scored)), f"{name}/fraction": (len(values), total)}
    return found


def log_window(module: Any, sums: Sequence[Sums], lr: float, loads: tuple[float, float]) -> None:
    """Log a window's numbers over all ranks. What starts with ``time/`` is no function of config and seed alone: clocks, and ``loads``.

    Args:
        module: The policy module.
        sums: (sum, count) pairs of this rank, in several dictionaries.
        lr: Learning rate of the window's first update.
        loads: Tokens of the heaviest rank over the mean of all, as sampled and as dealt out for the gradient.
    """
    totals = add_sums([part for parts in gather_objects(list(sums)) for part in parts])
    loss, _ = totals.pop("loss", (0.0, 0.0))
    metrics = {f"train/{name}": total / count if count else float("nan") for name, (total, count) in totals.items()}
    metrics["train/loss"] = loss / module.updates_per_window
    metrics["train/lr"] = lr
    seconds = gather_objects(module.seconds)
    timings = {phase: max(s.get(phase, 0.0) for s in seconds) for phase in sorted(set().union(*seconds))}
    metrics |= {f"time/{phase}_s": value for phase, value in timings.items()}
    tokens = totals.get("completion_tokens", (0.0, 0.0))[0]
    for name, phases in (("rollout", ("rollouts",)), ("gradient", ("gradients",)), ("window", tuple(timings))):
        spent = sum(timings.get(phase, 0.0) for phase in phases if phase != "hooks")
        metrics[f"time/{name}_tokens_per_s"] = tokens / spent if spent > 0 else 0.0
    if world_size() > 1:
        metrics |= {"time/rank_load_sampled": loads[0], "time/rank_load_computed": loads[1]}
    module.log_dict(metrics, rank_zero_only=False, sync_dist=False)
    shown = {"reward": metrics["train/reward_mean"], "hack": metrics["train/hack_rate"], "pass": metrics["train/pass_rate"]}
    module.log_dict(shown, prog_bar=True, logger=False)


def write_table(module: Any, window: Window, verdicts: Sequence[Verdict]) -> None:
    """Write every rank's rollouts of a window to ``completions/step_<step>.parquet`` and to loggers that take tables.

    Columns are those of an evaluation's table and what training needs to replay a rollout: token ids, sampler log-probabilities, weight
    version, source, the value after shaping, the advantage, and what callbacks measured (``feature/...``).
    """
    rows: list[dict[str, Any]] = []
    for i, rollout in enumerate(window.rollouts):
        prompt = module.render_prompt(window.rows[i // window.group_size].prompt)
        grade = Grade(window.rewards[i], verdicts[i])
        row = completion_row(
            rollout.problem, rollout.slot, rollout.sample, prompt, rollout.text, rollout.finish, len(rollout.sampler_log_probs), grade
        )
        advantage = window.advantages[i]
        rows.append(
            row
            | {"value": float(window.values[i]), "advantage": float(advantage if advantage.ndim == 0 else advantage.mean())}
            | {"source": rollout.source, "weight_version": rollout.weight_version}
            | {"prompt_ids": list(rollout.tokens.prompt_ids), "completion_ids": list(rollout.tokens.completion_ids)}
            | {"sampler_log_probs": list(rollout.sampler_log_probs)}
            | {f"reward/{name}": value for name, value in rollout_parts(window, i).items()}
            | {f"feature/{name}": float(values[i]) for name, values in sorted(window.features.items())}
        )
    gathered = [row for part in gather_objects(rows) for row in part]
    if module.global_rank != 0 or module.trainer.fast_dev_run:
        return
    write_completions(gathered, Path(module.trainer.default_root_dir) / "completions" / f"step_{window.step:06d}.parquet")
    hidden = ("prompt_ids", "completion_ids", "sampler_log_probs")
    shown = [{name: value for name, value in row.items() if name not in hidden} for row in gathered]
    for logger in module.trainer.loggers:
        if hasattr(logger, "log_table") and shown:
            logger.log_table("completions", columns=list(shown[0]), data=[list(row.values()) for row in shown], step=window.step)


def rollout_parts(window: Window, i: int) -> dict[str, float]:
    """Named components of one rollout's reward."""
    return dict(window.rewards[i].parts)
