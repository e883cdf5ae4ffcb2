"""Rows on disk: written by any number of processes, extended, read by number, never believed when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from theodolite.row_shards import MANIFEST, DamagedShardError, Field, RowShards

FIELDS = {"activation": Field("float32", (3,)), "half": Field("bfloat16", (2,)), "position": Field("int32"), "document": Field("json")}
KEY = {"model": "tiny", "settings": {"layer": 2, "names": ["a", "b"]}}


def columns(rows: range) -> dict:
    numbers = np.array(rows)
    return {
        "activation": (numbers[:, None] + np.array([0.0, 0.25, 0.5])).astype("float32"),
        "half": torch.tensor(numbers)[:, None].expand(-1, 2).to(torch.bfloat16),
        "position": numbers.astype("int32"),
        "document": [f"d{number} é" for number in rows],
    }


def fill(root: Path, rows: int, shards: list[int] | None = None, per_shard: int = 4) -> RowShards:
    store = RowShards(root, KEY, FIELDS, per_shard)
    for shard in store.missing(rows) if shards is None else shards:
        store.write(shard, columns(range(shard * per_shard, min(rows, (shard + 1) * per_shard))))
    return store


def test_rows_come_back_by_global_number_in_any_order(tmp_path: Path) -> None:
    store = fill(tmp_path, 10)
    wanted = [9, 0, 5, 5, 3]
    assert len(store) == 10
    assert store.tensor("activation", wanted)[:, 1].tolist() == [9.25, 0.25, 5.25, 5.25, 3.25]
    assert store.tensor("half", wanted).dtype == torch.bfloat16
    assert store.tensor("half", torch.tensor(wanted))[:, 0].tolist() == [9, 0, 5, 5, 3]
    assert store.tensor("position", slice(2, None, 3)).tolist() == [2, 5, 8]
    assert store.items("document", wanted) == ["d9 é", "d0 é", "d5 é", "d5 é", "d3 é"]
    assert isinstance(store.column("activation", 0), np.memmap)
    assert store.tensor("activation", []).shape == (0, 3)
    with pytest.raises(IndexError, match="no row 10"):
        store.tensor("activation", [10])
    with pytest.raises(IndexError, match="count from 0"):
        store.tensor("activation", [-1])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_writers_leaves_the_same_files(tmp_path: Path, ranks: int) -> None:
    fill(tmp_path / "one", 18)
    for rank in range(ranks):
        store = RowShards(tmp_path / "many", KEY, FIELDS, 4)
        fill(tmp_path / "many", 18, list(range(5))[rank::ranks])
    store = RowShards(tmp_path / "many", KEY, FIELDS, 4)
    one = {path.name: path.read_bytes() for path in (tmp_path / "one").rglob("*.*") if path.is_file()}
    assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == one


def test_store_is_extended_in_place_and_a_subset_is_usable_at_once(tmp_path: Path) -> None:
    store = fill(tmp_path, 6)
    assert store.missing(6) == []
    assert store.missing(5) == []
    assert store.missing(14) == [1, 2, 3], "the short last shard has to be written again, the full one not"
    first = (store.folder / "000000.activation.npy").stat().st_mtime_ns
    fill(tmp_path, 14)
    assert (store.folder / "000000.activation.npy").stat().st_mtime_ns == first
    assert len(store) == 14
    assert store.tensor("position", range(14)).tolist() == list(range(14))


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no record"])
def test_damaged_shard_is_detected_and_rebuilt(tmp_path: Path, damage: str) -> None:
    store = fill(tmp_path, 12)
    path = store.folder / "000001.activation.npy"
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-8])
    elif damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        path.unlink()
    else:
        (store.folder / "000001.shard.json").unlink()
    again = RowShards(tmp_path, KEY, FIELDS, 4)
    assert again.missing(12) == [1]
    assert len(again) == 4
    with pytest.raises(DamagedShardError):
        again.tensor("activation", [5])
    assert again.tensor("position", [0, 11]).tolist() == [0, 11]
    fill(tmp_path, 12)
    assert path.read_bytes() == content
    assert again.missing(12) == []


def test_same_process_sees_a_later_truncation(tmp_path: Path) -> None:
    store = fill(tmp_path, 4)
    assert store.missing(4) == []
    path = store.folder / "000000.position.npy"
    path.write_bytes(path.read_bytes()[:-4])
    assert store.missing(4) == [0]


def test_interrupted_write_is_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(tmp_path, 4)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("theodolite.row_shards.write_json_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            store.write(1, columns(range(4, 8)))
    assert store.missing(8) == [1]
    assert not list(store.folder.glob(".*")), "temporary files must not stay"


def test_another_key_is_another_store_and_a_manifest_that_differs_is_refused(tmp_path: Path) -> None:
    store = fill(tmp_path, 4)
    other = RowShards(tmp_path, KEY | {"model": "other"}, FIELDS, 4)
    assert other.folder != store.folder
    assert other.missing(4) == [0]
    manifest = json.loads((store.folder / MANIFEST).read_text())
    (store.folder / MANIFEST).write_text(json.dumps(manifest | {"key": manifest["key"] | {"model": "renamed"}}))
    with pytest.raises(ValueError, match=r"key\.model = 'renamed', this run has 'tiny'"):
        RowShards(tmp_path, KEY, FIELDS, 4)
    (store.folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"fields\.position"):
        RowShards(tmp_path, KEY, FIELDS | {"position": Field("int64")}, 4)


def test_existing_store_keeps_its_layout(tmp_path: Path) -> None:
    folder = fill(tmp_path, 10).folder
    assert RowShards(tmp_path, KEY, FIELDS, 1024).rows_per_shard == 4
    found = RowShards.existing(folder)
    assert (found.rows_per_shard, found.fields, found.key, len(found)) == (4, FIELDS, KEY, 10)
    with pytest.raises(FileNotFoundError, match="holds no manifest"):
        RowShards.existing(tmp_path)
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="renamed or edited"):
        RowShards.existing(moved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": np.zeros(2, "int32")}, "one length"),
        ({"position": np.zeros(4, "int64")}, "'position'"),
        ({"activation": np.zeros((4, 2), "float32")}, "'activation'"),
        ({"activation": [1.0] * 4}, "'activation'"),
        ({"extra": [0] * 4}, "needs the columns"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    store = RowShards(tmp_path, KEY, FIELDS, 4)
    with pytest.raises(ValueError, match=message):
        store.write(0, columns(range(4)) | change)
    with pytest.raises(ValueError, match="cannot be stored"):
        Field("object")


def test_nothing_is_pickled(tmp_path: Path) -> None:
    store = fill(tmp_path, 4)
    assert {path.suffix for path in store.folder.iterdir()} == {".npy", ".json"}
    with pytest.raises(ValueError, match="'activation'"):
        store.write(1, columns(range(4, 8)) | {"activation": np.array([[object()] * 3] * 4)})
