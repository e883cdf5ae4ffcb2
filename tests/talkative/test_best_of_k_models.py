"""A whole sweep of language models of real architectures: how many texts stay the same when batches and ranks change.

Logits of other batches differ in their last bits, and a sampled token may turn on them. Run with ``-s`` it reports how many texts did::

    python -m pytest -s -m slow tests/talkative/test_best_of_k_models.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from tiny_talkative import MODELS, data, made, save_target  # noqa: E402
from warm_processes import run_ranks  # noqa: E402

from theodolite.callbacks.best_of_k import BestOfKCallback  # noqa: E402
from theodolite.datamodules.toy.talkative import ToyCorpus  # noqa: E402
from theodolite.lightning_modules.talkative import TalkativeModule  # noqa: E402
from theodolite.lightning_modules.talkative.settings import ReconstructorSettings  # noqa: E402

ROWS, CANDIDATES, LENGTH = 64, 16, 4


def sweep(folder: Path, kind: str, rows: int = ROWS, batch: int = 64, ranks: int = 1) -> None:
    """Test a random talkative autoencoder of an architecture over the bank beside ``folder``; results go to ``folder/out``."""
    target = str(folder.parent / "target")
    module = made(TalkativeModule, target, held_out=ReconstructorSettings(model=MODELS[kind], suffix="<read>", seed=1))
    corpus = {"documents": ToyCorpus(documents=200), "test_share": 0.4, "test_rows": rows}
    source = data(target, folder.parent / "banks", **corpus)
    callback = BestOfKCallback(
        k_values=[1, 4, CANDIDATES], generation_batch_size=batch, rows_per_shard=8, bootstrap_replicates=50, report=False, seed=5,
        max_new_tokens=LENGTH, cache_dir=str(folder / "cache"), output_dir=str(folder / "out"),
    )  # fmt: skip
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy = "ddp" if ranks > 1 else "auto"
    pl.Trainer(accelerator="cpu", devices=ranks, strategy=strategy, default_root_dir=folder, callbacks=[callback], **quiet).test(
        module, datamodule=source, verbose=False
    )


def compared(one: Path, other: Path) -> tuple[int, int, float]:
    """Texts that differ, texts in all, and the largest difference of any metric; fails where the rows differ."""
    frames = [pd.read_parquet(folder / "out" / "k_sweep_results.parquet") for folder in (one, other)]
    assert frames[0]["id"].tolist() == frames[1]["id"].tolist()
    assert frames[0]["candidate"].tolist() == frames[1]["candidate"].tolist()
    curves = [json.loads((folder / "out" / "k_sweep_results.json").read_text())["curves"] for folder in (one, other)]
    values = [[v for metrics in each.values() for metric in metrics.values() for v in metric["value"]] for each in curves]
    difference = (torch.tensor(values[0], dtype=torch.float64) - torch.tensor(values[1], dtype=torch.float64)).abs().max()
    texts = [frame["text"].tolist() for frame in frames]
    return sum(ours != theirs for ours, theirs in zip(*texts, strict=True)), len(texts[0]), float(difference)


def launch(folder: Path, ranks: int, kind: str, rows: int) -> None:
    folder.mkdir(exist_ok=True)
    run_ranks([__file__, str(folder), str(ranks), kind, str(rows)], folder, ranks, seconds=600)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_batches_and_ranks_leave_the_texts_of_a_language_model_alone(tmp_path: Path, kind: str) -> None:
    save_target(tmp_path / "target", kind)
    reference = tmp_path / "reference"
    sweep(reference, kind)
    for batch in (1, 7):
        sweep(tmp_path / f"batch {batch}", kind, batch=batch)
    launch(tmp_path / "2 ranks", 2, kind, ROWS)
    for ranks, rows in ((4, 16), (2, 40)):
        launch(tmp_path / "4, 2, 1 ranks", ranks, kind, rows)
    sweep(tmp_path / "4, 2, 1 ranks", kind)
    assert len(set(pd.read_parquet(reference / "out" / "k_sweep_results.parquet")["text"])) > ROWS, "the texts are no constant"
    for name in ("batch 1", "batch 7", "2 ranks", "4, 2, 1 ranks"):
        turned, texts, difference = compared(reference, tmp_path / name)
        print(f"{kind}, {name}: {texts - turned} of {texts} texts the same, metrics within {difference:.1e}")
        assert turned <= 0.001 * texts
        assert difference <= (1e-3 if turned else 1e-9)


if __name__ == "__main__":
    where, count, architecture, number = sys.argv[1:]
    sweep(Path(where), architecture, int(number), batch=16, ranks=int(count))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
