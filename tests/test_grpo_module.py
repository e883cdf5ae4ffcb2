"""GRPO windows: gradients that no split can change, anchors, hooks and their order, and windows without any signal."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_policies import POLICIES, TinyPrompts, ragged, tokenizer, weights_of

from theodolite.callbacks.direction_sources import HaarRandom
from theodolite.callbacks.gradient_projection import GradientProjectionCallback
from theodolite.lightning_modules import GRPOModule
from theodolite.lightning_modules.grpo.hooks import oracle_users
from theodolite.lightning_modules.split_prefix import take_apart
from theodolite.protocols import OracleWindow, Reward, Rollout, TokenSequence, Window

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False}
MAX_NEW_TOKENS = 12


def made(tmp_path: Path | None = None, **settings: Any) -> GRPOModule:
    defaults: dict[str, Any] = {"policy": POLICIES["qwen3"], "train_tokenizer": {"vocab_size": 280}, "max_new_tokens": MAX_NEW_TOKENS}
    return GRPOModule(**(defaults | {"group_size": 4, "lr": 1e-3, "export": False, "seed": 3} | settings))


def trainer_of(path: Path, *callbacks: Any, steps: int = 2, **options: Any) -> Trainer:
    fixed: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    limits = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "default_root_dir": path, "log_every_n_steps": 1}
    return Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **(fixed | limits | options))


def fitted(path: Path, *callbacks: Any, data: TinyPrompts | None = None, steps: int = 2, **settings: Any) -> tuple[GRPOModule, Trainer]:
    module, trainer = made(**settings), trainer_of(path, *callbacks, steps=steps)
    trainer.fit(module, datamodule=data or TinyPrompts())
    return module, trainer


# -- no split of a window changes its gradient --------------------------------------------------------------------------------------------

GROUP = 4
SHAPES = (
    [(9, n) for n in (4, 12, 1, 7)] + [(3, n) for n in (5, 0, 2, 2)] + [(17, n) for n in (6, 6, 3, 11)] + [(2, n) for n in (8, 1, 4, 9)]
)
TWINS = {7: 6, 9: 8}
"""Rollouts that repeat another of their group, token for token."""


def still(kind: str, lora: bool, shared_prefix: bool = True, **settings: Any) -> GRPOModule:
    """A module at rest, in float64, with a Trainer that can run its backward passes."""
    module = made(policy=POLICIES[kind], lora=LORA if lora else None, shared_prefix=shared_prefix, **settings)
    module._tokenizer = tokenizer()
    module._build_tokenizer = tokenizer  # pyright: ignore
    module.configure_model()
    module.double().eval()
    for reference in module._reference:
        reference.double()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(1.05)
    trainer = trainer_of(Path("unused"))
    module.trainer = trainer
    trainer.strategy._lightning_module = module
    return module


def window() -> Window:
    rollouts = []
    for i, sequence in enumerate(ragged(SHAPES)):
        tokens = sequence if i not in TWINS else rollouts[TWINS[i]].tokens
        log_probs = (-1.0,) * len(tokens.completion_ids)
        rollouts.append(Rollout(tokens, "", log_probs, "stop", f"p{i // GROUP}", i // GROUP, i % GROUP, 0))
    values = torch.tensor([0.0, 1, 0.5, 1, 1, 0, 0, 0.25, 0, 1, 1, 0.3, 0, 0, math.nan, 1], dtype=torch.float64)
    rewards = [Reward(float(value), value > 0.5, True) for value in values.tolist()]
    return Window(0, [], rollouts, rewards, GROUP, values)


def gradient(module: GRPOModule, split: str, merge: bool) -> tuple[Tensor, float]:
    """``p.grad`` and the logged loss of the window, computed in one of many ways."""
    w = window()
    w.advantages = module.global_advantages(w.values)
    totals = module.totals(w)
    repeats = module.merge_repeats(w) if merge else torch.ones(len(w.rollouts), dtype=torch.float64)
    active = [i for microbatch in module.microbatches(w, repeats) for i in microbatch]
    parts: dict[str, list[list[int]]] = {
        "one": [active],
        "six": [active[i : i + -(-len(active) // 6)] for i in range(0, len(active), -(-len(active) // 6))],
        "uneven": [active[:1], active[1:8], active[8:]],
        "singles": [[i] for i in reversed(active)],
        "with an idle one": [active[:5], [5], active[5:]],  # rollout 5 is empty: nothing in it is a loss token
        "two ranks": [[i for i in active if w.rollouts[i].slot % 2 == rank] for rank in (0, 1)],
    }
    anchors = module.anchor_log_probs(w, parts[split])
    module.zero_grad()
    sums = module.accumulate(w, parts[split], totals, repeats, anchors)
    found = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in module.trainable_parameters()])
    return found, sums["loss"][0]


def by_definition(module: GRPOModule) -> Tensor:
    """The window's gradient from one forward pass per rollout and a loop over its tokens."""
    w = window()
    advantages = module.global_advantages(w.values).tolist()
    scorable = [i for i in range(len(w.rollouts)) if not math.isnan(float(w.values[i]))]
    lengths = {i: len(w.rollouts[i].tokens.completion_ids) for i in scorable}
    terms = []
    for i in scorable:
        tokens = w.rollouts[i].tokens
        if not lengths[i]:
            continue
        ids = torch.tensor([tokens.prompt_ids + tokens.completion_ids])
        start = len(tokens.prompt_ids) - 1
        log_probs = module.causal_lm(input_ids=ids).logits[0].double().log_softmax(-1)[start:-1]
        log_probs = log_probs.gather(-1, ids[0, start + 1 :, None])[:, 0]
        term = -advantages[i] * log_probs
        if module.beta:
            reference = one_reference(module, ids, start)
            difference = log_probs - reference
            term = term + module.beta * difference.square() / 2  # the gradient of k2 is that of k3_is on policy
        sequences = sum(n > 0 for n in lengths.values())
        shares = {"dapo": 1 / sum(lengths.values()), "dr_grpo": 1 / (len(scorable) * MAX_NEW_TOKENS)}
        share = (shares | {"grpo": 1 / (lengths[i] * sequences), "seq_mean_token_sum": 1 / sequences})[module.aggregation]
        terms.append(share * term.sum())
    found = torch.autograd.grad(torch.stack(terms).sum(), module.trainable_parameters(), allow_unused=True)
    return torch.cat(
        [g.flatten() if g is not None else torch.zeros(p.numel()) for g, p in zip(found, module.trainable_parameters(), strict=True)]
    )


@torch.no_grad()
def one_reference(module: GRPOModule, ids: Tensor, start: int) -> Tensor:
    model: Any = module.causal_lm
    if module.lora is not None:
        with model.disable_adapter():
            logits = model(input_ids=ids).logits[0]
    else:
        logits = module._reference[0](input_ids=ids).logits[0]
    return logits.double().log_softmax(-1)[start:-1].gather(-1, ids[0, start + 1 :, None])[:, 0]


EVERY_SPLIT = ("one", "six", "uneven", "singles", "with an idle one", "two ranks")
OTHERS = ("dr_grpo", "grpo", "seq_mean_token_sum")
OBJECTIVES: list[Any] = [("dapo", beta, lora) for beta in (0.0, 0.3) for lora in (False, True)] + [(name, 0.0, True) for name in OTHERS]
OBJECTIVES += [pytest.param(name, 0.3, False, marks=pytest.mark.slow) for name in OTHERS]


@pytest.mark.parametrize(("aggregation", "beta", "lora"), OBJECTIVES)
def test_gradient_is_the_definition_s_for_every_split_path_and_merge(aggregation: str, beta: float, lora: bool) -> None:
    settings: dict[str, Any] = {"aggregation": aggregation, "beta": beta}
    reference, losses, worst = None, [], 0.0
    for path in ("padded", "shared", "split"):
        module = still("qwen3", lora, path != "padded", **settings)
        module.backbone = take_apart(module.causal_lm) if path == "split" else None
        reference = by_definition(module) if reference is None else reference
        for merge, splits in ((True, EVERY_SPLIT), (False, ("uneven", "two ranks"))):
            for split in splits:
                found, loss = gradient(module, split, merge)
                worst = max(worst, float((found - reference).norm() / reference.norm()))
                losses.append(loss)
    print(f"{aggregation} beta={beta} lora={lora}: largest relative deviation {worst:.1e}")
    assert worst < 1e-6
    assert max(losses) - min(losses) < 1e-6


def test_merging_leaves_one_rollout_per_distinct_completion_and_none_off_policy() -> None:
    module, w = still("qwen3", False), window()
    w.advantages = module.global_advantages(w.values)
    before = w.advantages.clone()
    repeats = module.merge_repeats(w)
    assert repeats[[6, 7, 8, 9]].tolist() == [2, 0, 2, 0]
    assert repeats.sum() == len(w.rollouts)
    assert float(w.advantages[8]) == pytest.approx(float(before[8] + before[9]) / 2)
    assert made(updates_per_window=2).merge_repeats(w).tolist() == [1.0] * len(w.rollouts)


# -- hooks --------------------------------------------------------------------------------------------------------------------------------


class Order(Callback):
    """Writes down what is called, and the gradient norm at every point."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.norms: dict[str, list[float]] = {}
        self.windows: list[type] = []

    def _note(self, name: str, module: Any) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.calls.append(name)
        self.norms.setdefault(name, []).append(float(torch.stack([g.norm() for g in gradients]).norm()) if gradients else 0.0)

    def on_rollouts(self, trainer: Any, pl_module: Any, window: Window) -> None:
        self.windows.append(type(window))
        assert not hasattr(window, "verdicts")
        assert window.advantages.numel() == 0
        self._note("rollouts", pl_module)

    def on_advantages(self, trainer: Any, pl_module: Any, window: Window) -> None:
        assert window.advantages.numel() == len(window.rollouts)
        self._note("advantages", pl_module)

    def on_microbatch_gradients(self, trainer: Any, pl_module: Any, window: Window, part: str) -> None:
        assert part == "policy"
        self._note("microbatch", pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._note("before step", pl_module)

    def on_after_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._note("after step", pl_module)


def test_hooks_come_in_order_once_per_step_and_before_the_clip(tmp_path: Path) -> None:
    order = Order()
    fitted(tmp_path, order, steps=3, max_grad_norm=1e-3, micro_batch_size=8, lr=0.0)
    calls = [call for i, call in enumerate(order.calls) if i == 0 or call != order.calls[i - 1]]
    assert calls == ["rollouts", "advantages", "microbatch", "before step", "after step"] * 3
    assert order.calls.count("microbatch") > 3
    assert (
        order.norms["before step"][0] == order.norms["microbatch"][order.calls[: order.calls.index("before step")].count("microbatch") - 1]
    )
    assert min(order.norms["before step"]) > 2e-3
    assert order.norms["after step"] == [pytest.approx(1e-3, rel=1e-3)] * 3


class SGDModule(GRPOModule):
    """GRPO whose update is the gradient."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.trainable_parameters(), lr=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)}}


class ClipFirst(SGDModule):
    """The mistake: clips before the callbacks have seen the gradient, and again after them."""

    def _hook(self, name: str, window: Window, verdicts: Any, *extra: Any) -> None:
        super()._hook(name, window, verdicts, *extra)
        if name == "on_microbatch_gradients":
            torch.nn.utils.clip_grad_norm_(self.trainable_parameters(), self.max_grad_norm)

    def on_before_optimizer_step(self, optimizer: Any) -> None: ...


class Before(Callback):
    """The gradient that the next callback in the list is handed."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("module_class", [SGDModule, ClipFirst])
def test_applied_update_has_no_component_along_the_direction_and_is_the_clipped_projection(tmp_path: Path, module_class: type) -> None:
    settings: dict[str, Any] = {"policy": POLICIES["qwen3"], "train_tokenizer": {"vocab_size": 280}, "max_new_tokens": MAX_NEW_TOKENS}
    module = module_class(**settings, group_size=4, export=False, max_grad_norm=1e-2)
    projection, before = GradientProjectionCallback(HaarRandom(k=2), gate="two_sided", preserve_magnitude=False), Before()
    trainer = trainer_of(tmp_path, before, projection, steps=1)
    start: dict[str, Tensor] = {}

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            start.update(weights_of(pl_module))

    trainer.callbacks.append(Start())  # pyright: ignore
    trainer.fit(module, datamodule=TinyPrompts())
    assert projection.current is not None
    applied = {name: value - start[name] for name, value in weights_of(module).items()}
    size = torch.stack([update.norm() for update in applied.values()]).norm()
    directions = {name: vectors.flatten(1) for name, vectors in projection.current.vectors.items()}
    for name, rows in directions.items():
        assert float((rows @ applied[name].flatten()).abs().max()) < 1e-6
    expected = dict(before.gradients[0])
    for name, rows in directions.items():
        flat = expected[name].flatten()
        expected[name] = (flat - rows.T @ (rows @ flat)).view_as(expected[name])
    norm = float(torch.stack([g.norm() for g in expected.values()]).norm())
    unclipped = float(torch.stack([g.norm() for g in before.gradients[0].values()]).norm())
    right = unclipped > 2e-2 and float(size) == pytest.approx(0.5 * 1e-2, rel=1e-3)
    if right:
        for name, gradient in expected.items():
            torch.testing.assert_close(applied[name], -0.5 * gradient * 1e-2 / norm, atol=1e-6, rtol=0)
    assert right == (module_class is SGDModule), "clipping first must be noticed, and only that"


class Peeker(Callback):
    uses_oracle = True

    def __init__(self) -> None:
        self.labels: list[str] = []

    def on_rollouts(self, trainer: Any, pl_module: Any, window: OracleWindow) -> None:
        self.labels += [verdict.label for verdict in window.verdicts]
        window.values = window.values * 2

    def on_advantages(self, trainer: Any, pl_module: Any, window: OracleWindow) -> None:
        window.advantages = torch.zeros_like(window.advantages)


def test_only_a_callback_that_asks_by_name_sees_verdicts_and_it_is_announced(tmp_path: Path, caplog: Any) -> None:
    blind, peeker = Order(), Peeker()
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fitted(tmp_path, blind, peeker, steps=1)
    assert blind.windows == [Window]
    assert len(peeker.labels) == 16
    assert set(peeker.labels) <= {"correct", "reward_hack", "incorrect"}
    assert oracle_users([blind, peeker]) == ["Peeker"]
    assert "uses_oracle: Peeker" in caplog.text
    assert "microbatch" not in blind.calls, "advantages that a callback sets to zero leave nothing to learn"


# -- old and reference log-probabilities ---------------------------------------------------------------------------------------------------


def recording(module: GRPOModule) -> list[dict[str, Any]]:
    """Every microbatch's loss call of a module, from now on."""
    calls: list[dict[str, Any]] = []
    original = module.microbatch_loss

    def spy(window: Window, indices: Any, totals: Any, repeats: Any, old: Any, reference: Any) -> Any:
        sequences = [window.rollouts[i].tokens for i in indices]
        with torch.no_grad():
            now = module.completion_log_probs(sequences)[0]
        loss, sums = original(window, indices, totals, repeats, old, reference)
        calls.append({"now": now, "old": old, "reference": reference, "sums": sums, "sequences": sequences})
        return loss, sums

    module.microbatch_loss = spy  # pyright: ignore
    return calls


def test_second_update_of_a_window_is_clipped_against_the_log_probs_before_the_first(tmp_path: Path) -> None:
    module = made(updates_per_window=3, lr=0.05, clip_low=0.01, clip_high=0.01)
    calls = recording(module)
    trainer = trainer_of(tmp_path, steps=3)
    trainer.fit(module, datamodule=TinyPrompts())
    assert trainer.global_step == 3
    first, second, third = calls
    torch.testing.assert_close(first["old"], first["now"], atol=1e-6, rtol=0)
    assert torch.equal(first["old"], second["old"])
    assert torch.equal(first["old"], third["old"])
    assert float((second["now"] - second["old"]).abs().max()) > 1e-2
    fractions = [call["sums"]["clip_fraction"][0] for call in calls]
    assert fractions[0] == 0
    assert fractions[1] > 0


def test_without_several_updates_nothing_is_scored_twice(tmp_path: Path) -> None:
    module = made()
    calls = recording(module)
    trainer_of(tmp_path, steps=2).fit(module, datamodule=TinyPrompts())
    assert all(call["old"] is None and call["reference"] is None for call in calls)
    gaps = [call["sums"]["sampler_gap"] for call in calls]
    assert max(total / count for total, count in gaps) < 1e-5, "the sampler's log-probabilities are the trainer's"


def test_reference_of_an_adapter_is_the_base_model(tmp_path: Path) -> None:
    module = made(lora=LORA, beta=0.1, lr=0.05)
    calls = recording(module)
    trainer_of(tmp_path, steps=2).fit(module, datamodule=TinyPrompts())
    base = made(seed=3)
    base._build_tokenizer = lambda: module.tokenizer  # pyright: ignore
    base.configure_model()
    base.causal_lm.eval()
    for call in calls:
        expected, _ = base.completion_log_probs(call["sequences"])
        torch.testing.assert_close(call["reference"], expected.detach(), atol=1e-5, rtol=0)
        assert float((call["reference"] - call["now"]).abs().max()) > 1e-2
    assert not module._reference


def test_reference_of_full_fine_tuning_is_a_frozen_copy_that_nothing_saves_or_trains(tmp_path: Path) -> None:
    module = made(beta=0.1, lr=0.05)
    calls = recording(module)
    trainer = trainer_of(tmp_path, steps=3)
    trainer.fit(module, datamodule=TinyPrompts())
    (reference,) = module._reference
    torch.testing.assert_close(calls[0]["reference"], calls[0]["now"], atol=1e-5, rtol=0)
    assert float((calls[-1]["reference"] - calls[-1]["now"]).abs().max()) > 1e-2
    assert calls[-1]["sums"]["kl"][0] > 0
    own = {id(parameter) for parameter in module.parameters()}
    assert not own & {id(parameter) for parameter in reference.parameters()}
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in reference.parameters())
    fresh = made(beta=0.1)
    fresh._build_tokenizer = lambda: module.tokenizer  # pyright: ignore
    fresh.configure_model()
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), fresh.causal_lm.parameters(), strict=True))
    assert all(name.startswith("model.") for name in module.state_dict())
    assert len(module.state_dict()) == len(fresh.causal_lm.state_dict())


def test_reference_is_the_policy_before_training_also_after_a_resume(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"beta": 0.5, "lr": 0.05}
    whole, _ = fitted(tmp_path, steps=4, **settings)
    _, half = fitted(tmp_path, steps=2, **settings)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = made(**settings)
    trainer_of(tmp_path, steps=4).fit(resumed, datamodule=TinyPrompts(), ckpt_path=tmp_path / "half.ckpt")
    for name, value in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], value), name


def test_dropout_is_off_in_every_forward_pass(tmp_path: Path) -> None:
    module = made(policy=POLICIES["gpt2"] | {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}, updates_per_window=2, beta=0.1)
    calls = recording(module)
    trainer_of(tmp_path, steps=4).fit(module, datamodule=TinyPrompts())
    torch.testing.assert_close(calls[0]["old"], calls[0]["now"], atol=1e-6, rtol=0)
    torch.testing.assert_close(calls[0]["reference"], calls[0]["now"], atol=1e-5, rtol=0)


# -- windows without signal ---------------------------------------------------------------------------------------------------------------


class Spoil(Callback):
    """Turns a window into a degenerate one."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_rollouts(self, trainer: Any, pl_module: Any, window: Window) -> None:
        if self.how == "empty completions":
            for rollout in window.rollouts:
                rollout.tokens = TokenSequence(rollout.tokens.prompt_ids, ())
                rollout.sampler_log_probs = ()
        if self.how == "one group":
            window.values = torch.where(torch.arange(len(window.values)) < window.group_size, window.values, 0.5)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("aggregation", ["dapo", "dr_grpo", "grpo"])
@pytest.mark.parametrize("how", ["all_nan", "nan", "constant", "empty completions", "one group", "truncated"])
def test_degenerate_windows_are_steps_like_any_other(tmp_path: Path, how: str, aggregation: str, beta: float) -> None:
    data = TinyPrompts(rewards=how if how in ("all_nan", "nan", "constant") else "mixed")
    length = 1 if how == "truncated" else MAX_NEW_TOKENS
    module, trainer = fitted(tmp_path, Spoil(how), data=data, steps=2, aggregation=aggregation, beta=beta, max_new_tokens=length, lr=0.01)
    assert trainer.global_step == 2
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert math.isfinite(logged["train/loss"])
    assert math.isnan(logged["train/reward_mean"]) == (how == "all_nan")
    assert logged["train/infra_error_rate"] == pytest.approx(1.0 if how == "all_nan" else logged["train/infra_error_rate"])
    if how in ("all_nan", "constant") and beta == 0:
        fresh = made()
        fresh._build_tokenizer = lambda: module.tokenizer  # pyright: ignore
        fresh.configure_model()
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), module.parameters(), strict=True))
        assert logged["train/groups_with_signal"] == 0


def test_unscorable_samples_leave_advantages_denominators_and_rates() -> None:
    module, w = still("qwen3", False), window()
    w.advantages = module.global_advantages(w.values)
    totals = module.totals(w)
    assert w.advantages[14] == 0
    assert (totals.rollouts, totals.sequences) == (15, 14)
    assert totals.tokens == sum(len(w.rollouts[i].tokens.completion_ids) for i in range(16) if i != 14)
    assert 14 not in [i for microbatch in module.microbatches(w, torch.ones(16)) for i in microbatch]


# -- configs that cannot work -------------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"group_size": 1}, "at least 2 completions"),
    ({"updates_per_window": 0}, "updates_per_window is 0"),
    ({"beta": -0.1}, "beta is -0.1"),
    ({"aggregation": "bnpo"}, "dapo, dr_grpo, grpo"),
    ({"advantage_scale": "std"}, "none, group, batch"),
    ({"kl_estimator": "k1"}, "k2, k3, k3_is"),
    ({"schedule": "step"}, "constant, linear or cosine"),
    ({"train_tokenizer": None}, "model.tokenizer or model.train_tokenizer"),
    ({"lora": LORA, "trainable": ["*"]}, "exclude one another"),
    ({"lora": {"rank": 4}}, "unknown key 'rank'"),
    ({"lora": LORA, "export": True}, "adapter without its base"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
]


@pytest.mark.parametrize(("settings", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_settings_that_cannot_work_are_refused_in_one_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(**settings)


def test_batch_that_does_not_split_names_one_that_does(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="microbatches of 5; 4 would"):
        fitted(tmp_path, micro_batch_size=5)
