"""Halving on out-of-memory, with a function that pretends to run out of it."""

from __future__ import annotations

import gc

import pytest
import torch

from theodolite.out_of_memory import FittingParts, is_out_of_memory

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    RuntimeError("MPS backend out of memory"),
    MemoryError(),
]


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection walks everything that the other tests have imported, and nothing here needs one."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def squares(limit: int, error: Exception, seen: list[int]):
    def function(part: slice) -> torch.Tensor:
        seen.append(part.stop - part.start)
        if part.stop - part.start > limit:
            raise error
        return torch.arange(part.start, part.stop) ** 2

    return function


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_results_and_order_do_not_depend_on_what_fits(error: Exception, limit: int) -> None:
    parts, seen = FittingParts(16), []
    for _ in range(2):
        results = parts.map(squares(limit, error, seen), 37)
        assert torch.equal(torch.cat(results), torch.arange(37) ** 2)
    assert parts.rows_per_part <= limit or limit == 100
    assert sum(size > limit for size in seen) == parts.halvings, "what once did not fit is not tried again"


def test_a_row_that_does_not_fit_and_another_error_are_raised_at_once() -> None:
    with pytest.raises(RuntimeError, match="Row 0 does not fit"):
        FittingParts(4).map(squares(0, ERRORS[0], []), 5)
    seen: list[int] = []
    with pytest.raises(RuntimeError, match="shape"):
        FittingParts(4).map(squares(0, RuntimeError("shape mismatch"), seen), 5)
    assert seen == [4]
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(ValueError, match="at least 1"):
        FittingParts(0)


def test_nothing_to_do_calls_nothing() -> None:
    assert FittingParts(4).map(squares(0, ERRORS[0], []), 0) == []
