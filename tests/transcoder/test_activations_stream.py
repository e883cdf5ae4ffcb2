"""The shuffled stream: every row once, the same batches on any number of ranks, exact resumption, real mixing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from theodolite.datamodules.activations.loaders import Background
from theodolite.datamodules.activations.paired_rows import DROPS, PairedRows, numbers_of
from theodolite.datamodules.activations.shuffled_lanes import ShuffledLanes
from theodolite.datamodules.text.byte_tokenizer import ByteTokenizer
from theodolite.datamodules.text.documents import SyntheticEnglish
from theodolite.datamodules.text.packing import PackedRows, Packing, TokenRow

DROP: Any = list(DROPS)


def produce(rows: Sequence[TokenRow]) -> PairedRows:
    """Activations that say which row they are."""
    numbers = numbers_of(rows, DROP)
    return PairedRows(numbers.row, numbers.position, numbers.token, numbers.row.float()[:, None] * 2, numbers.row.float()[:, None] * 3)


def lanes(
    rank: int = 0, ranks: int = 1, documents: int = 60, repeat: bool = True, boundary: str = "break", **settings: Any
) -> ShuffledLanes:
    packing = Packing(length=16, boundary=boundary)  # type: ignore[arg-type]
    text = PackedRows(lambda: iter(SyntheticEnglish(documents, sentences=3)), ByteTokenizer(), packing, repeat)
    return ShuffledLanes(text, produce, 4, rank, ranks, 32, DROP, 7, **settings)


def global_batch(streams: list[ShuffledLanes], size: int) -> torch.Tensor:
    """Row numbers of a global batch, put together from the ranks' shares by slot."""
    shares = [stream.take(size) for stream in streams]
    for share in shares:
        assert share.input is not None
        assert share.target is not None
        assert torch.equal(share.input[:, 0], share.row * 2.0)
        assert torch.equal(share.target[:, 0], share.row * 3.0)
    slots = torch.zeros(size, dtype=torch.int64)
    for rank, share in enumerate(shares):
        slots[rank :: len(shares)] = share.row
    return slots


@pytest.mark.parametrize("boundary", ["flow", "break"])
def test_global_batches_are_the_same_on_1_2_and_4_ranks(boundary: str) -> None:
    runs = {ranks: [lanes(rank, ranks, boundary=boundary) for rank in range(ranks)] for ranks in (1, 2, 4)}
    for _ in range(30):
        batches = {ranks: global_batch(streams, 40) for ranks, streams in runs.items()}
        assert torch.equal(batches[1], batches[2])
        assert torch.equal(batches[1], batches[4])


def until_the_end(stream: ShuffledLanes) -> Iterator[PairedRows]:
    while True:
        try:
            yield stream.take(4)
        except StopIteration:
            return


@pytest.mark.parametrize("boundary", ["flow", "break"])
def test_every_row_comes_once_and_at_most_a_window_late(boundary: str) -> None:
    rows = torch.cat([part.row for part in until_the_end(lanes(repeat=False, boundary=boundary))])
    assert len(rows.unique()) == len(rows)
    every = list(PackedRows(lambda: iter(SyntheticEnglish(60, sentences=3)), ByteTokenizer(), Packing(length=16, boundary=boundary)))  # type: ignore[arg-type]
    wanted = numbers_of(every, DROP).row
    assert {*rows.tolist()} <= {*wanted.tolist()}
    old = wanted[wanted < (len(every) - 3 * 32) * 16]
    assert {*old.tolist()} <= {*rows.tolist()}, "only the last windows may be left when the text ends"
    lag = torch.arange(len(rows)) - torch.searchsorted(wanted, rows)
    assert float(lag.abs().max()) < 2 * 32 * 15


def test_neighbours_in_a_batch_come_from_many_places() -> None:
    stream = lanes(boundary="flow")
    for _ in range(10):
        stream.take(40)
    batch = stream.take(40).row
    assert len((batch // 16).unique()) > 20
    assert not torch.equal(batch, batch.sort().values)


@pytest.mark.parametrize("boundary", ["flow", "break"])
@pytest.mark.parametrize("at", [0, 3, 17])
@pytest.mark.parametrize("ranks_after", [1, 2])
def test_a_resumed_stream_goes_on_exactly_also_on_other_ranks(boundary: str, at: int, ranks_after: int) -> None:
    whole = lanes(boundary=boundary)
    expected = [whole.take(40).row for _ in range(26)]
    first = [lanes(rank, 2, boundary=boundary) for rank in range(2)]
    for _ in range(at):
        global_batch(first, 40)
    states = [json.loads(json.dumps(stream.state_dict())) for stream in first]
    assert states[0] == states[1], "the state is the same on every rank"
    again = [lanes(rank, ranks_after, boundary=boundary) for rank in range(ranks_after)]
    for stream in again:
        stream.load_state_dict(states[0])
    for batch in expected[at:]:
        assert torch.equal(global_batch(again, 40), batch)


def test_a_state_is_bounded() -> None:
    stream = lanes(boundary="flow")
    sizes = []
    for _ in range(40):
        stream.take(40)
        sizes.append(len(json.dumps(stream.state_dict())))
    assert max(sizes[20:]) < 3 * max(sizes[:20])
    assert len(stream._snapshots) <= 4


def test_making_rows_ahead_changes_nothing() -> None:
    background = Background(torch.device("cpu"))
    plain, ahead = lanes(), lanes(in_background=background)
    for step in range(12):
        assert torch.equal(plain.take(40).row, ahead.take(40).row)
        if step == 5:
            state = ahead.state_dict()
            assert state == plain.state_dict()
            ahead.load_state_dict(state)
    background.close()


def test_numbers_that_do_not_fit_are_refused_with_some_that_do() -> None:
    text = PackedRows(lambda: iter(SyntheticEnglish(5)), ByteTokenizer(), Packing())
    with pytest.raises(ValueError, match="6 is"):
        ShuffledLanes(text, produce, 4, 0, 3, 32, DROP, 0)
    with pytest.raises(ValueError, match="32 is"):
        ShuffledLanes(text, produce, 4, 0, 1, 30, DROP, 0)
    with pytest.raises(ValueError, match="4 lanes"):
        lanes().take(42)
    other = lanes()
    with pytest.raises(ValueError, match="resume with the same"):
        other.load_state_dict({"lanes": [[0, 0]] * 2, "rows_per_round": 4, "round": 0, "text": {}})
