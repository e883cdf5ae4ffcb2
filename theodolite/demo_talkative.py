"""The talkative demo: a small model's activations put into words and read back, before and after RL, measured by best-of-K.

``make demo-talkative``, or::

    python -m theodolite.demo_talkative --out runs/demo_talkative

On two idle CPU cores it took 112 s (limit: six minutes): a target model of a toy world, a warm start on captions of true facts, GRPO, and
one sweep over both. Interrupted, it continues where it was.

Everything it runs are ordinary configs through the ordinary command line: ``configs/talkative/{target,sft,grpo,k_sweep}.yaml``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from theodolite.provenance import file_hash, write_json_atomic, write_text_atomic
from theodolite.study import Job
from theodolite.study_progress import print_seconds, run_with_progress
from theodolite.sweep import end_with

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
STEPS = {"target": 400, "sft": 300, "grpo": 200}
RESULTS = "k_sweep_results"
MIN_FVE, MIN_GAIN = 0.6, 0.02


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that the demo is meant to show, and whether it did."""

    holds: bool
    text: str


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo; see the module's docstring.

    Raises:
        SystemExit: 1 if a run failed or a check does not hold, 2 for wrong arguments, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m theodolite.demo_talkative", description="Activations in words and back.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo_talkative"), help="study folder (default: runs/demo_talkative)")
    parser.add_argument("--seed", type=int, default=0, help="of every run (default: 0)")
    parser.add_argument("--processes", type=int, default=2, help="runs at once (default: 2)")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder of the configs (default: configs)")
    options = parser.parse_args(argv)
    if not (options.configs / "talkative" / "k_sweep.yaml").is_file():
        parser.error(f"there is no {options.configs}/talkative/k_sweep.yaml; run from a checkout, or say where its configs are: --configs.")
    end_with(lambda: run_demo(options, Console()), options.out)


def run_demo(options: argparse.Namespace, console: Console) -> list[str]:
    """Target, warm start, RL beside a first sweep, the sweep over both. Returns one sentence per run or check that failed."""
    seconds: dict[str, float] = {}
    for phase, names in (
        ("target", ["target"]),
        ("warm start", ["sft"]),
        ("RL and first sweep", ["grpo", "sweep_sft"]),
        ("sweep", ["sweep"]),
    ):
        start = time.perf_counter()
        failures = run_with_progress([job(name, options) for name in names], options.processes, console)
        seconds[phase] = round(time.perf_counter() - start, 1)
        if failures:
            return failures
    folder = options.out / "sweep" / "best_of_k"
    results = {stage: find_result(folder, stage) for stage in ("sft", "grpo")}
    checks = checks_of(results["sft"])
    write_json_atomic(options.out / "summary.json", {"checks": [[c.holds, c.text] for c in checks], "seconds": seconds})
    show(results, checks, seconds, folder, console)
    return [f"not shown: {check.text}" for check in checks if not check.holds]


def job(name: str, options: argparse.Namespace) -> Job:
    """One run of the demo; what it needs of earlier runs must be there."""
    layers = {"target": ["target"], "sft": ["sft"], "grpo": ["sft", "grpo"]}.get(name, ["k_sweep"])
    configs = [f"--config={options.configs / 'talkative' / f'{layer}.yaml'}" for layer in layers]
    if name != "target":
        configs.append(f"--config={paths_layer(name, options.out)}")
    args = ["fit" if name in STEPS else "test", *configs, f"--seed_everything={options.seed}", *QUIET]
    if name.startswith("sweep"):
        measured = ["sft"] if name == "sweep_sft" else ["sft", "grpo"]
        args.append(f"--trainer.callbacks.cache_dir={options.out / 'best_of_k'}")  # shared: the second sweep draws only what RL changed
        args.append(f"--data.checkpoint=[{','.join(str(options.out / stage / 'talkative') for stage in measured)}]")
    return Job(options.out / name, tuple(args), {"phase": name, "seed": options.seed}, test=False, steps=STEPS.get(name, 1))


def paths_layer(name: str, out: Path) -> Path:
    """A config layer with the folders of this demo; it names the content of what it builds on, so that nothing stale is kept."""
    target, warm = out / "target" / "policy", out / "sft" / "talkative"
    model: dict[str, Any] = {"verbaliser": {"model": str(target)}, "reconstructor": {"model": str(target)}}
    inputs = [target / "model.safetensors"]
    if name != "sft":
        model["weights"] = str(warm)
        inputs.append(warm / "talkative.safetensors")
    if name == "sweep":
        inputs.append(out / "grpo" / "talkative" / "talkative.safetensors")
    layer = {"model": {"init_args": model}, "data": {"init_args": {"model": str(target), "cache_dir": str(out / "banks")}}}
    text = "".join(f"# {path.parent.parent.name}: {file_hash(path)}\n" for path in inputs) + json.dumps(layer, indent=2) + "\n"
    path = out / "layers" / f"{name}.yaml"
    write_text_atomic(path, text)
    return path


def find_result(folder: Path, stage: str) -> Mapping[str, Any]:
    """The sweep's result for the weights of one stage.

    Raises:
        FileNotFoundError: There is none.
    """
    for path in sorted(folder.glob(f"{RESULTS}-*.json")):
        result = json.loads(path.read_text())
        if Path(str(result.get("checkpoint_path"))).parent.name == stage:
            return result
    raise FileNotFoundError(f"{folder} holds no result for the weights of {stage}; run the sweep again.")


def checks_of(warm: Mapping[str, Any]) -> list[Check]:
    """What the sweep of the warm start must show."""
    name = "best_of_k.reconstructor"
    values, gain = warm["curves"][name]["fve"]["value"], warm["gains"][name]
    null, largest = warm["curves"]["null"]["fve"]["value"], warm["k_values"][-1]
    return [
        Check(values[0] > MIN_FVE, f"one text explains {values[0]:.3f} of the variance (more than {MIN_FVE})"),
        Check(
            gain["value"][-1] > MIN_GAIN and gain["ci_lower"][-1] > 0,
            f"best of {largest} gains {gain['value'][-1]:.3f} [{gain['ci_lower'][-1]:.3f}, {gain['ci_upper'][-1]:.3f}] "
            f"(more than {MIN_GAIN}, paired interval above 0)",
        ),
        Check(max(null) < 0, f"texts about another activation explain less than nothing, however many: at most {max(null):.3f}"),
        Check(all(b >= a for a, b in itertools.pairwise(values)), "the curve never falls with K"),
    ]


def differences(folder: Path) -> list[str]:
    """What RL changed at the smallest and largest K, with paired intervals, from the sweep's own file."""
    found = json.loads((folder / f"{RESULTS}.differences.json").read_text())
    lines: list[str] = []
    for each in found["differences"]:
        for place in (0, -1):
            value, low, high = (each[name][place] for name in ("value", "ci_lower", "ci_upper"))
            name = f"{each['label']} - {each['against']}, K={each['k_values'][place]}, {each['reconstructor']} ({each['role']})"
            lines.append(f"{name}: {value:+.4f} [{low:+.4f}, {high:+.4f}], n={found['rows']} rows of {found['documents']} documents")
    return lines


def show(
    results: Mapping[str, Mapping[str, Any]], checks: Sequence[Check], seconds: Mapping[str, float], folder: Path, console: Console
) -> None:
    """Curves side by side, the checks, the time of each phase, and where the page is."""
    table = Table("K", title="fraction of variance explained")
    columns: list[list[float]] = []
    for stage, result in results.items():
        for name, title in (("best_of_k.reconstructor", "in loop"), ("best_of_k.held_out", "held out"), ("null", "null")):
            table.add_column(f"{stage}: {title}", justify="right")
            columns.append(result["curves"][name]["fve"]["value"])
    for k, row in zip(results["sft"]["k_values"], zip(*columns, strict=True), strict=True):
        table.add_row(str(k), *(f"{value:.3f}" for value in row))
    console.print(table)
    for line in differences(folder):
        console.print(line, highlight=False)
    for check in checks:
        console.print(f"{'shown    ' if check.holds else 'NOT SHOWN'} {check.text}", highlight=False)
    print_seconds(seconds, console)
    console.print(f"page: {folder / f'{RESULTS}.html'}", highlight=False)


if __name__ == "__main__":
    main()
