"""Figures and one HTML page from the result files of best-of-K sweeps.

::

    python -m theodolite.reports.best_of_k_page runs/a/best_of_k/k_sweep_results.json runs/b/... --out report

Several files are drawn over one another if they are of the same rows and K, and refused otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from theodolite.provenance import write_bytes_atomic, write_json_atomic, write_text_atomic
from theodolite.reports.best_of_k import check_comparable
from theodolite.reports.best_of_k_differences import Difference, as_json, differences_of
from theodolite.reports.best_of_k_figures import Result, panels, render, render_svg
from theodolite.reports.formatting import NOT_MEASURED
from theodolite.reports.html_parts import cell, data_uri, section, table
from theodolite.reports.page_style import CSS

TITLE = "Best of K"
TEXTS_SHOWN = 8
"""Candidate texts per row on the page; all of them are in the parquet file."""


def write_report(files: Sequence[Path], folder: Path, name: str, worst_rows: int = 5) -> None:
    """Write ``<name>.png``, ``<name>.pdf`` and ``<name>.html``; of several results also ``<name>.differences.json``.

    Args:
        files: JSON files of results; the parquet of texts and the resampled curves lie beside each.
        folder: Where to write.
        name: Of the files.
        worst_rows: Rows shown at either end.

    Raises:
        ValueError: If the results cannot be compared.
    """
    results = [json.loads(path.read_text()) for path in files]
    check_comparable(results)
    differences = differences_of(results, files)
    for kind in ("png", "pdf"):
        write_bytes_atomic(folder / f"{name}.{kind}", render(results, kind, differences))
    if differences:
        write_json_atomic(folder / f"{name}.differences.json", as_json(differences, results[0]["run"]))
    texts = [pd.read_parquet(path.with_suffix(".parquet")) for path in files]
    write_text_atomic(folder / f"{name}.html", render_page(results, texts, worst_rows, differences))


def render_page(results: Sequence[Result], texts: Sequence[pd.DataFrame], worst_rows: int, differences: Sequence[Difference] = ()) -> str:
    """The page as text, a function of the files alone."""
    body = [f"<h1>{TITLE}</h1>", f'<p class="lead">{_lead(results[0])}</p>']
    body.append(section("figure", "Variance explained", _figures(results, differences)))
    if differences:
        body.append(section("differences", "What differs", _differences(results[0], differences)))
    for result, frame in zip(results, texts, strict=True):
        label = result["run"]["label"]
        body.append(section(f"table-{label}", f"Numbers: {label}", _numbers(result)))
        body.append(section(f"rows-{label}", f"Best and worst rows: {label}", _rows(result, frame, worst_rows)))
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{CSS}</style>"
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n<main>\n{"".join(body)}</main>\n</body>\n</html>\n'


def _lead(result: Result) -> str:
    run = result["run"]
    held_out = (
        "" if run["held_out_reconstructors"] else " There is no held-out reconstructor, so over-fitting of the selection cannot show."
    )
    return (
        f"{run['rows']} activations of {run['documents']} documents, {run['candidates']} texts each. For every K the mean over all subsets "
        f"of K texts, of the text that {escape(run['selecting_reconstructor'])} reconstructs best.{held_out}"
    )


def _figures(results: Sequence[Result], differences: Sequence[Difference]) -> str:
    pictures: list[str] = []
    for description, draw in panels(results, differences):
        light, dark = (data_uri(render_svg(draw, theme), "image/svg+xml") for theme in ("light", "dark"))
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        pictures.append(f'<picture>{source}<img alt="{escape(description)}" src="{light}"></picture>')
    interval = results[0]["run"]["intervals"]
    bands = (
        f"Bands: bootstrap intervals at level {escape(interval)}." if interval else "No intervals were asked for, or there is one document."
    )
    return f'<figure><div class="panels">{"".join(pictures)}</div><figcaption>{bands}</figcaption></figure>'


def _differences(first: Result, differences: Sequence[Difference]) -> str:
    rows: list[str] = []
    for each in differences:
        ends = zip(each.value, each.ci_lower, each.ci_upper, strict=True)
        cells = [cell(_number(value, sign=True), _interval(low, high)) for value, low, high in ends]
        name = f"<b>{escape(each.label)}</b> minus {escape(each.against)}<small>{escape(each.reconstructor)} ({each.role})</small>"
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    run = first["run"]
    paired = (
        "paired: both are resampled by the same documents" if run["intervals"] else "no intervals were asked for, or there is one document"
    )
    note = (
        f"Differences in fve on the same n={run['rows']} activations of {run['documents']} documents, N={run['candidates']} texts each; "
        f"{paired}. They cover the choice of documents, not of training seeds."
    )
    return f'<p class="small">{escape(note)}</p>' + table(["", *(f"K={k}" for k in first["k_values"])], rows)


def _numbers(result: Result) -> str:
    ks = result["k_values"]
    rows: list[str] = []
    for name, metrics in result["curves"].items():
        for metric, values in metrics.items():
            column = values["value"]
            if metric == "mse" or not (len(column) == len(ks) or len(column) == 1):
                continue
            ends = list(zip(values["ci_lower"], values["ci_upper"], strict=True))
            cells = [cell(_number(value), _interval(*end)) for value, end in zip(column, ends, strict=True)]
            cells += [cell("")] * (len(ks) - len(cells))
            rows.append(f'<tr><th scope="row"><code>{escape(name)}</code> {escape(metric)}</th>{"".join(cells)}</tr>')
    gain = result["gains"][f"best_of_k.{result['run']['selecting_reconstructor']}"]
    ends = zip(gain["ci_lower"], gain["ci_upper"], strict=True)
    cells = [cell(_number(value, sign=True), _interval(*end)) for value, end in zip(gain["value"], ends, strict=True)]
    rows.append(f'<tr><th scope="row">gain in fve over K={gain["over_k"]}, paired</th>{"".join(cells)}</tr>')
    run = result["run"]
    drawn = run["rows"] * run["candidates"]
    failed = f"{run['failed_candidates']} of {drawn} candidates and {run['failed_greedy']} of {run['rows']} greedy texts are empty"
    return table(["", *(f"K={k}" for k in ks)], rows) + f'<p class="small">{failed}; they score as the mean prediction.</p>'


def _rows(result: Result, frame: pd.DataFrame, count: int) -> str:
    """Rows by the relative error of their best-of-K text at the largest K."""
    last = result["results_by_k"][-1]
    relative = pd.Series(last["mse_values"]) / pd.Series(last["activation_norms"]).pow(2)
    order = relative.sort_values(kind="stable").index.tolist()
    best, worst = order[:count], [row for row in order[::-1][:count] if row not in order[:count]]
    column, per_row = f"mse.{result['run']['selecting_reconstructor']}", result["run"]["candidates"] + 1
    parts: list[str] = []
    for title, chosen in (("Best", best), ("Worst", worst)):
        cards = "".join(_card(frame.iloc[row * per_row : (row + 1) * per_row], column) for row in chosen)
        parts.append(f'<h3>{title} {len(chosen)}</h3><div class="cards">{cards}</div>')
    rule = f"By error over squared norm at K={result['k_values'][-1]}; of each row's candidates the best {TEXTS_SHOWN - 1} and the worst."
    return f'<p class="small">{rule}</p>{"".join(parts)}'


def _card(texts: pd.DataFrame, column: str) -> str:
    records: list[dict[str, Any]] = [{str(name): value for name, value in row.items()} for row in texts.to_dict("records")]
    greedy, sampled = records[0], sorted(records[1:], key=lambda row: row[column])
    shown = sampled if len(sampled) <= TEXTS_SHOWN else [*sampled[: TEXTS_SHOWN - 1], sampled[-1]]
    lines = [f"greedy {_number(greedy[column])}  {greedy['text'] or '(empty)'}"]
    lines += [f"{row['candidate']:>6} {_number(row[column])}  {row['text'] or '(empty)'}" for row in shown]
    context = f'<span class="prompt">{escape(str(greedy["context"]))}</span>'
    return f'<article class="card"><p><b>{escape(str(greedy["id"]))}</b></p><pre>{context}\n\n{escape(chr(10).join(lines))}</pre></article>'


def _number(value: float | None, sign: bool = False) -> str:
    return NOT_MEASURED if value is None else (f"{value:+.4f}" if sign else f"{value:.4f}").replace("-", "\N{MINUS SIGN}")


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:.3f}, {high:.3f}]".replace("-", "\N{MINUS SIGN}")


def main(args: Sequence[str] | None = None) -> None:
    """Draw result files over one another.

    Raises:
        SystemExit: 2 with one sentence if they cannot be compared.
    """
    parser = argparse.ArgumentParser(description="Figures and a page from results of best-of-K sweeps.")
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of results")
    parser.add_argument("--out", type=Path, default=Path("best_of_k_report"), help="folder to write into")
    parser.add_argument("--name", default="k_sweep", help="name of the files")
    parser.add_argument("--rows", type=int, default=5, help="rows shown with their texts at either end")
    given = parser.parse_args(args)
    try:
        write_report(given.results, given.out, given.name, given.rows)
    except (ValueError, FileNotFoundError) as error:
        print(f"best_of_k_page: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(given.out / f"{given.name}.html")


if __name__ == "__main__":
    main()
