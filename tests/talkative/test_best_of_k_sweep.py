"""The sweep: the same texts and numbers in any batch, on any number of ranks, after any interruption, with every control."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from tiny_describers import LETTERS, Table, TableData, TinyDescriber  # noqa: E402
from warm_processes import run_ranks  # noqa: E402

from theodolite.best_of_k.candidates import Candidates, Drawing  # noqa: E402
from theodolite.best_of_k.curves import Curves, Resampling  # noqa: E402
from theodolite.best_of_k.scores import Scores, partners  # noqa: E402
from theodolite.best_of_k.sweep import SweepPlan, run_labels, run_stages  # noqa: E402
from theodolite.callbacks.best_of_k import BestOfKCallback  # noqa: E402
from theodolite.functional import reconstruction_metrics as metrics  # noqa: E402
from theodolite.reports.best_of_k import SCHEMA, check_comparable  # noqa: E402
from theodolite.reports.best_of_k_page import main as draw_files  # noqa: E402
from theodolite.row_shards import RowShards  # noqa: E402

DRAWING = Drawing(1.0, 3, 0)


def sweep(folder: Path, module: TinyDescriber | None = None, data: TableData | None = None, **settings: Any) -> dict[str, Any]:
    """One test run through Lightning; returns its JSON."""
    chosen: dict[str, Any] = {"k_values": [1, 2, 4, 8], "cache_dir": str(folder / "cache"), "output_dir": str(folder / "out")} | settings
    chosen = {"rows_per_shard": 8, "bootstrap_replicates": 100, "report": False} | chosen
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[BestOfKCallback(**chosen)],
    )  # fmt: skip
    trainer.test(module or TinyDescriber(empty_share=0.1), datamodule=data or TableData(), verbose=False)
    results = sorted((folder / "out").glob("*results*.json"))
    return json.loads(next(path for path in results if "timings" not in path.name).read_text())


def slowly(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def results_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir() if "timings" not in path.name}


# ---------------------------------------------------------------------------------------------------------------- same numbers


@pytest.mark.parametrize("batch", [slowly(1), 7, slowly(64)])
def test_batch_size_changes_no_byte(tmp_path: Path, batch: int) -> None:
    module = TinyDescriber(empty_share=0.1)
    sweep(tmp_path / "a", generation_batch_size=32)
    sweep(tmp_path / "b", module, generation_batch_size=batch)
    assert module.largest_call <= batch
    assert results_bytes(tmp_path / "a") == results_bytes(tmp_path / "b")


class Interrupted(RuntimeError):
    pass


@pytest.mark.parametrize(
    "stage",
    [slowly("first candidates"), "later candidates", slowly("greedy"), slowly("first scores"), "later scores", slowly("report")],
)
def test_interrupted_at_any_stage_and_resumed_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    whole = TinyDescriber(empty_share=0.1)
    data = TableData(rows=150)
    sweep(tmp_path / "whole", whole, data)
    after = {"first candidates": 0, "later candidates": 10, "greedy": 22, "first scores": 38, "later scores": 39, "report": 41}[stage]
    write, written = RowShards.write, []

    def interrupted(self: RowShards, shard: int, columns: Any) -> None:
        if len(written) == after:
            raise Interrupted
        written.append(shard)
        write(self, shard, columns)

    broken = TinyDescriber(empty_share=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(RowShards, "write", interrupted)
        if stage == "report":
            patch.setattr("theodolite.callbacks.best_of_k.write_result", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            sweep(tmp_path / "broken", broken, data)
    resumed = TinyDescriber(empty_share=0.1)
    sweep(tmp_path / "broken", resumed, data)
    assert results_bytes(tmp_path / "broken") == results_bytes(tmp_path / "whole")
    assert broken.drawn + resumed.drawn <= whole.drawn + 8 * 8, "at most one shard is drawn twice"


def test_second_run_draws_nothing_and_another_k_is_free(tmp_path: Path) -> None:
    first = sweep(tmp_path, k_values=[1, 4, 16])
    again = TinyDescriber(empty_share=0.1)
    second = sweep(tmp_path, again, k_values=[1, 4, 16])
    assert (again.drawn, again.reader.texts_read) == (0, 0)
    assert first == second
    sweep(tmp_path, again, k_values=[2, 8], n_candidates=16)
    assert (again.drawn, again.reader.texts_read) == (0, 0)


def test_more_candidates_and_more_rows_are_added_to_those_drawn(tmp_path: Path) -> None:
    table, module = Table(40), TinyDescriber()
    small = Candidates(tmp_path, table, module, DRAWING, rows_per_shard=8)
    small.draw(16, 16, 64)
    assert module.drawn == 16 * 16
    large = Candidates(tmp_path, table, module, DRAWING, rows_per_shard=8)
    large.draw(32, 40, 64)
    assert module.drawn == 40 * 32, "not one text is drawn twice"
    fresh = Candidates(tmp_path / "fresh", table, TinyDescriber(), DRAWING, rows_per_shard=16)
    fresh.draw(32, 40, 5)
    assert large.texts(range(40), 32, 40) == fresh.texts(range(40), 32, 40)
    assert small.texts(range(16), 16, 16) == [row[:16] for row in fresh.texts(range(16), 32, 40)]
    part = Candidates(tmp_path, table, module, DRAWING, rows_per_shard=8)
    part.draw(20, 40, 64)
    assert module.drawn == 40 * 32, "a shorter last block is read from the whole one"
    assert part.texts([3], 20, 40)[0] == fresh.texts([3], 32, 40)[0][:20]


def test_anything_that_changes_texts_or_scores_changes_the_key(tmp_path: Path) -> None:
    table, module = Table(8), TinyDescriber()

    def folder(table: Table = table, module: TinyDescriber = module, drawing: Drawing = DRAWING) -> Path:
        return Candidates(tmp_path, table, module, drawing)._store(0, 16).folder

    others = [
        folder(Table(8, name="other")),
        folder(module=TinyDescriber(seed=1)),
        folder(drawing=Drawing(0.9, 3, 0)),
        folder(drawing=Drawing(1.0, 4, 0)),
        folder(drawing=Drawing(1.0, 3, 1)),
    ]
    assert len({folder(), *others}) == 6


def test_texts_about_other_rows_are_refused(tmp_path: Path) -> None:
    ours = Candidates(tmp_path, Table(8), TinyDescriber(), DRAWING)
    ours.draw(4, 8, 64)
    store = ours._store(0, 4)
    store.write(0, {"id": [f"x{i}" for i in range(8)], "texts": [["a"] * 4] * 8})
    with pytest.raises(ValueError, match="holds texts about 'x0' where the bank has 'd0:0': files of two runs were mixed"):
        ours.texts([0], 4, 8)


def test_memory_that_runs_out_halves_the_batch_and_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(tmp_path / "a")
    describe = TinyDescriber.describe

    def scarce(self: TinyDescriber, activations: Any, ids: Any, candidates: range, *rest: Any) -> Any:
        if len(ids) * len(candidates) > 5:
            raise torch.OutOfMemoryError("no memory")
        return describe(self, activations, ids, candidates, *rest)

    monkeypatch.setattr(TinyDescriber, "describe", scarce)
    sweep(tmp_path / "b")
    assert results_bytes(tmp_path / "a") == results_bytes(tmp_path / "b")


# ---------------------------------------------------------------------------------------------------------------- right numbers


def plain(table: Table, module: TinyDescriber, n: int) -> tuple[torch.Tensor, torch.Tensor, list[list[str]]]:
    """Targets, reconstructions (rows, n, d) by a loop, and texts."""
    texts = module.describe(table.activations, table.rows(range(len(table))).ids, range(n), 1.0, 3, 0)
    target = table.activations.double()
    vectors = [[module.reader.reconstruct([t])[0].double() if t else target.mean(0) for t in row] for row in texts]
    return target, torch.stack([torch.stack(row) for row in vectors]), texts


def test_curves_at_k_of_1_and_n_are_plain_means_and_minima(tmp_path: Path) -> None:
    table, module, n = Table(30), TinyDescriber(empty_share=0.2), 8
    done = run_stages(tmp_path, table, module, SweepPlan((1, 8), n, DRAWING))
    curves = Curves(done.scores, [1, 8], Resampling(0))
    target, vectors, texts = plain(table, module, n)
    errors = (target[:, None] - vectors).square().sum(2)
    best = vectors[torch.arange(30), errors.argmin(1)]
    estimate = curves.curves["best_of_k.in_loop"].estimate
    for name in ("mse", "fve", "fve_residual_centred", "r2_scalar_mean", "fve_directional"):
        assert float(estimate[name][1]) == pytest.approx(getattr(metrics, name)(target, best), abs=1e-6), name
    assert float(estimate["fve"][0]) == pytest.approx(1 - float(errors.mean(1).sum() / (target - target.mean(0)).square().sum()), abs=1e-9)
    means = vectors.mean(1)
    other = torch.tensor([row // 2 * 2 + 2 if row < 28 else 0 for row in range(30)])  # one group of 30: the next document's first row
    null = (target[:, None] - vectors[other]).square().sum(2)
    expected = 1 - null.min(1).values.sum() / (target - target.mean(0)).square().sum()
    assert float(curves.curves["null"].estimate["fve"][1]) == pytest.approx(float(expected), abs=1e-9)
    assert float(curves.curves["mean_of_k"].estimate["fve"][1]) == pytest.approx(metrics.fve(target, means), abs=1e-9)
    assert bool((done.scores.column("failed") == torch.tensor([[not t for t in row] for row in texts])).all())
    assert (estimate["fve"].diff() >= 0).all()
    held_out = curves.curves["best_of_k.held_out"].estimate["fve"][1]
    chosen = [row[i] for row, i in zip(texts, errors.argmin(1).tolist(), strict=True)]
    read = [module.other.reconstruct([t])[0].double() if t else target.mean(0) for t in chosen]
    assert float(held_out) == pytest.approx(metrics.fve(target, torch.stack(read)), abs=1e-6)


def test_empty_texts_score_as_the_mean_prediction_and_are_counted(tmp_path: Path) -> None:
    result = sweep(tmp_path, TinyDescriber(empty_share=1.0))
    assert result["run"]["failed_candidates"] == 40 * 8
    assert result["run"]["failed_greedy"] == 0
    assert result["curves"]["best_of_k.in_loop"]["fve"]["value"] == pytest.approx([0.0] * 4, abs=1e-12)


def test_partners_are_rows_of_other_documents() -> None:
    assert partners(["a", "a", "b", "c", "c", "c"]).tolist() == [2, 2, 3, 0, 0, 0]
    assert (partners(["a", "a"]) == -1).all()


def test_controls_without_a_second_document_are_absent_and_not_zero(tmp_path: Path) -> None:
    result = sweep(tmp_path, data=TableData(rows=6, per_document=6))
    assert "null" not in result["curves"]
    assert result["run"]["intervals"] is None
    assert result["results_by_k"][0]["variance_recovery_ci_lower"] is None


def test_fixed_groups_leave_no_row_without_a_control(tmp_path: Path) -> None:
    module, table = TinyDescriber(), Table(130, per_document=50)
    drawn, greedy = (Candidates(tmp_path, table, module, Drawing(t, 3, 0)) for t in (1.0, 0.0))
    for candidates, n in ((drawn, 2), (greedy, 1)):
        candidates.draw(n, 130, 64)
    scores = Scores(tmp_path / "scores", drawn, greedy, module.reconstructors, 2, 130, [1, 2])
    scores.score()
    assert sorted(scores.order) == list(range(130))
    assert not bool(scores.column("null").isnan().any())
    target, vectors, _ = plain(table, module, 2)
    torch.testing.assert_close(scores.column("error.in_loop"), (target[:, None] - vectors).square().sum(2))


def test_intervals_and_compatible_fields_are_there(tmp_path: Path) -> None:
    result = sweep(tmp_path)
    assert result["schema"] == SCHEMA
    theirs = {
        "k", "avg_mse", "variance_recovery", "variance_recovery_bias", "variance_recovery_bias_corrected", "variance_recovery_std",
        "variance_recovery_ci_lower", "variance_recovery_ci_upper", "variance_recovery_bca_ci_lower", "variance_recovery_bca_ci_upper",
        "mse_std", "mse_ci_lower", "mse_ci_upper", "r_squared", "r_squared_std", "r_squared_ci_lower", "r_squared_ci_upper",
        "total_positions", "original_variance", "original_mean", "mse_values", "activation_norms", "mse_for_new_variance",
        "mse_variance_recovery",
    }  # fmt: skip
    assert {"checkpoint_path", "eval_config", "results_by_k", "summary"} <= result.keys()
    for entry in result["results_by_k"]:
        assert theirs <= entry.keys()
        assert all(entry[name] is not None for name in theirs)
        assert entry["variance_recovery_ci_lower"] < entry["variance_recovery"] < entry["variance_recovery_ci_upper"]
        assert entry["fve_ci_lower"] < entry["fve"] < entry["fve_ci_upper"]
        assert len(entry["mse_values"]) == 40
    gain = result["gains"]["best_of_k.in_loop"]
    assert gain["value"][0] == 0
    assert all(low <= value <= high for low, value, high in zip(gain["ci_lower"], gain["value"], gain["ci_upper"], strict=True))
    without = sweep(tmp_path / "without", do_bootstrap=False)
    assert without["results_by_k"][0]["fve_ci_lower"] is None
    assert without["results_by_k"][0]["fve"] == result["results_by_k"][0]["fve"]
    frame = pd.read_parquet(tmp_path / "out" / "k_sweep_results.parquet")
    assert len(frame) == 40 * 9
    assert all(set(text) <= set(LETTERS) for text in frame["text"])


# ---------------------------------------------------------------------------------------------------------------- through Lightning


def test_checkpoints_and_temperatures_in_one_call_leave_the_module_as_it_was(tmp_path: Path) -> None:
    paths: list[str] = []
    for seed in (1, 2):
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=0)
        other = TinyDescriber(seed=seed)
        trainer.strategy.connect(other)
        paths.append(str(tmp_path / f"seed{seed}.ckpt"))
        trainer.save_checkpoint(paths[-1])
    module = TinyDescriber(seed=0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    states: list[torch.Tensor] = []
    for chosen in ([], paths):
        torch.manual_seed(5)
        sweep(tmp_path / f"{len(chosen)}", module, TableData(checkpoint=chosen), temperature=[0.7, 1.0], report=bool(chosen))
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "checkpoints must draw no global random number"
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    names = {path.name for path in (tmp_path / "2" / "out").glob("*-t*.json") if "timings" not in path.name}
    assert names == {f"k_sweep_results-seed{seed}-t{t}.json" for seed in (1, 2) for t in ("0.7", "1")}
    results = [json.loads((tmp_path / "2" / "out" / name).read_text()) for name in sorted(names)]
    assert [result["checkpoint_path"] for result in results] == [paths[0], paths[0], paths[1], paths[1]]
    alone = sweep(tmp_path / "alone", TinyDescriber(seed=2), temperature=0.7)
    assert alone["results_by_k"] == results[2]["results_by_k"]
    page = (tmp_path / "2" / "out" / "k_sweep_results.html").read_text()
    assert "<b>seed2-t0.7</b> minus seed1-t0.7" in page
    assert "n=40 activations of 20 documents, N=8 texts each; paired" in page
    differences = json.loads((tmp_path / "2" / "out" / "k_sweep_results.differences.json").read_text())["differences"]
    assert [(each["label"], each["role"]) for each in differences[:2]] == [("seed1-t1", "selects"), ("seed1-t1", "held out")]
    assert (tmp_path / "2" / "out" / "k_sweep_results.pdf").read_bytes().startswith(b"%PDF")


def test_validation_logs_curves_and_counts_validations(tmp_path: Path) -> None:
    callback = BestOfKCallback(
        k_values=[1, 2], cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path / "out"), bootstrap_replicates=10
    )
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[callback],
    )  # fmt: skip
    logged = trainer.validate(TinyDescriber(), datamodule=TableData(), verbose=False)[0]
    assert logged["validation/best_of_k/fve.best_of_k.in_loop@2"] > logged["validation/best_of_k/fve.best_of_k.in_loop@1"]
    assert "validation/best_of_k/fve.null@1" in logged
    assert callback.state_dict() == {"validations": 1}


def test_without_store_the_cache_is_neither_read_nor_written(tmp_path: Path) -> None:
    sweep(tmp_path, load_store=False)
    assert not (tmp_path / "cache").exists()
    assert (tmp_path / "best_of_k_stages" / "candidates").is_dir()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k_values": []}, "k_values"),
        ({"k_values": [2, 1]}, "ascending"),
        ({"k_values": [1, 8], "n_candidates": 4}, "best of 8 cannot be estimated from 4"),
        ({"temperature": 0.0}, "temperature 0"),
        ({"temperature": [1.0, 1.0]}, "distinct"),
        ({"output_file": "x.txt"}, r"\.json"),
        ({"bootstrap_replicates": 1}, "bootstrap"),
        ({"generation_batch_size": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BestOfKCallback(**settings)


def test_results_of_other_rows_or_k_cannot_stand_in_one_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = sweep(tmp_path / "a")
    other = sweep(tmp_path / "b", data=TableData(name="other"))
    check_comparable([one, one])
    with pytest.raises(ValueError, match="differ in bank"):
        check_comparable([one, other])
    with pytest.raises(ValueError, match="differ in k_values"):
        check_comparable([one, sweep(tmp_path / "c", k_values=[1, 2])])
    files = [str(tmp_path / name / "out" / "k_sweep_results.json") for name in "ab"]
    with pytest.raises(SystemExit) as stopped:
        draw_files([*files, "--out", str(tmp_path / "report")])
    assert stopped.value.code == 2
    assert "cannot be compared" in capsys.readouterr().err
    draw_files([files[0], files[0], "--out", str(tmp_path / "report")])
    assert (tmp_path / "report" / "k_sweep.png").stat().st_size > 10_000


def test_runs_are_named_apart() -> None:
    assert run_labels([], [1.0]) == {(None, 1.0): "t1"}
    assert list(run_labels(["/x/a/last.ckpt", "/x/b/last.ckpt"], [0.8]).values()) == ["a-t0.8", "b-t0.8"]
    assert list(run_labels(["a/1.ckpt", "b/2.ckpt"], [1.0]).values()) == ["a-1-t1", "b-2-t1"]
    assert list(run_labels(["runs/sft/talkative"], [0.5, 1.0]).values()) == ["talkative-t0.5", "talkative-t1"]


# ---------------------------------------------------------------------------------------------------------------- ranks


def ranks(folder: Path, count: int, rows: int) -> None:
    """Run the sweep on ``count`` processes that form a group."""
    folder.mkdir(exist_ok=True, parents=True)
    run_ranks([__file__, str(folder), str(count), str(rows)], folder, count)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_leave_the_bytes_of_one(tmp_path: Path) -> None:
    sweep(tmp_path / "one", data=TableData(rows=70))
    ranks(tmp_path / "two", 2, 70)
    assert results_bytes(tmp_path / "one") == results_bytes(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.distributed
def test_four_then_two_then_one_rank_over_one_cache_leave_the_bytes_of_one(tmp_path: Path) -> None:
    for count, rows in ((4, 40), (2, 70), (1, 100)):
        ranks(tmp_path / "shared", count, rows)
        sweep(tmp_path / f"alone-{rows}", data=TableData(rows=rows))
        assert results_bytes(tmp_path / "shared") == results_bytes(tmp_path / f"alone-{rows}"), count


def _one_rank(folder: str, count: str, rows: str) -> None:
    callback = BestOfKCallback(
        k_values=[1, 2, 4, 8],
        cache_dir=f"{folder}/cache",
        output_dir=f"{folder}/out",
        rows_per_shard=8,
        bootstrap_replicates=100,
        report=False,
    )
    trainer = pl.Trainer(
        accelerator="cpu", devices=int(count), strategy="ddp" if int(count) > 1 else "auto", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=[callback],
    )  # fmt: skip
    logged = trainer.test(TinyDescriber(empty_share=0.1), datamodule=TableData(rows=int(rows)), verbose=False)[0]
    assert math.isfinite(logged["test/best_of_k/fve.best_of_k.in_loop@8"])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _one_rank(*sys.argv[1:])
