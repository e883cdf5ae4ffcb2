"""What every test starts from."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

SEED = "PL_GLOBAL_SEED"
"""Where Lightning leaves a run's seed; ``theodolite.seeds.run_seed`` reads it there."""


@pytest.fixture(autouse=True)
def no_seed_of_another_run() -> Iterator[None]:
    """A test neither inherits the seed of a run before it nor leaves that of its own."""
    before = os.environ.pop(SEED, None)
    yield
    os.environ.pop(SEED, None)
    if before is not None:
        os.environ[SEED] = before
