"""The demo of parameter decomposition: a toy model's components are recovered, and one adversary gives three different numbers.

``make demo-decomposition``, or::

    python -m theodolite.demo_decomposition --out runs/demo_decomposition

Trains the toy model of superposition (5 features in 2 dimensions) and its decomposition with three seeds, attacks each, and writes
``report/index.html`` with its figures: 102 s on two idle CPU cores. Interrupted, it continues where it was. What it runs are ordinary
configs: ``configs/decomposition/tms_5-2.yaml`` and ``demo.yaml``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from theodolite.functional.statistics import Spread, spread
from theodolite.provenance import write_bytes_atomic, write_json_atomic, write_text_atomic
from theodolite.study import RUN_RECORD, Job
from theodolite.study_progress import run_with_progress
from theodolite.sweep import end_with

LAYERS = ("decomposition/tms_5-2.yaml", "decomposition/demo.yaml")
EXPLANATIONS = {
    "joint": "one source against all rows of the attack batch",
    "averaged": "what ranks with their own rows compute when they average gradients",
    "separate": "every rank's rows attacked by a source of their own",
}

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
FIGURES = (
    "figure { margin: 1.6rem 0; } figure div { overflow-x: auto; } figure.wide img { min-width: 44rem; } "
    "figure.narrow img { max-width: 46rem; }"
)
"""Pairs of panels scroll sideways on narrow screens, where their letters could not be read."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo; see the module's docstring.

    Raises:
        SystemExit: 0, 1 if a run failed, 2 for wrong arguments, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m theodolite.demo_decomposition", description="Decompose a toy model and attack it.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo_decomposition"), help="study folder (default: runs/demo_decomposition)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of target, components and data (default: 0 1 2)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="runs at once (default: one per core)")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder of the configs (default: configs)")
    options = parser.parse_args(argv)
    if not (options.configs / LAYERS[0]).is_file():
        parser.error(f"there is no {options.configs / LAYERS[0]}; run from a checkout, or say where its configs are with --configs.")
    end_with(lambda: run_demo(options, Console()), options.out)


def run_demo(options: argparse.Namespace, console: Console) -> list[str]:
    """Runs, page. Returns one sentence per failed run."""
    jobs = [_job(seed, options) for seed in options.seeds]
    failures = run_with_progress(jobs, options.processes, console)
    if failures:
        return failures
    build_page([job.run_dir for job in jobs], options.out / "report")
    for line in summary_lines([job.run_dir for job in jobs]):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"report: {options.out / 'report' / 'index.html'}", highlight=False)
    return []


def _job(seed: int, options: argparse.Namespace) -> Job:
    layers = [f"--config={options.configs / layer}" for layer in LAYERS]
    args = ("fit", *layers, f"--seed_everything={seed}")
    return Job(options.out / f"tms_5-2-{seed}", args, {"seed": seed}, test=True, steps=_steps(options.configs / LAYERS[0]))


def _steps(config: Path) -> int:
    import yaml

    return int(yaml.safe_load(config.read_text())["trainer"]["max_steps"])


def last_test(run: Path) -> dict[str, Any]:
    """The last row of ``metrics.jsonl`` that holds test numbers."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if any(key.startswith("test/") for key in row)]
    if not found:
        raise ValueError(f"{run} holds no test numbers; its run did not finish.")
    return {key: value for row in found for key, value in row.items()}


def attack_rows(run: Path) -> list[dict[str, Any]]:
    """The table of the test's attacks, the largest attack batch first."""
    tables = [json.loads(path.read_text()) for path in sorted((run / "pgd").glob("*.test.*.json"))]
    tables.sort(key=lambda table: -table["attack_batch_size"])
    return [row for table in tables for row in table["results"]]


def recovery_row(run: Path) -> dict[str, float]:
    """Identity error, similarities, L0 and seconds of a run."""
    test = last_test(run)
    names = {
        "identity CI error": "test/identity_ci_error/total",
        "MMCS linear1": "test/recovery/linear1/mmcs",
        "MMCS linear2": "test/recovery/linear2/mmcs",
        "smallest cosine": "test/recovery/linear1/min_cosine",
        "L0": "test/ci_l0_0/total",
        "stochastic recon": "test/loss/stochastic_recon",
    }
    seconds = json.loads((run / RUN_RECORD).read_text())["seconds"]
    return {name: float(test[key]) for name, key in names.items()} | {"seconds": seconds}


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Loss by attack and number of steps."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["attack"], {})[row["n_steps"]] = row["loss"]
    return found


def attack_spreads(runs: Sequence[Path]) -> dict[str, dict[int, Spread]]:
    """Loss over the runs, by attack and number of steps."""
    each = [curves(attack_rows(run)) for run in runs]
    return {attack: {n: spread([found[attack][n] for found in each]) for n in curve} for attack, curve in each[0].items()}


def power_of_ten(found: Mapping[str, Mapping[int, Spread]]) -> int:
    """Of the largest mean loss: all are shown in its unit."""
    return math.floor(math.log10(max(item.mean or 0.0 for curve in found.values() for item in curve.values())))


def in_unit(item: Spread, power: int) -> str:
    """``3.22 ± 0.41`` in units of ``10 ** power``; of one seed only its value."""
    values = [value / 10.0**power for value in (item.mean, item.sd) if value is not None]
    return " ± ".join(f"{value:.2f}" for value in values)


def unit_text(runs: Sequence[Path], power: int) -> str:
    """What a table of :func:`in_unit` holds."""
    over = f"mean ± sample standard deviation over n={len(runs)} seeds" if len(runs) > 1 else "one seed, so no spread"
    return f"Reconstruction loss in units of 10{str(power).translate(SUPERSCRIPT)}, {over}"


def summary_lines(runs: Sequence[Path]) -> list[str]:
    """What is printed at the end."""
    lines = [f"{run.name}: " + ", ".join(f"{name} {value:.4g}" for name, value in recovery_row(run).items()) for run in runs]
    found = attack_spreads(runs)
    power = power_of_ten(found)
    lines.append(f"{unit_text(runs, power)}, after n steps of the attack:")
    for label, curve in found.items():
        lines.append(f"{label:<14}" + "".join(f"  n={n}: {in_unit(item, power):<12}" for n, item in curve.items()).rstrip())
    return lines


def build_page(runs: Sequence[Path], folder: Path) -> None:
    """Write ``index.html``, ``attacks.png`` and ``summary.json``."""
    from theodolite.reports.component_figures import draw_attacks  # imported late: matplotlib is not needed before
    from theodolite.reports.html_parts import data_uri, section
    from theodolite.reports.page_style import CSS

    first = runs[0]
    figures = sorted((first / "figures").iterdir())[-1]
    found = attack_spreads(runs)
    png = draw_attacks({attack: {n: item.mean or 0.0 for n, item in curve.items()} for attack, curve in found.items()})
    write_bytes_atomic(folder / "attacks.png", png)
    pictures = {name: data_uri((figures / name).read_bytes(), "image/png") for name in ("permuted_ci.png", "uv.png", "ci_histogram.png")}
    body = section("recovered", "What was recovered", _recovery_table(runs))
    body += _figure(
        pictures["permuted_ci.png"],
        f"{first.name}: causal importance of each component when one feature is active (0.75), columns permuted",
    )
    body += _figure(pictures["uv.png"], f"{first.name}: reading and writing vectors of the components, in the same order")
    body += _figure(pictures["ci_histogram.png"], f"{first.name}: causal importances over the test rows")
    body += section("attack", "One adversary, three numbers", _attack_text(runs) + _attack_table(runs))
    body += _figure(
        data_uri(png, "image/png"),
        f"Reconstruction loss against the number of steps, by attack batch; mean over n={len(runs)} seeds",
        "narrow",
    )
    title = "A decomposition of a toy model of superposition"
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f'<!doctype html>\n<html lang="en"><head>{meta}\n<title>{title}</title>'
    page = f"{head}\n<style>{CSS}{FIGURES}</style></head><body><main>\n<h1>{title}</h1>\n{_lead()}\n{body}</main></body></html>\n"
    write_text_atomic(folder / "index.html", page)
    numbers = {"recovery": {run.name: recovery_row(run) for run in runs}, "attacks": {run.name: attack_rows(run) for run in runs}}
    write_json_atomic(folder / "summary.json", numbers)


def _lead() -> str:
    return (
        '<p class="sub">5 sparse features in 2 dimensions; 20 components for each of the two weight matrices. Ground truth: one component '
        "per feature, and nothing else.</p>"
    )


def _attack_text(runs: Sequence[Path]) -> str:
    counts = {row["attack"]: row["attacks"] for row in attack_rows(runs[0])}
    attacks = ", ".join(f"{label} {n}" for label, n in counts.items())
    return (
        "<p>A shared adversarial mask must hurt every row of its attack batch, so its loss depends on that batch: the same rows in shards "
        "of 8, each with a mask of its own, give a larger number. Simulating 8 ranks that average their gradients gives exactly the joint "
        f'attack.</p><p class="small">{escape(unit_text(runs, power_of_ten(attack_spreads(runs))))}. Attack batches per seed: '
        f"{escape(attacks)}; each seed's standard error over them is in summary.json.</p>"
    )


def _figure(source: str, caption: str, kind: str = "wide") -> str:
    image = f'<img src="{source}" alt="{escape(caption)}">'
    return f'<figure class="{kind}"><div tabindex="0">{image}</div><figcaption>{escape(caption)}.</figcaption></figure>\n'


def _recovery_table(runs: Sequence[Path]) -> str:
    from theodolite.reports.html_parts import cell, table

    rows = {run.name: recovery_row(run) for run in runs}
    head = ["run", *next(iter(rows.values()))]
    body = [_row(name, [cell(f"{value:.4g}") for value in row.values()]) for name, row in rows.items()]
    if len(runs) > 1:
        overall = [spread([row[name] for row in rows.values()]) for name in head[1:]]
        body.append(_row(f"mean ± sd, n={len(runs)}", [cell(f"{item.mean:.4g}", f"± {_deviation(item)}") for item in overall]))
    return table(head, body)


def _deviation(item: Spread) -> str:
    """Two digits; what the mean's own rounding makes is none."""
    mean, sd = item.mean or 0.0, item.sd or 0.0
    return f"{sd:.2g}" if sd > 1e-12 * abs(mean) else "0"


def _attack_table(runs: Sequence[Path]) -> str:
    from theodolite.reports.html_parts import cell, table

    found = attack_spreads(runs)
    power, steps = power_of_ten(found), next(iter(found.values()))
    labels = {label: f"{label}: {EXPLANATIONS.get(label.split('_')[0], '')}" for label in found}
    return table(
        ["attack", *(f"{n} step{'s' * (n != 1)}" for n in steps)],
        [_row(labels[label], [cell(in_unit(item, power)) for item in curve.values()]) for label, curve in found.items()],
    )


def _row(name: str, cells: Sequence[str]) -> str:
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


if __name__ == "__main__":
    main()
