"""Activation banks: the right values at the right addresses, whatever the batch, and never those of another model, site or corpus."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_producers import model, save_corpus, save_producer, texts

from theodolite.datamodules.activations.bank import ActivationBank
from theodolite.datamodules.activations.bank_datamodule import ActivationBankDataModule, checkpoint_files
from theodolite.datamodules.activations.bank_producer import ActivationProducer
from theodolite.datamodules.activations.documents import DocumentSplit, FileDocuments
from theodolite.datamodules.activations.positions import PositionPolicy
from theodolite.protocols import ActivationTable, ActivationTables

POLICY = PositionPolicy(num_positions=3, min_position=4)


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_producer(tmp_path_factory.mktemp("producer"))


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return save_corpus(tmp_path / "corpus.jsonl", [*texts(20), "the cat", *texts(4, words=3, seed=1)])


def bank(producer: str, corpus: str, folder: Path, **changes: Any) -> ActivationBank:
    settings: dict[str, Any] = {"site": "resid_post.0", "policy": POLICY, "batch_size": 4, "rows_per_shard": 8, "id_field": "id"} | changes
    reader = ActivationProducer(producer, settings.pop("site"), max_tokens=settings.pop("max_tokens", 64))
    source = FileDocuments(corpus, id_field=settings.pop("id_field"))
    return ActivationBank(reader, source, settings.pop("policy"), cache_dir=folder / "banks", **settings)


def test_rows_are_the_models_states_at_their_addresses(producer: str, corpus: str, tmp_path: Path) -> None:
    built = bank(producer, corpus, tmp_path)
    built.build()
    assert isinstance(built, ActivationTable)
    rows = built.rows(range(len(built)))
    documents = {document.id: document.text for document in built.source}
    assert len(built) > 50
    for row, (row_id, document) in enumerate(zip(rows.ids, rows.documents, strict=True)):
        position = int(row_id.split(":")[1])
        assert row_id == f"{document}:{position}"
        tokens = built.producer.tokens(documents[document])
        assert position >= 4
        with torch.no_grad():
            expected = model()(torch.tensor([tokens]), output_hidden_states=True).hidden_states[1][0, position]
        torch.testing.assert_close(rows.activations[row], expected, atol=1e-5, rtol=1e-5)
        assert rows.texts[row] in documents[document]
    assert len(set(rows.ids)) == len(rows.ids)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_rows_do_not_depend_on_the_extraction_batch(producer: str, corpus: str, tmp_path: Path, batch_size: int) -> None:
    first, other = bank(producer, corpus, tmp_path / "a"), bank(producer, corpus, tmp_path / "b", batch_size=batch_size)
    first.build()
    other.build()
    one, two = (each.rows(range(len(each))) for each in (first, other))
    assert one.ids == two.ids
    torch.testing.assert_close(one.activations, two.activations, atol=1e-5, rtol=1e-5)


def test_complete_bank_needs_neither_model_nor_corpus_and_serves_subsets(
    producer: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bank(producer, corpus, tmp_path)
    whole.build()
    assert not whole.producer.loaded, "the model's memory is given back"
    monkeypatch.setattr(ActivationProducer, "load", lambda *_: pytest.fail("the model was loaded although the bank is complete"))
    monkeypatch.setattr(ActivationBank, "plan", lambda _: pytest.fail("the corpus was tokenised although the bank is complete"))
    for max_rows, expected in ((None, len(whole)), (10, 10), (10_000, len(whole))):
        again = bank(producer, corpus, tmp_path, max_rows=max_rows)
        again.build()
        assert len(again) == expected
        assert again.rows(range(5)).ids == whole.rows(range(5)).ids
        assert again.key == whole.key


def test_bank_is_extended_in_place(producer: str, corpus: str, tmp_path: Path) -> None:
    small = bank(producer, corpus, tmp_path, max_rows=12)
    small.build()
    kept = small.store.folder / "000000.activation.npy"
    written = kept.stat().st_mtime_ns
    large = bank(producer, corpus, tmp_path, max_rows=30)
    large.build()
    assert kept.stat().st_mtime_ns == written
    assert large.store.folder == small.store.folder
    fresh = bank(producer, corpus, tmp_path / "fresh", max_rows=30)
    fresh.build()
    assert large.rows(range(30)).ids == fresh.rows(range(30)).ids
    torch.testing.assert_close(large.rows(range(30)).activations, fresh.rows(range(30)).activations)


def test_truncated_shard_is_rebuilt(producer: str, corpus: str, tmp_path: Path) -> None:
    built = bank(producer, corpus, tmp_path)
    built.build()
    path = built.store.folder / "000002.activation.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    bank(producer, corpus, tmp_path).build()
    assert path.read_bytes() == content


def test_bank_of_anything_else_is_never_reused(producer: str, corpus: str, tmp_path: Path) -> None:
    other_model = save_producer(tmp_path / "other", seed=1)
    other_corpus = save_corpus(tmp_path / "other.jsonl", texts(21, seed=5))
    folders = {
        name: bank(*(pair or (producer, corpus)), tmp_path, **changes).store.folder
        for name, pair, changes in (
            ("first", None, {}),
            ("model", (other_model, corpus), {}),
            ("corpus", (producer, other_corpus), {}),
            ("site", None, {"site": "mlp_in.0"}),
            ("layer", None, {"site": "resid_post.1"}),
            ("window", None, {"max_tokens": 32}),
            ("dtype", None, {"dtype": "bfloat16"}),
            ("split", None, {"split": DocumentSplit(0.2, 0.2)}),
            ("seed", None, {"policy": PositionPolicy(num_positions=3, min_position=4, seed=1)}),
            ("count", None, {"policy": PositionPolicy(num_positions=2, min_position=4)}),
            ("first position", None, {"policy": PositionPolicy(num_positions=3, min_position=5)}),
            ("strategy", None, {"policy": PositionPolicy("midpoint", 1, 4)}),
        )
    }
    assert len(set(folders.values())) == len(folders)
    copy = Path(save_producer(tmp_path / "copy"))
    moved = save_corpus(tmp_path / "moved.jsonl", [d.text for d in FileDocuments(corpus, id_field="id")])
    assert bank(str(copy), moved, tmp_path).store.folder == folders["first"], "where things lie must not matter"


def test_short_documents_and_short_windows(producer: str, corpus: str, tmp_path: Path) -> None:
    built = bank(producer, corpus, tmp_path, policy=PositionPolicy(num_positions=1000, min_position=4))
    plan = built.plan()
    assert plan.without_rows >= 1, "'the cat' has no position 4"
    assert all(positions == list(range(4, len(tokens))) for (_, tokens), positions in zip(plan.documents, plan.positions, strict=True))
    with pytest.raises(ValueError, match="No document of the test split has a position from 500 on"):
        bank(producer, corpus, tmp_path, policy=PositionPolicy(min_position=500)).build()


def test_positions_are_distinct_keyed_by_the_document_and_skip_special_tokens() -> None:
    tokens = list(range(100, 120))
    policy = PositionPolicy(num_positions=5, min_position=8, seed=3)
    found = policy.positions("d", tokens)
    assert found == sorted(set(found))
    assert len(found) == 5
    assert min(found) >= 8
    assert found == policy.positions("d", tokens)
    assert found != policy.positions("e", tokens)
    assert set(PositionPolicy(num_positions=3, min_position=8, seed=3).positions("d", tokens)) < set(found), "fewer are a subset of more"
    assert policy.positions("d", tokens[:8]) == []
    assert policy.positions("d", tokens[:10]) == [8, 9]
    assert policy.positions("d", tokens, special=set(tokens[8:])) == []
    assert PositionPolicy("midpoint", 1, 8).positions("d", tokens) == [13]
    assert PositionPolicy("midpoint", 1, 8).positions("d", tokens[:9]) == [8]
    counts = torch.zeros(20)
    for i in range(2000):
        counts[PositionPolicy(num_positions=1, min_position=8).positions(f"d{i}", tokens)] += 1
    assert counts[:8].sum() == 0
    assert (counts[8:] > 110).all(), "every position of the window is as likely as the others"
    wrong: dict[str, Any]
    for wrong in ({"strategy": "first"}, {"num_positions": 0}, {"min_position": -1}, {"strategy": "midpoint", "num_positions": 2}):
        with pytest.raises(ValueError, match="position"):
            PositionPolicy(**wrong)


def test_duplicate_document_ids_are_refused(producer: str, tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"id": "same", "text": text}) + "\n" for text in texts(2)))
    with pytest.raises(ValueError, match="Two documents of the corpus are called 'same'"):
        bank(producer, str(path), tmp_path).build()


def test_large_norms_are_left_out_and_counted(producer: str, corpus: str, tmp_path: Path) -> None:
    whole = bank(producer, corpus, tmp_path)
    whole.build()
    norms = whole.rows(range(len(whole))).activations.double().norm(dim=1)
    limit = float(norms.median())
    part = bank(producer, corpus, tmp_path, max_norm=limit)
    part.build()
    assert part.left_out == int((norms > limit).sum()) > 0
    assert len(part) + part.left_out == len(whole)
    assert part.key != whole.key
    assert float(part.rows(range(len(part))).activations.double().norm(dim=1).max()) <= limit


def test_memory_that_runs_out_halves_the_batch_and_keeps_the_rows(
    producer: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = bank(producer, corpus, tmp_path / "a", batch_size=8)
    plain.build()
    extract = ActivationProducer.extract

    def scarce(self: ActivationProducer, documents: Any, device: Any) -> Any:
        if len(documents) > 2:
            raise torch.OutOfMemoryError("no memory")
        return extract(self, documents, device)

    monkeypatch.setattr(ActivationProducer, "extract", scarce)
    tight = bank(producer, corpus, tmp_path / "b", batch_size=8)
    tight.build()
    assert tight.rows(range(len(tight))).ids == plain.rows(range(len(plain))).ids
    torch.testing.assert_close(tight.rows(range(9)).activations, plain.rows(range(9)).activations, atol=1e-5, rtol=1e-5)


def test_datamodule_offers_disjoint_splits_and_batches(producer: str, corpus: str, tmp_path: Path) -> None:
    data = ActivationBankDataModule(
        producer, "resid_post.0", corpus, cache_dir=str(tmp_path / "banks"), min_position=4, num_positions=2, validation_share=0.3,
        test_share=0.3, global_batch_size=4, eval_batch_size=5,
    )  # fmt: skip
    assert isinstance(data, ActivationTables)
    splits = {name: data.table(name) for name in ("train", "validation", "test")}
    documents = {name: set(table.rows(range(len(table))).documents) for name, table in splits.items()}
    assert sum(map(len, documents.values())) == len(set.union(*documents.values())) > 20
    ids = [row_id for batch in data.test_dataloader() for row_id in batch.ids]
    assert ids == list(splits["test"].rows(range(len(splits["test"]))).ids)
    batches = list(data.train_dataloader())
    assert all(batch.activations.shape == (4, 16) for batch in batches)


def test_checkpoints_are_files_or_patterns(tmp_path: Path) -> None:
    for name in ("b.ckpt", "a.ckpt"):
        (tmp_path / name).touch()
    assert checkpoint_files(None) == []
    assert checkpoint_files([f"{tmp_path}/*.ckpt", f"{tmp_path}/b.ckpt"]) == [f"{tmp_path}/a.ckpt", f"{tmp_path}/b.ckpt"]
    with pytest.raises(ValueError, match="there is no checkpoint"):
        checkpoint_files(f"{tmp_path}/c*.ckpt")
    with pytest.raises(ValueError, match=r"holds no talkative\.json"):
        checkpoint_files(str(tmp_path))


def test_a_bank_has_one_name_before_and_after_its_tokenizer_was_used(producer: str) -> None:
    reader = ActivationProducer(producer, "resid_post.0", max_tokens=5)
    before = reader.identity()
    assert len(reader.tokens("the cat sat on the mat and then went on for many more words")) == 5
    assert reader.identity() == before
