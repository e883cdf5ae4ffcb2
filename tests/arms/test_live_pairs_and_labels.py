"""What an arm may see: live pairs and their sides, and that without asking by name no arm's result depends on the oracle."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from torchdata.stateful_dataloader import StatefulDataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "grpo"))

from grpo_fits import fit
from tiny_policies import TextGrader, TextRows, TinyPrompts, weights_of

from theodolite.callbacks.activation_probe import ActivationProbe
from theodolite.callbacks.direction_sources import GradientDifference, HaarRandom
from theodolite.callbacks.gradient_projection import GradientProjectionCallback
from theodolite.callbacks.live_direction import LiveGradientDifference
from theodolite.callbacks.oracle import OraclePenalty, OracleScreening
from theodolite.callbacks.rebound import ReboundCallback, penalised
from theodolite.callbacks.suppression import GenerationSuppression
from theodolite.datamodules.leetcode.graded import make_grader
from theodolite.functional.advantages import group_advantages
from theodolite.protocols import Grade, OracleWindow, Verdict, Window
from theodolite.seeds import derive_seed

# -- published forms -----------------------------------------------------------------------------------------------------------------------


def test_multiplicative_rebound_at_alpha_two_turns_a_reward_off_at_zero_plus_and_round_beyond() -> None:
    z = torch.tensor([-5.0, 0.0, 1e-12, 1.0, 50.0], dtype=torch.float64)
    factor = penalised(torch.ones(5, dtype=torch.float64), z, 2.0, "multiplicative")
    assert factor[:2].tolist() == [1.0, 1.0], "nothing at or below the group's mean"
    assert float(factor[2]) == pytest.approx(0.0, abs=1e-11), "the jump from 1 to 0"
    assert float(factor[3]) == pytest.approx(1 - 2 / (1 + math.exp(-1)))
    assert float(factor[3]) < 0
    assert float(factor[4]) == pytest.approx(-1.0)
    gentle = penalised(torch.ones(5, dtype=torch.float64), z, 1.0, "multiplicative")
    assert float(gentle.min()) >= 0.0, "alpha up to 1 never turns a reward round"


def test_survivors_of_screening_are_standardised_among_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(4, 8, generator=generator, dtype=torch.float64)
    screened = torch.rand(4, 8, generator=generator) < 0.3
    found = group_advantages(values.masked_fill(screened, torch.nan).flatten(), 8, "group").view(4, 8)
    for row, gone, advantages in zip(values, screened, found, strict=True):
        alone = group_advantages(row[~gone], int((~gone).sum()), "group")
        assert advantages[gone].tolist() == [0.0] * int(gone.sum())
        torch.testing.assert_close(advantages[~gone], alone)


# -- live pairs ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solved:
    """A row with a trusted solution."""

    id: str
    prompt: str
    reference: str


class SolvedRows(TextRows):
    def __getitem__(self, indices: Any) -> list[Any]:
        return [Solved(row.id, row.prompt, f"return {row.id}") for row in super().__getitem__(indices)]


class SolvedPrompts(TinyPrompts):
    def train_dataloader(self) -> Any:
        sampler = self._sampler(self.rows, self.global_batch_size, True)
        return StatefulDataLoader(SolvedRows(self.rows, "train"), batch_size=None, sampler=sampler, collate_fn=list)


class Witness(Callback):
    def __init__(self, source: LiveGradientDifference) -> None:
        self.source, self.window, self.references = source, None, []

    def on_advantages(self, trainer: Any, pl_module: Any, window: Window) -> None:
        self.window = window
        self.references = [pl_module.encode(row.prompt, getattr(row, "reference", "")) for row in window.rows]


def lived(path: Path, data: Any, **settings: Any) -> tuple[LiveGradientDifference, Witness]:
    source = LiveGradientDifference(**({"capacity": 64, "detector": "[a-m]", "pairs_per_group": 2} | settings))
    witness = Witness(source)
    fit(path, GradientProjectionCallback(source, overshoot=2.0), witness, data=data, table_every=1)
    return source, witness


def test_a_concept_side_may_have_to_be_rewarded_and_flags_are_kept_for_the_tables(tmp_path: Path) -> None:
    source, witness = lived(tmp_path, TinyPrompts(), only_rewarded=True)
    every, _ = lived(tmp_path, TinyPrompts())
    window = witness.window
    assert window is not None
    rewarded = {rollout.tokens for rollout, reward in zip(window.rollouts, window.rewards, strict=True) if reward.passed}
    new, more = ([pair for pair in one.queue if pair.step == 0] for one in (source, every))
    assert new
    assert {pair.concept for pair in new} <= rewarded
    assert not {pair.concept for pair in more} <= rewarded
    flags = window.features["flagged"].tolist()
    assert window.metrics["direction/flagged"] == (sum(flags), len(flags))
    assert 0 < sum(flags) < len(flags)
    table = pd.read_parquet(tmp_path / "completions" / "step_000000.parquet")
    assert table["feature/flagged"].tolist() == flags
    assert set(table["mechanism"]) == {""}


def test_the_clean_side_may_be_the_row_s_own_reference_solution(tmp_path: Path) -> None:
    source, witness = lived(tmp_path, SolvedPrompts(), clean_side="reference")
    new = [pair for pair in source.queue if pair.step == 0]
    assert len(new) > 4
    assert {pair.samples[1] for pair in new} == {-1}
    assert all(pair.clean == witness.references[pair.slot] for pair in new)
    with pytest.raises(TypeError, match="no reference solution"):
        lived(tmp_path, TinyPrompts(), clean_side="reference")
    with pytest.raises(ValueError, match="placebo"):
        LiveGradientDifference(clean_side="reference", placebo=True)


# -- the oracle ----------------------------------------------------------------------------------------------------------------------------


class OtherVerdicts(TextGrader):
    """The same rewards, and verdicts that have nothing to do with them."""

    def one(self, row: Any, text: str) -> Grade:
        label = ("correct", "reward_hack", "incorrect", "attempted_hack")[derive_seed("other", row.id, text.encode().hex()) % 4]
        return Grade(super().one(row, text).reward, Verdict(label == "correct", label, "ok", True, "assignment"))


def live(detector: Any, **settings: Any) -> Callback:
    return GradientProjectionCallback(LiveGradientDifference(capacity=8, detector=detector, **settings), overshoot=2.0)


BLIND = {
    "vanilla": Callback,
    "static": lambda: GradientProjectionCallback(GradientDifference(n_pairs=8), preserve_magnitude=True),
    "haar": lambda: GradientProjectionCallback(HaarRandom(k=2)),
    "live": lambda: live("[a-m]"),
    "live_probe": lambda: live(ActivationProbe(n_pairs=8), only_rewarded=True),
    "rebound": lambda: ReboundCallback(n_pairs=8, mode="advantage"),
    "rebound_multiplicative": lambda: ReboundCallback(n_pairs=8, mode="multiplicative"),
    "suppressed": lambda: GenerationSuppression(n_pairs=8, band=(0.5, 1.0)),
}
SEEING = {"oracle": OraclePenalty, "screening": OracleScreening}


def trained(path: Path, callback: Callback, verdicts: type[TextGrader]) -> dict[str, torch.Tensor]:
    data = TinyPrompts()
    data.environment = verdicts()
    module, _ = fit(path, callback, data=data, steps=3)
    return weights_of(module)


def same(tmp_path: Path, make: Any) -> bool:
    one, other = (trained(tmp_path, make(), verdicts) for verdicts in (TextGrader, OtherVerdicts))
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("arm", [pytest.param(name, marks=[] if name == "live" else [pytest.mark.slow]) for name in BLIND])
def test_without_asking_by_name_an_arm_trains_the_same_weights_whatever_the_oracle_says(tmp_path: Path, arm: str) -> None:
    assert same(tmp_path, BLIND[arm])


@pytest.mark.parametrize("arm", [pytest.param(name, marks=[pytest.mark.slow]) for name in SEEING])
def test_an_arm_that_asks_by_name_depends_on_it(tmp_path: Path, arm: str) -> None:
    assert not same(tmp_path, SEEING[arm])


@pytest.mark.parametrize("known", [True, False])
def test_an_oracle_penalty_below_what_passing_pays_is_refused_unless_it_is_meant(known: bool) -> None:
    environment = make_grader(1, None, 3.0, 0.5) if known else TextGrader()
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(environment=environment))
    module: Any = None
    if known:
        with pytest.raises(ValueError, match=r"subtracts 1 where passing pays 3, so a hack still earns 2; .* penalty: 3, or partial: true"):
            OraclePenalty().on_fit_start(trainer, module)
    else:
        OraclePenalty().on_fit_start(trainer, module)
    OraclePenalty(penalty=3.0).on_fit_start(trainer, module)
    OraclePenalty(partial=True).on_fit_start(trainer, module)


def reachable(found: Any) -> Iterator[Any]:
    """An object and everything in its fields, items and attributes."""
    pending, known = [found], set()
    while pending:
        one = pending.pop()
        if id(one) in known or isinstance(one, torch.Tensor):
            continue
        known.add(id(one))
        yield one
        if isinstance(one, dict):
            pending += [*one, *one.values()]
        elif isinstance(one, list | tuple | set):
            pending += one
        elif is_dataclass(one):
            pending += [getattr(one, f.name) for f in fields(one)]
        elif hasattr(one, "__dict__"):
            pending += vars(one).values()


class Thief(Callback):
    """Looks for verdicts in everything that the hooks hand to a callback's window, without having asked for them."""

    def __init__(self) -> None:
        self.stolen: list[Any] = []
        self.seen = 0

    def on_rollouts(self, trainer: Any, pl_module: Any, window: Window) -> None:
        self.seen += 1
        self.stolen += [one for one in reachable(window) if isinstance(one, Verdict | Grade | OracleWindow)]

    on_advantages = on_rollouts

    def on_microbatch_gradients(self, trainer: Any, pl_module: Any, window: Window, part: str) -> None:
        self.on_rollouts(trainer, pl_module, window)


def test_a_callback_that_looks_for_verdicts_finds_none_even_beside_one_that_was_given_them(tmp_path: Path) -> None:
    thief, data = Thief(), TinyPrompts()
    fit(tmp_path, OraclePenalty(), thief, data=data)
    assert thief.seen >= 3
    assert thief.stolen == []
