"""Packing and corpora: nothing lost, every special token where it was asked for, and exact resumption."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict

from theodolite.datamodules.activations.documents import Document
from theodolite.datamodules.text.byte_tokenizer import ByteTokenizer
from theodolite.datamodules.text.documents import SavedDatasetDocuments, StringDocuments, SyntheticEnglish
from theodolite.datamodules.text.packing import PackedRows, Packing

TEXTS = ["abcdefg", "hij", "", "klmnopqrstuvwxyz", "ä", "01234567890123456789"]


def packed(repeat: bool = False, texts: list[str] = TEXTS, **settings: Any) -> PackedRows:
    return PackedRows(lambda: iter(StringDocuments(texts)), ByteTokenizer(), Packing(**settings), repeat)


def shown(row: Any) -> str:
    """Text with ^ for BOS, | for separators and _ for padding."""
    marks = {0: "_", 1: "^", 2: "|"}
    return "".join(marks[t] if t < 3 else bytes([t - 3]).decode("latin1") for t in row.tokens.tolist())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bos": "row"}, ["^abcdefg", "^|hij|kl", "^mnopqrs", "^tuvwxyz"]),
        ({"bos": "row", "separator": False}, ["^abcdefg", "^hijklmn", "^opqrstu"]),
        ({"bos": "document"}, ["^abcdefg", "|^hij|^k", "lmnopqrs", "tuvwxyz|"]),
        ({"bos": "none"}, ["abcdefg|", "hij|klmn", "opqrstuv"]),
        ({"bos": "row", "boundary": "break"}, ["^abcdefg", "^hij____", "^klmnopq", "^rstuvwx", "^yz_____"]),
        ({"bos": "document", "boundary": "break"}, ["^abcdefg", "^hij____", "^klmnopq", "rstuvwxy", "z_______"]),
    ],
    ids=str,
)
def test_rows_hold_the_documents_in_order_with_the_tokens_asked_for(settings: dict[str, Any], expected: list[str]) -> None:
    rows = list(packed(length=8, **settings))
    assert [shown(row) for row in rows[: len(expected)]] == expected
    assert [row.number for row in rows] == list(range(len(rows)))
    text = "".join(TEXTS).encode().decode("latin1")
    found = "".join(c for row in rows for c in shown(row)).replace("^", "").replace("|", "").replace("_", "")
    assert text.startswith(found)
    assert len(text) - len(found) < 8, "at most the last row's start is lost"


@pytest.mark.parametrize("boundary", ["flow", "break"])
@pytest.mark.parametrize("bos", ["row", "document", "none"])
def test_masks_and_document_numbers_fit_the_tokens(boundary: Any, bos: Any) -> None:
    for row in packed(length=6, boundary=boundary, bos=bos):
        assert torch.equal(row.begins, row.tokens == 1)
        assert torch.equal(row.separates, row.tokens == 2)
        assert torch.equal(row.attends, row.tokens != 0)
        for token, document in zip(row.tokens.tolist(), row.documents.tolist(), strict=True):
            if token >= 3:
                assert bytes([token - 3]) in TEXTS[document].encode()
        if boundary == "break":
            assert len({d for d in row.documents.tolist() if d >= 0}) == 1


@pytest.mark.parametrize("boundary", ["flow", "break"])
@pytest.mark.parametrize("at", [0, 1, 5, 17, 40])
def test_a_stream_resumes_at_any_row_also_over_repeated_passes(boundary: Any, at: int) -> None:
    whole = [shown(row) + str(row.number) for row in islice(packed(repeat=True, length=7, boundary=boundary), 60)]
    stream = packed(repeat=True, length=7, boundary=boundary)
    before = [shown(row) + str(row.number) for row in islice(stream, at)]
    state = json.loads(json.dumps(stream.state_dict()))
    again = packed(repeat=True, length=7, boundary=boundary)
    again.load_state_dict(state)
    assert before + [shown(row) + str(row.number) for row in islice(again, 60 - at)] == whole


def test_what_cannot_work_is_refused() -> None:
    class NoSpecial(ByteTokenizer):
        bos_token_id: int | None = None
        eos_token_id: int | None = None
        pad_token_id: int | None = None

    packings = {"bos: none": Packing(), "separator: false": Packing(bos="none"), "flow": Packing(bos="none", boundary="break")}
    for advice, packing in packings.items():
        with pytest.raises(ValueError, match=advice):
            PackedRows(lambda: iter([Document("0", "a")]), NoSpecial(), packing)
    with pytest.raises(ValueError, match="at least 2"):
        Packing(length=1)
    with pytest.raises(ValueError, match="boundary"):
        Packing(boundary="overlap")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no document"):
        next(PackedRows(lambda: iter([]), ByteTokenizer(), Packing(), repeat=True))
    with pytest.raises(ValueError, match="at least one"):
        StringDocuments([])


def test_saved_datasets_are_read_in_order_and_wrong_ones_refused(tmp_path: Path) -> None:
    DatasetDict({"train": Dataset.from_dict({"body": ["x", "y"]})}).save_to_disk(str(tmp_path / "d"))
    source = SavedDatasetDocuments(str(tmp_path / "d"), "train", "body")
    assert [(document.id, document.text) for document in source] == [("0", "x"), ("1", "y")]
    assert source.identity() == SavedDatasetDocuments(str(tmp_path / "d"), "train", "body").identity()
    for arguments, message in ((("nowhere",), "does not exist"), (("d", "test", "body"), "splits"), (("d", "train"), "columns")):
        with pytest.raises(ValueError, match=message):
            SavedDatasetDocuments(str(tmp_path / arguments[0]), *arguments[1:])


def test_synthetic_english_is_a_function_of_seed_and_number_and_reads_like_sentences() -> None:
    first = [document.text for document in SyntheticEnglish(4)]
    assert first == [document.text for document in islice(iter(SyntheticEnglish(9)), 4)]
    assert len(set(first)) == 4
    assert first != [document.text for document in SyntheticEnglish(4, seed=1)]
    assert SyntheticEnglish(4).identity() == SyntheticEnglish(9).identity() != SyntheticEnglish(4, seed=1).identity()
    for text in first:
        assert text.count(".") == 12
        assert all(sentence[0].isupper() for sentence in text.split(". "))
        assert " one " not in text or "one horses" not in text
