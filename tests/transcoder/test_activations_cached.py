"""Activations on disk: the values of a forward pass, written in parts by any number of ranks, and read in the same order by any number."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_language_models import FAMILIES

from theodolite.datamodules.activations.cached import CachedActivationDataModule, ShardCursor
from theodolite.datamodules.activations.paired_rows import DROPS, PairProducer, numbers_of
from theodolite.datamodules.text.byte_tokenizer import ByteTokenizer
from theodolite.datamodules.text.documents import SyntheticEnglish
from theodolite.datamodules.text.packing import PackedRows, Packing
from theodolite.sites import collect_sites

GEMMA: dict[str, Any] = {key: value for key, value in FAMILIES["gemma2"].items() if key != "vocab_size"}


def data(folder: Path, rank: int = 0, ranks: int = 1, **settings: Any) -> CachedActivationDataModule:
    small: dict[str, Any] = {
        "cache_dir": str(folder), "train_rows": 100, "rows_per_shard": 32, "model": GEMMA, "tokenizer": "bytes",
        "text": SyntheticEnglish(100, sentences=2), "input_site": "mlp_in.1", "target_site": "mlp_out.1", "global_batch_size": 16,
        "lanes": 4, "buffer_rows": 16, "model_batch_rows": 4, "packing": Packing(length=12, boundary="break"), "validation_rows": 5,
        "validation_share": 0.2, "test_share": 0.2, "test_rows": 4, "seed": 3,
    }  # fmt: skip
    source = CachedActivationDataModule(**(small | settings))
    source._world = lambda: (rank, ranks)  # what a Trainer would say
    return source


def batches(source: CachedActivationDataModule, split: str = "train") -> list[dict[str, torch.Tensor]]:
    loaders = {"train": source.train_dataloader, "validation": source.val_dataloader, "test": source.test_dataloader}
    return [dict(batch) for batch in loaders[split]()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_rows_are_those_of_a_forward_pass_in_stream_order(tmp_path: Path, dtype: str) -> None:
    source = data(tmp_path, dtype=dtype)
    source.setup("fit")
    assert not source.model.loaded, "the model's memory is given back"
    store = source.store("train")
    assert len(store) == 100
    rows = [row for row, _ in zip(source._packed("train"), range(40), strict=False)]
    expected = numbers_of(rows, source.drop)
    assert torch.equal(store.tensor("row", range(100)), expected.row[:100])
    assert torch.equal(store.tensor("token", range(100)).long(), expected.token[:100])
    for index in range(0, 100, 9):
        row, position = rows[int(expected.row[index]) // 12], int(expected.position[index])
        mask = row.attends[None].long()
        found = collect_sites(source.producer, [source.target_site], input_ids=row.tokens[None], attention_mask=mask)
        tolerance = 1e-5 if dtype == "float32" else 0.05
        reference = found[source.target_site][0, position]
        torch.testing.assert_close(store.tensor("target", [index])[0], reference, rtol=tolerance, atol=tolerance)


def test_an_epoch_is_every_row_once_and_the_same_global_batches_on_two_ranks(tmp_path: Path) -> None:
    whole = data(tmp_path)
    whole.setup("fit")
    one = batches(whole)
    ranks = [batches(data(tmp_path, rank, 2)) for rank in range(2)]
    assert len(one) == 6, "the seventh batch would be short"
    for step, batch in enumerate(one):
        for rank in range(2):
            assert all(torch.equal(batch[name][rank::2], ranks[rank][step][name]) for name in batch)
    rows = torch.cat([batch["row"] for batch in one])
    assert len(rows.unique()) == 96
    assert not torch.equal(rows, rows.sort().values)
    whole.setup("test")
    for split in ("validation", "test"):
        held_out = torch.cat([batch["row"] for batch in batches(whole, split)])
        assert torch.equal(held_out, numbers_of(whole._held_out_rows(split), whole.drop).row)


def test_only_what_is_missing_is_written_again_and_more_rows_extend_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data(tmp_path)
    first.setup("fit")
    before = first.store("train").tensor("input", range(100))
    shard = sorted(first.store("train").folder.glob("000001.input.npy"))[0]
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\1")
    assert first.store("train").missing(100) == [1]
    rows: list[int] = []
    real = PairProducer._forward
    monkeypatch.setattr(PairProducer, "_forward", lambda self, part: rows.extend(row.number for row in part) or real(self, part))
    data(tmp_path).setup("fit")
    assert torch.equal(first.store("train").tensor("input", range(100)), before)
    again, rows[:] = len(rows), []
    assert again < 12, "one shard of 32 rows, not all"
    data(tmp_path, train_rows=150).setup("fit")
    longer = first.store("train")
    assert len(longer) == 150
    assert torch.equal(longer.tensor("input", range(96)), before[:96])
    torch.testing.assert_close(longer.tensor("input", range(96, 100)), before[96:])
    data(tmp_path, train_rows=64).setup("fit")
    other = data(tmp_path, input_site="resid_mid.1")
    assert other.store("train").folder != longer.folder


@pytest.mark.parametrize("boundary", ["flow", "break"])
@pytest.mark.parametrize("shards", [[0, 1, 2, 3, 4], [1, 3], [4], [0, 2, 4]], ids=str)
def test_a_cursor_finds_the_token_rows_of_any_ascending_shards(boundary: Any, shards: list[int]) -> None:
    drop: Any = list(DROPS)

    def text() -> PackedRows:
        return PackedRows(lambda: iter(SyntheticEnglish(30, sentences=2)), ByteTokenizer(), Packing(length=10, boundary=boundary))

    every = numbers_of(list(text()), drop).row
    cursor = ShardCursor(text(), drop, 13)
    for shard in shards:
        token_rows, skipped = cursor.token_rows(shard, 13)
        found = numbers_of(token_rows, drop).row[skipped : skipped + 13]
        assert torch.equal(found, every[shard * 13 : shard * 13 + 13])
    with pytest.raises(ValueError, match="after a later one"):
        cursor.token_rows(0, 13)


def test_too_little_text_and_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower data"):
        data(tmp_path, train_rows=3000, rows_per_shard=1000, text=SyntheticEnglish(10, sentences=2), validation_rows=1).setup("fit")
    with pytest.raises(ValueError, match="global_batch_size=16"):
        data(tmp_path, train_rows=3)
