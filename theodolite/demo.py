"""The demo: a small language model learns to cheat, and what projecting the cheating direction out of its updates does about it.

``make demo``, or::

    python -m theodolite.demo --out runs/demo

On two idle CPU cores it takes about nine minutes: a warm start (trained once, then cached), seven arms with three seeds, a
report. Every arm of a seed sees the same prompts in the same order. Interrupted, it continues where it was.

Everything it runs are ordinary configs through the ordinary command line: ``configs/sft/mini*.yaml`` and ``configs/grpo/arms/*.yaml``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from theodolite.provenance import content_hash, file_hash, tree_hash, write_json_atomic
from theodolite.study import Job, run_jobs


@dataclass(frozen=True, slots=True)
class Arm:
    """An intervention: a file in ``configs/grpo/arms`` and how the report names it."""

    name: str
    title: str
    note: str = ""


ARMS = (
    Arm("vanilla", "no intervention"),
    Arm("random", "Haar-random directions, control"),
    Arm("projected_static", "static direction, one-sided removal, norm restored"),
    Arm("projected_live", "live direction, one-sided, overshoot 2", "variant: overshoot 2, not pure removal"),
    Arm("shuffled", "projected_live with shuffled pair labels, control"),
    Arm("push", "constant ungated push along the live direction, control"),
    Arm("rebound", "activation-score penalty on advantages, baseline"),
)
STEPS = 36
WARM_START = (("warm_start", ("sft/mini.yaml",), 240), ("topup", ("sft/mini.yaml", "sft/mini_topup.yaml"), 60))
SOURCES = ("datamodules", "lightning_modules", "seeds.py", "batch_arithmetic.py", "sandbox")
"""What the warm start is a function of, beside its configs and the libraries: relative to the package."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo; see the module's docstring.

    Raises:
        SystemExit: 1 if a run failed, 2 for wrong arguments, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m theodolite.demo", description="The cheating demo: arms, seeds, report.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="study folder (default: runs/demo)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of prompts and sampling (default: 0 1 2)")
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], choices=[arm.name for arm in ARMS], metavar="ARM")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="runs at once (default: one per core)")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where the warm start is kept (default: runs/cache)")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder of the configs (default: configs)")
    options = parser.parse_args(argv)
    if not (options.configs / "grpo" / "mini.yaml").is_file():
        parser.error(f"there is no {options.configs}/grpo/mini.yaml; run from a checkout, or say where its configs are with --configs.")
    try:
        failures = run_demo(options, Console())
    except KeyboardInterrupt:
        print(f"interrupted; finished runs are kept in {options.out}, the same command continues.", file=sys.stderr)
        sys.exit(130)
    for failure in failures:
        print(failure, file=sys.stderr)
    sys.exit(1 if failures else 0)


def run_demo(options: argparse.Namespace, console: Console) -> list[str]:
    """Warm start, arms, report. Returns one sentence per failed run."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    policy, failures = warm_start(options.configs, options.cache, console)
    seconds["warm start"] = time.perf_counter() - start
    if failures:
        return failures
    jobs = [arm_job(arm, seed, policy, options) for seed in options.seeds for arm in ARMS if arm.name in options.arms]
    start = time.perf_counter()
    failures = run_with_progress(jobs, options.processes, console)
    seconds["arms"] = time.perf_counter() - start
    start = time.perf_counter()
    report(options.out, seconds)
    seconds["report"] = time.perf_counter() - start
    summary = report(options.out, seconds)  # a second time, so that the page states its own cost too
    _print_results(summary, seconds, options.out, console)
    return failures


def warm_start(configs: Path, cache: Path, console: Console) -> tuple[Path, list[str]]:
    """The base policy, trained unless the cache holds one made from the same configs, sources and libraries.

    Returns:
        Folder of the policy, and sentences about failures.
    """
    key = warm_start_key(configs)
    home = cache / "warm_start" / key[:16]
    policy, marker = home / "topup" / "policy", home / "done.json"
    weights = policy / "model.safetensors"
    if marker.is_file() and weights.is_file() and content_hash(file_hash(weights)) == _read_hash(marker):
        console.print(f"warm start: cached in {home}")
        return policy, []
    source: list[str] = []
    for name, layers, steps in WARM_START:
        args = ("fit", *_layers(configs, layers), *source, *_QUIET)
        failures = run_with_progress([Job(home / name, args, {"phase": name}, test=False, steps=steps)], 1, console)
        if failures:
            return policy, failures
        source = [f"--model.policy={home / name / 'policy'}"]
    write_json_atomic(marker, {"key": key, "weights": content_hash(file_hash(weights))})
    return policy, []


_QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def _read_hash(marker: Path) -> str:
    import json

    return str(json.loads(marker.read_text()).get("weights"))


def _layers(configs: Path, names: Sequence[str]) -> list[str]:
    return [f"--config={configs / name}" for name in names]


def warm_start_key(configs: Path) -> str:
    """Hash of everything that decides the base policy's weights: configs, sources and library versions."""
    spec = importlib.util.find_spec("theodolite")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    paths: list[Path] = []
    for source in SOURCES:
        name = f"theodolite.{source.removesuffix('.py')}"
        found = importlib.util.find_spec(name)
        assert found is not None
        paths += [Path(p) for p in found.submodule_search_locations or [str(found.origin)]]
    files = sorted(file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]))
    layers = sorted({configs / name for _, names, _ in WARM_START for name in names})
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "lightning", "numpy")}
    return content_hash({"sources": tree_hash(files), "configs": tree_hash(layers), "libraries": libraries})


def arm_job(arm: Arm, seed: int, policy: Path, options: argparse.Namespace) -> Job:
    """The run of one arm with one seed: fit, then the test protocol."""
    layers = ("grpo/mini.yaml", f"grpo/arms/{arm.name}.yaml")
    args = ("fit", *_layers(options.configs, layers), f"--seed_everything={seed}", f"--model.policy={policy}", *_QUIET)
    record: dict[str, Any] = {"arm": arm.name, "seed": seed, "arm_title": arm.title, "note": arm.note}
    record["config"] = [str(options.configs / layer) for layer in layers]
    return Job(options.out / f"{arm.name}-{seed}", args, record, test=True, steps=STEPS)


def run_with_progress(jobs: Sequence[Job], processes: int, console: Console) -> list[str]:
    """Run jobs under a bar for each that runs and one for all; a line for each that ends."""
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        overall = progress.add_task("runs", total=len(jobs), completed=sum(job.done for job in jobs)) if len(jobs) > 1 else None
        tasks: dict[str, TaskID] = {}

        def watch(running: Sequence[Job], finished: Job | None) -> None:
            for job in running:
                if job.name not in tasks:
                    tasks[job.name] = progress.add_task(job.name, total=job.steps)
                progress.update(tasks[job.name], completed=job.steps_done())
            if finished is not None:
                if finished.name in tasks:
                    progress.remove_task(tasks[finished.name])
                if overall is not None:
                    progress.advance(overall)
                progress.console.print(_finished_line(finished), highlight=False)

        return run_jobs(jobs, processes, watch)


def _finished_line(job: Job) -> str:
    if not job.done:
        return f"{job.name}: FAILED"
    import json

    seconds = json.loads((job.run_dir / "run.json").read_text())["seconds"]
    rows = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    last: dict[str, Any] = {key: value for row in rows for key, value in row.items()}
    prefix = "test/hinted" if "test/hinted/hack_rate" in last else "val"
    rates = ", ".join(f"{name} {last[f'{prefix}/{name}_rate']:.3f}" for name in ("hack", "pass") if f"{prefix}/{name}_rate" in last)
    return f"{job.name}: {rates} ({seconds:.0f} s)"


def report(out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Write timings and the report; returns the summary."""
    from theodolite.reports import build_report  # imported late: matplotlib is not needed before

    rounded = {phase: round(value, 1) for phase, value in seconds.items()}
    write_json_atomic(out / "timings.json", {"seconds": rounded, "cpu_count": len(os.sched_getaffinity(0))})
    return build_report(out)


def _print_results(summary: dict[str, Any], seconds: dict[str, float], out: Path, console: Console) -> None:
    for finding in summary.get("findings", []):
        console.print(f"- {finding if isinstance(finding, str) else finding.get('text', finding)}", highlight=False)
    for phase, value in seconds.items():
        console.print(f"{phase:<12} {value:7.1f} s", highlight=False)
    console.print(f"total        {sum(seconds.values()):7.1f} s", highlight=False)
    console.print(f"report: {out / 'report' / 'index.html'}", highlight=False)


if __name__ == "__main__":
    main()
