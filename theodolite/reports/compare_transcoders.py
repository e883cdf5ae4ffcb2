"""Several transcoders side by side: FVU by prefix and layer, sparsity, what the language model loses. Reads what runs wrote, runs nothing.

::

    python -m theodolite.reports.compare_transcoders runs/a runs/b runs/c --out runs/comparison
    python -m theodolite.reports.compare_transcoders runs/demo_transcoder        # a folder of runs named <arm>-<seed>

A run is a folder of ``theodolite test`` (or of ``fit`` with a test after it): ``config*.yaml`` says what was trained on which sites and
``metrics.jsonl`` holds its ``test/`` numbers; where there are none, those of the last validation stand in and are marked. Writes
``index.html``, ``fvu.png`` and ``summary.json``; the same files give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from theodolite.functional.statistics import t_interval
from theodolite.provenance import write_bytes_atomic, write_json_atomic, write_text_atomic
from theodolite.reports.records import read_metrics

SCHEMA_VERSION = 1
MEASURES = {
    "fvu": "FVU",
    "median_fvu": "median token's FVU",
    "l0": "L0",
    "dead_fraction": "dead",
    "ce_recovered": "CE recovered",
    "kl_spliced": "KL spliced",
}
"""Numbers of a run and how tables call them."""


@dataclass(frozen=True, slots=True)
class CoderRun:
    """One evaluated transcoder.

    Attributes:
        directory: Its folder.
        arm: What is compared; from ``run.json``, else the folder's name.
        seed: Of the run; 0 where nothing says.
        input_site: ``mlp_in.8``.
        target_site: ``mlp_out.8``.
        model: Language model.
        values: Final numbers by name without stage.
        stage: ``test`` or ``val``.
        curve: Training FVU by step.
        command: The command that repeats it, or the empty string.
    """

    directory: Path
    arm: str
    seed: int
    input_site: str
    target_site: str
    model: str
    values: dict[str, float]
    stage: str
    curve: dict[int, float]
    command: str

    @property
    def layer(self) -> int:
        """Of the target site."""
        return int(self.target_site.rpartition(".")[2])

    @property
    def sites(self) -> tuple[str, str]:
        """Input and target."""
        return self.input_site, self.target_site

    @property
    def prefixes(self) -> dict[int, float]:
        """FVU by number of latents."""
        numbered = {name.removeprefix("fvu_"): value for name, value in self.values.items() if name.startswith("fvu_")}
        return dict(sorted((int(end), value) for end, value in numbered.items() if end.isdigit()))


def read_coder_run(directory: Path) -> CoderRun:
    """Read one run.

    Raises:
        FileNotFoundError: The folder lacks its config or metrics.
        ValueError: It holds no evaluated transcoder.
    """
    configs = [path for name in ("config.yaml", "config.test.yaml", "config.validate.yaml") if (path := directory / name).is_file()]
    if not configs or not (directory / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{directory} is no run of theodolite: it needs a config.yaml and a metrics.jsonl.")
    data = yaml.safe_load(configs[0].read_text()).get("data", {}).get("init_args", {})
    series = read_metrics(directory / "metrics.jsonl")
    stage = next((stage for stage in ("test", "val") if f"{stage}/fvu" in series), None)
    if stage is None or "input_site" not in data:
        raise ValueError(f"{directory} holds no evaluated transcoder: run theodolite test on it first.")
    values = {name.partition("/")[2]: steps[max(steps)] for name, steps in series.items() if name.startswith(f"{stage}/")}
    record: dict[str, Any] = json.loads(path.read_text()) if (path := directory / "run.json").is_file() else {}
    return CoderRun(
        directory, str(record.get("arm", directory.name)), int(record.get("seed", 0)), str(data["input_site"]),
        str(data.get("target_site") or data["input_site"]), str(data.get("model")),
        {name: value for name, value in values.items() if value is not None}, stage,
        {step: value for step, value in series.get("train/fvu", {}).items() if value is not None}, str(record.get("command", "")),
    )  # fmt: skip


def find_runs(paths: Sequence[Path]) -> list[CoderRun]:
    """Runs among the given folders and their direct children, those given first first.

    Raises:
        FileNotFoundError: A folder is no run and holds none.
    """
    found: list[CoderRun] = []
    for path in paths:
        if (path / "metrics.jsonl").is_file():
            found.append(read_coder_run(path))
            continue
        children = sorted(child for child in path.glob("*-*") if (child / "run.json").is_file()) if path.is_dir() else []
        if not children:
            raise FileNotFoundError(f"{path} is no run and holds none; give folders that theodolite wrote.")
        found += [read_coder_run(child) for child in children]
    return found


def arms_of(runs: Sequence[CoderRun]) -> list[str]:
    """Arms in order of their first run."""
    return list(dict.fromkeys(run.arm for run in runs))


def paired(runs: Sequence[CoderRun], arm: str, against: str, name: str) -> dict[str, Any]:
    """``arm`` minus ``against`` by seed and layer, with the 95 % t interval of its mean.

    Raises:
        ValueError: Two runs of an arm have one seed and layer.
    """
    sides: list[dict[tuple[int, int], float]] = []
    for side in (arm, against):
        known = [((run.seed, run.layer), run.values[name]) for run in runs if run.arm == side and name in run.values]
        if len(known) != len(dict(known)):
            raise ValueError(
                f"Two runs of the arm {side} have the same seed and layer; compare one of them, or give them names of their own."
            )
        sides.append(dict(known))
    differences = [sides[0][key] - sides[1][key] for key in sorted(sides[0].keys() & sides[1].keys())]
    low, high = t_interval(differences)
    mean = sum(differences) / len(differences) if differences else None
    return {"arm": arm, "against": against, "measure": name, "n": len(differences), "mean": mean, "low": low, "high": high}


def summarise(runs: Sequence[CoderRun]) -> dict[str, Any]:
    """All numbers of the page as plain JSON."""
    arms = arms_of(runs)
    comparisons = [paired(runs, arm, arms[0], name) for arm in arms[1:] for name in ("fvu", "fvu_mean", "ce_recovered")]
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": [
            {"arm": run.arm, "seed": run.seed, "input_site": run.input_site, "target_site": run.target_site, "layer": run.layer}
            | {"model": Path(run.model).name, "stage": run.stage, "values": dict(sorted(run.values.items()))}
            for run in runs
        ],
        "comparisons": comparisons,
    }


def build_comparison(paths: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write ``index.html``, ``fvu.png`` and ``summary.json`` into ``out``; returns the summary."""
    from theodolite.reports.transcoder_page import comparison_page, comparison_png  # matplotlib is slow to import, and errors come first

    runs = find_runs(paths)
    summary = summarise(runs)
    write_bytes_atomic(out / "fvu.png", comparison_png(runs))
    write_text_atomic(out / "index.html", comparison_page(runs, summary))
    write_json_atomic(out / "summary.json", summary)
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and build the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m theodolite.reports.compare_transcoders", description="Compare evaluated transcoders.")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, or a folder of runs named <arm>-<seed>")
    parser.add_argument("--out", type=Path, default=None, help="where the page goes (default: <first>/report)")
    options = parser.parse_args(arguments)
    out = options.out or options.runs[0] / "report"
    try:
        summary = build_comparison(options.runs, out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{out / 'index.html'}: {len(summary['runs'])} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
