"""Sampling one window ahead: what overlaps, by which weights, against which probabilities, in which order, and after any end."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_fits import TINY, Gradients, PlainDescent, fit, flat_gradient
from test_two_ranks import command, log_of, two_ranks
from tiny_policies import TinyPrompts, config, grpo, prompts, weights_of

from theodolite.background import in_background
from theodolite.datamodules.samplers import DistributedBatchSampler
from theodolite.lightning_modules.decoding import Sampling
from theodolite.lightning_modules.grpo.overlap import CHECKPOINT_KEY
from theodolite.lightning_modules.grpo.settings import check_preview
from theodolite.lightning_modules.rollouts import HFRollout, Sample, SamplesAhead, sample_seeds
from theodolite.lightning_modules.scoring import completion_log_probs, pad_sequences
from theodolite.protocols import PromptPreview, Window
from theodolite.shard_work import this_rank

SAVING: dict[str, Any] = {"enable_checkpointing": True}
ENGINE = f"{__name__}.Elsewhere"


class Elsewhere(HFRollout):
    """The trainer's own sampler on a copy of the policy: deterministic, with weights of its own.

    Args:
        fails_at: Weight version whose completions cannot be had beforehand.
        on_rank: Which rank cannot have them; null = none can.
    """

    own_numerics = True
    events: list[str]
    """What was done, in order; ``sampling 2`` is the window that is learnt from at step 2."""

    def __init__(self, fails_at: int | None = None, on_rank: int | None = None) -> None:
        super().__init__()
        self.fails_at, self.on_rank, self.events = fails_at, on_rank, []
        self.may_end: threading.Event | None = None
        self._begun: Future[Any] | None = None
        self._one_at_a_time = threading.Lock()  # unlike a server, this decodes by switches on the one model

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[list[Sample]]:
        with self._one_at_a_time:
            return super().generate(prompts, sampling, seeds)

    def setup(self, model: nn.Module, end_ids: Sequence[int], pad_id: int, folder: Path | None = None) -> None:
        self.live = model
        super().setup(copy.deepcopy(model), end_ids, pad_id, folder)

    def sync(self, version: int) -> None:
        if version == self._version and self.events:
            return
        if self._begun is not None:
            wait([self._begun])
        assert self._model is not None
        self._model.load_state_dict(self.live.state_dict())
        self.events.append(f"weights {version}")
        super().sync(version)

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> Future[list[list[Sample]]]:
        version, may_end = self._version, self.may_end

        def work() -> list[list[Sample]]:
            self.events.append(f"begin {version}")
            if may_end is not None:
                assert may_end.wait(20), "nothing was learnt while this sampled"
            if version == self.fails_at and self.on_rank in (None, this_rank()):
                raise ConnectionError("the sampler is gone")
            found = self.generate(prompts, sampling, seeds)
            self.events.append(f"end {version}")
            return found

        self._begun = in_background(work, "rollouts")
        return self._begun


def ahead(path: Path, *callbacks: Any, engine: dict[str, Any] | None = None, **settings: Any) -> tuple[Any, Any]:
    rollout = {"class_path": ENGINE, "init_args": engine or {}}
    return fit(path, *callbacks, **({"rollout": rollout, "overlap_sampling": True, "lr": 0.3} | settings))


class Windows(Callback):
    """Every window, the weights it met, and what was logged."""

    def __init__(self) -> None:
        self.windows: list[Window] = []
        self.weights: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_advantages(self, trainer: Any, pl_module: Any, window: Window) -> None:
        self.windows.append(window)
        self.weights.append(weights_of(pl_module.causal_lm))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items() if name.startswith("train/")})


def test_the_engine_of_a_server_can_sample_ahead_and_the_trainers_own_cannot() -> None:
    from theodolite.lightning_modules.vllm import VLLMRollout, VLLMServerRollout

    assert issubclass(VLLMServerRollout, SamplesAhead)
    assert not issubclass(VLLMRollout, SamplesAhead)
    assert not issubclass(HFRollout, SamplesAhead)


def test_windows_hold_the_prompts_of_their_turn_sampled_by_weights_one_step_old(tmp_path: Path) -> None:
    watch, plain = Windows(), Windows()
    module, _ = ahead(tmp_path, watch, steps=4, data=TinyPrompts(rows=8))  # two windows are an epoch
    fit(tmp_path, plain, steps=4, data=TinyPrompts(rows=8))
    assert [[row.id for row in w.rows] for w in watch.windows] == [[row.id for row in w.rows] for w in plain.windows]
    assert [w.rollouts[0].tokens for w in watch.windows[:1]] == [w.rollouts[0].tokens for w in plain.windows[:1]]
    assert [logged["train/staleness"] for logged in watch.logged] == [0, 1, 1, 1]
    assert "train/staleness" not in plain.logged[0]
    policy = copy.deepcopy(module.causal_lm)
    for step, window in enumerate(watch.windows):
        version = max(0, step - 1)
        policy.load_state_dict(watch.weights[version])
        engine = HFRollout()
        engine.setup(policy, module.end_ids, module.pad_id)
        prompts = [module.encode_prompt(row.prompt) for row in window.rows]
        groups = engine.generate(prompts, module.sampling, sample_seeds(module.run_seed, window.rows, 4, "rollouts", step))
        flat = [sample for group in groups for sample in group]
        assert [r.tokens.completion_ids for r in window.rollouts] == [sample.ids for sample in flat]
        assert [r.sampler_log_probs for r in window.rollouts] == [sample.log_probs for sample in flat]
        assert {r.weight_version for r in window.rollouts} == {version}


def test_the_gradient_is_that_of_true_ratios_against_the_sampler(tmp_path: Path) -> None:
    watch, gradients = Windows(), Gradients()
    module, _ = ahead(tmp_path, watch, gradients, steps=3, max_grad_norm=0.0, lr=2.0)
    window, policy = watch.windows[2], module.causal_lm
    policy.load_state_dict(watch.weights[2])
    policy.zero_grad()
    batch = pad_sequences([r.tokens for r in window.rollouts], module.pad_id, "cpu")
    log_probs = completion_log_probs(policy, batch, 1.0)
    sampler = torch.zeros_like(log_probs)
    for row, rollout in enumerate(window.rollouts):
        sampler[row, : len(rollout.sampler_log_probs)] = torch.tensor(rollout.sampler_log_probs)
    ratio = (log_probs - sampler).exp() * batch.mask
    advantages = window.advantages.float()[:, None]
    objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    (-(objective * batch.mask).sum() / batch.mask.sum()).backward()
    expected, found = flat_gradient(module), gradients.seen[2]
    assert float((found - expected).norm()) < 1e-4 * float(expected.norm())
    logged = watch.logged[2]
    active = (window.advantages != 0)[:, None] * batch.mask
    assert logged["train/ratio"] == pytest.approx(float((ratio.detach() * active).sum() / active.sum()), rel=1e-4)
    assert logged["train/clip_fraction"] > 0.01, "the step was large enough for the clip to act"
    assert watch.logged[0]["train/ratio"] == pytest.approx(1.0, abs=1e-4)
    assert logged["train/sampler_gap"] > 100 * watch.logged[0]["train/sampler_gap"], "which measures how far the policy has moved"


class MustOverlap(Callback):
    """The next window's sampling may end only when this one's gradient is being computed, and the other way round."""

    def __init__(self) -> None:
        self.engine: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.engine = pl_module.engine
        self.engine.may_end = threading.Event()

    def on_advantages(self, trainer: Any, pl_module: Any, window: Window) -> None:
        if window.step + 1 < trainer.max_steps:
            assert f"end {window.step}" not in self.engine.events
        self.engine.events.append(f"learning {window.step}")
        self.engine.may_end.set()


class TwoValidated(TinyPrompts):
    def __init__(self) -> None:
        super().__init__(eval_rows=2)


def test_a_window_is_sampled_while_the_one_before_it_is_learnt_from_and_no_weights_are_sent_meanwhile(tmp_path: Path) -> None:
    module, _ = ahead(tmp_path, MustOverlap(), steps=4)
    events = module.engine.events
    for window in range(2):
        order = [events.index(name) for name in (f"weights {window}", f"begin {window}", f"learning {window}", f"end {window}")]
        assert order == sorted(order)
        assert events.index(f"end {window}") < events.index(f"weights {window + 1}")
    assert "begin 3" not in events, "nothing follows the last window"


def test_nothing_is_begun_that_no_epoch_would_ask_for(tmp_path: Path) -> None:
    module, trainer = ahead(tmp_path, data=TinyPrompts(rows=8), trainer_args={"max_steps": -1, "max_epochs": 2})
    assert trainer.global_step == 4
    assert [event for event in module.engine.events if event.startswith("begin")] == ["begin 0", "begin 1", "begin 2"]


@pytest.mark.slow
def test_an_evaluation_between_two_windows_waits_for_the_sampling_and_sees_the_newest_weights(tmp_path: Path) -> None:
    watch = Windows()
    module, _ = ahead(tmp_path, watch, steps=2, data=TwoValidated(), trainer_args={"limit_val_batches": 1, "val_check_interval": 1})
    sent = [event for event in module.engine.events if event.startswith("weights")]
    assert sent == ["weights 0", "weights 1", "weights 2"]
    assert [logged["train/staleness"] for logged in watch.logged] == [0, 1]


def test_what_the_sampler_fails_with_surfaces_at_the_next_window_and_checkpoints_go_on_without_it(tmp_path: Path) -> None:
    def checkpoints(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    watch = Windows()
    with pytest.raises(ConnectionError, match="the sampler is gone"):
        ahead(tmp_path, watch, checkpoints("failed"), steps=4, engine={"fails_at": 1}, trainer_args=SAVING)
    assert len(watch.windows) == 2, "the window that was learnt from meanwhile is finished first"
    held = [torch.load(tmp_path / "failed" / f"step={step}.ckpt", weights_only=True) for step in (1, 2)]
    assert [CHECKPOINT_KEY in checkpoint for checkpoint in held] == [True, False]
    again = Windows()
    ahead(tmp_path, again, steps=4, ckpt_path=tmp_path / "failed" / "step=2.ckpt")
    assert [logged["train/staleness"] for logged in again.logged] == [0, 1]


@pytest.mark.slow
@pytest.mark.distributed
def test_what_fails_on_one_rank_while_it_samples_ahead_stops_both_with_the_reason(tmp_path: Path) -> None:
    rollout = {"class_path": "test_overlap.Elsewhere", "init_args": {"fails_at": 1, "on_rank": 1}}
    limits = {"max_steps": 4, "limit_val_batches": 0, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    written = config(tmp_path, "failing", grpo(rollout=rollout, overlap_sampling=True, export=False), prompts(), **limits)
    assert 0 not in two_ranks(tmp_path, [command(tmp_path, written)])
    assert "rank 1 failed (ConnectionError: the sampler is gone)" in log_of(tmp_path, 0)
    assert "ConnectionError: the sampler is gone" in log_of(tmp_path, 1)
    rows = (tmp_path / "run-failing" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2, "the window that was learnt from meanwhile is finished first"


def slowly(step: int, **settings: Any) -> Any:
    return pytest.param(step, settings, marks=pytest.mark.slow, id=f"{step}-{'-'.join(settings) or 'next epoch'}")


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        pytest.param(2, {}, id="2"),
        slowly(5),
        slowly(4, updates_per_window=2, beta=0.1),
        slowly(3, zero_variance="refill", data=TinyPrompts(rewards="nan")),
        slowly(3, overlap_grading=True, beta=0.1, split_backward=True),
    ],
)
def test_a_resumed_run_learns_from_the_very_window_that_was_sampled_ahead(tmp_path: Path, step: int, settings: dict[str, Any]) -> None:
    whole, again = Windows(), Windows()
    updates = settings.get("updates_per_window", 1)
    steps = step + 2 * updates
    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first, _ = ahead(tmp_path, whole, save, steps=steps, trainer_args=SAVING, **settings)
    second, _ = ahead(tmp_path, again, steps=steps, ckpt_path=tmp_path / "saved" / f"step={step}.ckpt", **settings)
    assert json.dumps(again.logged) == json.dumps(whole.logged[step // updates :])
    ages = [logged["train/staleness"] for logged in whole.logged]
    assert ages[0] == 0
    assert all(0 < age <= updates if "zero_variance" in settings else age == updates for age in ages[1:])
    ends = weights_of(first), weights_of(second)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_window_that_was_sampled_ahead_is_dealt_out_to_any_number_of_ranks() -> None:
    groups = [{"slot": slot, "problem": f"p{slot}", "samples": [[(slot,), (-1.0,), "stop", 3]] * 2} for slot in range(4)]
    held = {CHECKPOINT_KEY: {"step": 4, "groups": groups}}
    for ranks in (1, 2, 4):
        for rank in range(ranks):
            module = PlainDescent(**TINY, rollout={"class_path": ENGINE}, overlap_sampling=True, seed=3)
            module._trainer = type("Trainer", (), {"global_rank": rank, "world_size": ranks})()  # pyright: ignore[reportAttributeAccessIssue]
            module.on_load_checkpoint(dict(held))
            assert module._ahead is not None
            assert module._ahead.problems == [f"p{slot}" for slot in range(rank, 4, ranks)]
            assert [group[0].ids[0] for group in module._ahead.groups.result()] == list(range(rank, 4, ranks))


# -- what is refused -----------------------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_work_are_refused_before_anything_is_built() -> None:
    common: dict[str, Any] = TINY | {"seed": 3, "overlap_sampling": True}
    with pytest.raises(ValueError, match="HFRollout does not sample while the policy trains"):
        PlainDescent(**common)
    with pytest.raises(ValueError, match="overlap_sampling takes the sampler's for both, so every weight would be 1"):
        PlainDescent(**common, rollout={"class_path": ENGINE}, mismatch={"mode": "token_tis", "high": 2.0})
    with pytest.raises(ValueError, match="overlap_sampling and kl_estimator=k1_reward would take them"):
        PlainDescent(**common, rollout={"class_path": ENGINE}, top_p=0.9, truncated_sampling="untruncated")
    assert PlainDescent(**common, rollout={"class_path": ENGINE}).mismatch is None


def test_data_that_cannot_say_what_comes_next_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"limit_train_batches=2 cuts epochs short"):
        ahead(tmp_path, steps=3, trainer_args={"limit_train_batches": 2})
    with pytest.raises(TypeError, match="a list cannot"):
        check_preview(None, [1, 2])


class OtherRows(TinyPrompts):
    """The sampler says one thing and the loader does another."""

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        cast(Any, loader.sampler).upcoming = lambda: [0, 1, 2, 3]
        return loader


def test_other_prompts_than_were_sampled_are_not_learnt_from(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="belongs to other prompts"):
        ahead(tmp_path, steps=3, data=OtherRows())


@pytest.mark.slow
def test_a_sampler_that_keeps_a_probability_to_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = HFRollout.generate

    def silent(*arguments: Any) -> list[list[Sample]]:
        groups = generate(*arguments)
        first = groups[0][0]
        groups[0][0] = Sample(first.ids, (float("nan"), *first.log_probs[1:]), first.finish, first.weight_version)
        return groups

    monkeypatch.setattr(HFRollout, "generate", silent)
    with pytest.raises(ValueError, match="no log-probability for a token of problem"):
        ahead(tmp_path, steps=2)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_sampler_says_what_it_yields_next_and_is_not_moved_by_being_asked(ranks: int) -> None:
    def sampler(rank: int) -> DistributedBatchSampler:
        return DistributedBatchSampler(20, 6, ranks, rank, shuffle=True, seed=4, drop_last=True)

    for rank in range(ranks):
        asked, plain = sampler(rank), sampler(rank)
        assert isinstance(asked, PromptPreview)
        expected = asked.upcoming()
        for epoch in range(3):
            for s in (asked, plain):
                s.set_epoch(epoch)
            for rows, other in zip(asked, plain, strict=True):
                assert rows == other == expected
                expected = asked.upcoming()
                resumed = sampler(rank)
                resumed.load_state_dict(asked.state_dict())
                assert resumed.upcoming() == expected == next(iter(resumed))


def test_ctrl_c_does_not_wait_for_what_is_done_in_the_background() -> None:
    work = "import time; print('ready', flush=True); time.sleep(60)"
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # ignored where the tests run in the background
    program = f"{heard}\nfrom theodolite.background import in_background\ndef work():\n    {work}\nin_background(work, 'slow').result()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.send_signal(signal.SIGINT)
            assert child.wait(timeout=20) != 0
        finally:
            child.kill()
