"""Seeds that name what they are for, and batch sizes that are split in one place."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from theodolite.batch_arithmetic import split_batch
from theodolite.distributed import gather_objects, sum_gradients, world_size
from theodolite.seeds import derive_seed, run_seed

PARTS = st.lists(st.one_of(st.integers(-(2**70), 2**70), st.text(st.characters(exclude_characters="\x1f"), max_size=5)), max_size=4)


@given(PARTS, PARTS)
def test_different_parts_give_different_seeds_within_63_bits(one: list[int | str], other: list[int | str]) -> None:
    assert 0 <= derive_seed(*one) < 2**63
    same = [(type(part), part) for part in one] == [(type(part), part) for part in other]
    assert (derive_seed(*one) == derive_seed(*other)) == same


def test_text_that_could_be_taken_for_two_parts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"U\+001F"):
        derive_seed("a\x1fstr:b")
    assert derive_seed(1) != derive_seed("1")


def test_seeds_are_the_same_in_every_process_and_hash_seed() -> None:
    code = "from theodolite.seeds import derive_seed; print(derive_seed(3, 'rollouts', 7, 'p', 0))"
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
        assert int(done.stdout) == derive_seed(3, "rollouts", 7, "p", 0)


def test_seeds_look_uniform() -> None:
    seeds = [derive_seed("uniform", i) for i in range(4000)]
    assert len(set(seeds)) == 4000
    assert abs(sum(seeds) / len(seeds) / 2**63 - 0.5) < 0.02
    for bit in range(63):
        assert abs(sum(seed >> bit & 1 for seed in seeds) / 4000 - 0.5) < 0.05


def test_a_missing_seed_is_the_run_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    assert (run_seed(None), run_seed(0), run_seed(4)) == (11, 0, 4)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert run_seed(None) == 0


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_sizes_multiply_to_the_global_batch(ranks: int, per_rank: int, generations: int, micro: int, accumulation: int) -> None:
    prompts = ranks * per_rank
    split = split_batch(prompts, ranks, generations)
    assert split.global_batch == prompts * generations == split.ranks * split.micro * split.accumulation
    assert split.accumulation == 1
    local = micro * accumulation
    parts = split_batch(ranks * local, ranks, 1, micro)
    assert (parts.micro, parts.accumulation, parts.prompts_per_rank) == (micro, accumulation, local)
    assert parts.as_dict()["global_batch"] == ranks * local
    assert f"global batch {ranks * local} = {ranks} ranks x {micro} micro x {accumulation} accumulation" in str(parts)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.integers(1, 30))
def test_sizes_named_in_a_refusal_work(prompts: int, ranks: int, generations: int, micro: int) -> None:
    local = math.nan if prompts % ranks else prompts // ranks * generations
    if not prompts % ranks and not local % micro:
        split_batch(prompts, ranks, generations, micro)
        return
    with pytest.raises(ValueError, match="would") as refusal:
        split_batch(prompts, ranks, generations, micro)
    named = [int(word) for word in str(refusal.value).rsplit(";", 1)[1].replace("would.", "").replace("or", "").split()]
    assert named
    for size in named:
        if prompts % ranks:
            split_batch(size, ranks)
        else:
            split_batch(prompts, ranks, generations, size)


@pytest.mark.parametrize("wrong", [{"prompts": 0}, {"ranks": 0}, {"generations": 0}, {"micro": 0}, {"micro": -1}])
def test_sizes_below_one_are_refused_by_name(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 1"):
        split_batch(**({"prompts": 4, "ranks": 2} | wrong))


def test_collectives_on_one_process_change_nothing_but_missing_gradients() -> None:
    layer, frozen = nn.Linear(2, 2), nn.Parameter(torch.ones(2), requires_grad=False)
    layer.weight.grad = torch.full((2, 2), 3.0)
    sum_gradients([*layer.parameters(), frozen])
    assert layer.weight.grad.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [0.0, 0.0], "as on a rank without signal: an optimizer must move the same way on any number of ranks"
    assert frozen.grad is None
    assert (world_size(), gather_objects("x")) == (1, ["x"])
