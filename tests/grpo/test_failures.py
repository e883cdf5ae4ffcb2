"""Memory that runs out, environments that raise or hang, rewards that are no numbers: defined, said, and never a hang."""

from __future__ import annotations

import gc
import io
import math
import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_fits import TINY, Gradients, PlainDescent, deviation, fit
from tiny_policies import Row, TextGrader, TinyPrompts, ragged, tiny_model

from theodolite import distributed
from theodolite.lightning_modules.decoding import Sampling
from theodolite.lightning_modules.grpo import self_check
from theodolite.lightning_modules.grpo.limits import CHECKPOINT_KEY
from theodolite.lightning_modules.held_out import HeldOutEvaluation
from theodolite.lightning_modules.rollouts import HFRollout, Sample
from theodolite.protocols import Grade
from theodolite.seeds import derive_seed


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection walks everything that the other tests have imported, and nothing here needs one."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


class Cramped(PlainDescent):
    """Memory for ``most`` rows at once."""

    most = 4
    tried: list[int]

    def microbatch_loss(self, window: Any, indices: Any, *arguments: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.tried = [*getattr(self, "tried", []), len(indices)]
        loss, sums = super().microbatch_loss(window, indices, *arguments)
        if len(indices) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return loss, sums


@pytest.mark.parametrize("settings", [{}, {"split_backward": True}, {"beta": 0.2, "updates_per_window": 2}, {"micro_batch_size": 8}])
def test_out_of_memory_halves_the_microbatch_and_the_gradients_stay(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    plain, cramped = Gradients(), Gradients()
    double: dict[str, Any] = {"max_grad_norm": 0.0, "steps": 2, "precision": "64-true"}  # float32 sums of another order differ by more
    fit(tmp_path, plain, **double, **settings)
    monkeypatch.setattr("grpo_fits.PlainDescent", Cramped)
    module, _ = fit(tmp_path, cramped, **double, **settings)
    assert isinstance(module, Cramped)
    for one, other in zip(cramped.seen, plain.seen, strict=True):
        assert deviation(one, other) < 1e-6
    assert "microbatches are halved" in caplog.text
    first_fit = module.tried.index(next(n for n in module.tried if n <= 4))
    assert max(module.tried[first_fit:]) <= 4, "what did not fit once is not tried again"


def saved(*limits: tuple[int, int | None]) -> dict[str, Any]:
    checkpoint, buffer = {"state_dict": {}, CHECKPOINT_KEY: list(limits)}, io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_what_did_not_fit_is_remembered_by_checkpoints_rank_by_rank() -> None:
    fresh, cramped = PlainDescent(**TINY, micro_batch_size=8), PlainDescent(**TINY, micro_batch_size=8)
    checkpoint: dict[str, Any] = {"state_dict": {}}
    fresh.on_save_checkpoint(checkpoint)
    assert checkpoint == {"state_dict": {}}, "nothing is added where memory never ran out"
    cramped._halvings, cramped._row_limit = 2, 3
    cramped.on_save_checkpoint(checkpoint)
    assert checkpoint == saved((2, 3))
    fresh.on_load_checkpoint(checkpoint)
    assert (fresh._most_rows(), fresh._most_prompt_tokens([(1,) * 8])) == (3, 2)
    fresh.engine.row_limit = 5  # pyright: ignore[reportAttributeAccessIssue]
    fresh.on_save_checkpoint(checkpoint := {"state_dict": {}})
    cramped.on_load_checkpoint(checkpoint)
    assert isinstance(cramped.engine, HFRollout)
    assert cramped.engine.row_limit == 5, "sampling has a limit of its own"
    for ranks, expected in ((2, (0, None)), (4, (1, 6))):
        resumed, stub = PlainDescent(**TINY), SimpleNamespace(world_size=ranks, global_rank=0)
        resumed._trainer = cast(Any, stub)
        resumed.on_load_checkpoint(saved((0, None), (1, 6)))
        assert (resumed._halvings, resumed._row_limit) == expected


def test_one_row_that_does_not_fit_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_fits.PlainDescent", Cramped)
    monkeypatch.setattr(Cramped, "most", 0)
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path)


class CrampedForScores(PlainDescent):
    """Memory for ``most`` rows at once in passes without gradient."""

    most = 3
    tried: list[int]

    def _log_probs(self, model: Any, sequences: Any, temperature: Any = None) -> Any:
        if not torch.is_grad_enabled():
            self.tried = [*getattr(self, "tried", []), len(sequences)]
            if len(sequences) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super()._log_probs(model, sequences, temperature)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.2, "updates_per_window": 2},
        pytest.param({"beta": 0.2, "updates_per_window": 2, "split_backward": True, "overlap_grading": True}, marks=pytest.mark.slow),
        pytest.param({"beta": 0.2, "kl_estimator": "k1_reward"}, marks=pytest.mark.slow),
    ],
)
def test_out_of_memory_in_passes_without_gradient_halves_them_and_the_gradients_stay(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, cramped = Gradients(), Gradients()
    double: dict[str, Any] = {"max_grad_norm": 0.0, "steps": 2, "precision": "64-true"}
    fit(tmp_path, plain, **double, **settings)
    monkeypatch.setattr("grpo_fits.PlainDescent", CrampedForScores)
    module, _ = fit(tmp_path, cramped, **double, **settings)
    assert isinstance(module, CrampedForScores)
    most = 1e-5 if "kl_estimator" in settings else 1e-6  # the reward then has the float32 log-probabilities of the sampler in it
    assert all(deviation(one, other) < most for one, other in zip(cramped.seen, plain.seen, strict=True))
    first_fit = module.tried.index(next(n for n in module.tried if n <= 3))
    assert first_fit > 0
    assert max(module.tried[first_fit:]) <= 3, "what did not fit once is not tried again"
    assert module._most_rows() == max(module.tried[first_fit:]), "nor in the gradient, and checkpoints say so"


def test_out_of_memory_in_the_self_check_compares_fewer_rollouts_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded, seen = self_check.completion_log_probs, []

    def cramped(model: Any, batch: Any, temperature: float) -> Any:
        seen.append(len(batch.mask))
        if len(batch.mask) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return padded(model, batch, temperature)

    plain, own = Gradients(), Gradients()
    fit(tmp_path, plain, split_backward=True)
    monkeypatch.setattr(self_check, "completion_log_probs", cramped)
    fit(tmp_path, own, split_backward=True)
    assert seen == [3, 1, 1, 1]
    assert torch.equal(own.seen[0], plain.seen[0])


def cramped_sampler(most: int, tried: list[int]) -> HFRollout:
    """Decodes at most so many completions at once."""
    sampler = HFRollout()
    sampler.setup(tiny_model("qwen3"), [1], 0)
    decode = sampler._decode

    def cramped(prompts: Any, sampling: Any, seeds: Any) -> Any:
        tried.append(sum(map(len, seeds)))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return decode(prompts, sampling, seeds)

    sampler._decode = cramped
    return sampler


def test_out_of_memory_while_sampling_decodes_fewer_at_once_and_the_same_completions() -> None:
    prompts, sampling = [s.prompt_ids for s in ragged([(5, 1), (9, 1), (3, 1)])], Sampling(8)
    seeds = [[derive_seed("memory", p, i) for i in range(4)] for p in range(3)]
    tried: list[int] = []
    sampler, whole = cramped_sampler(4, tried), cramped_sampler(99, []).generate(prompts, sampling, seeds)
    for _ in range(2):
        parts = sampler.generate(prompts, sampling, seeds)
        assert [[s.ids for s in group] for group in parts] == [[s.ids for s in group] for group in whole]
        for one, other in zip(chain(*parts), chain(*whole), strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
    assert tried == [12, 6, *[3] * 4, *[3, 1] * 3], "what did not fit once is not tried again, and groups stay together where they fit"
    assert sampler.row_limit == 3
    with pytest.raises(RuntimeError, match=r"does not fit into memory even alone: lower model\.max_new_tokens, train an adapter"):
        cramped_sampler(0, []).generate(prompts, sampling, seeds)


class Broken(TextGrader):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def grade(self, rows: Sequence[Row], completions: Sequence[str]) -> list[Grade]:
        if self.how == "raises":
            raise KeyError("tests")
        time.sleep(30)
        return []


@pytest.mark.parametrize(("how", "said"), [("raises", "KeyError: 'tests'"), ("hangs", "no grades after 0.2 s")])
def test_an_environment_that_raises_or_hangs_stops_the_run_with_its_reason(tmp_path: Path, how: str, said: str) -> None:
    data = TinyPrompts()
    data.environment = Broken(how)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"Grading failed at step 0 on rank 0 .*{said}"):
        fit(tmp_path, data=data, grading_timeout_s=0.2)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("settings", [{"split_backward": True}, {"truncated": "mask"}, {"truncated": "exclude"}, {"zero_variance": "drop"}])
@pytest.mark.parametrize("rewards", ["nan", "all_nan", "constant"])
@pytest.mark.parametrize("length", [1, 12])
def test_degenerate_windows_are_steps_like_any_other(tmp_path: Path, settings: dict[str, Any], rewards: str, length: int) -> None:
    module, trainer = fit(tmp_path, data=TinyPrompts(rewards=rewards), max_new_tokens=length, **settings)
    assert trainer.global_step == 1
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert math.isfinite(float(trainer.logged_metrics["train/loss"]))


def test_sharded_strategies_are_refused_because_ranks_would_wait_for_one_another() -> None:
    module = PlainDescent(**TINY)
    stub: Any = SimpleNamespace(strategy=object.__new__(FSDPStrategy))
    module._trainer = stub
    with pytest.raises(ValueError, match="with ddp or with ModelParallelStrategy: under FSDPStrategy every forward pass is a collective"):
        module._check_ranks()


def test_a_grader_that_fails_on_another_rank_ends_this_one_s_evaluation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, "KeyError: 'tests'"])
    sample = Sample((1,), (-1.0,), "stop", 0)
    environment = TextGrader()
    environment.start()
    module: Any = SimpleNamespace(sample=lambda *_: ([(1,)], [[sample]]), decode=str, environment=environment)
    with pytest.raises(RuntimeError, match=r"rank 1 failed \(KeyError: 'tests'"):
        HeldOutEvaluation(module).step([Row("held-out0", "Say.")], 0, 1, Sampling(1), drift=False)
