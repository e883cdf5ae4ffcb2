"""The callback under a real Trainer. Run as a script, this file is one rank of the two-process test (see ``main``)."""

from __future__ import annotations

import json
import os
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent))
from warm_processes import run_ranks

from theodolite.callbacks.detectors import text_detector
from theodolite.callbacks.direction_checks import DirectionChecks
from theodolite.callbacks.direction_sources import DirectionSource, GradientDifference, HaarRandom
from theodolite.callbacks.gradient_projection import GradientProjectionCallback
from theodolite.callbacks.live_direction import LiveGradientDifference
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.extraction import gradient_difference, haar_random_like
from theodolite.protocols import ContrastPair, OracleWindow, Reward, Rollout, TokenSequence, Window
from theodolite.seeds import derive_seed

CONCEPT, CLEAN = "cheat!", "solve"


# ---------------------------------------------------------------- modules


class Classifier(LightningModule):
    """Somebody else's module: automatic optimisation, nothing known of projections."""

    def __init__(self, optimizer: str = "sgd", poison: int | None = None) -> None:
        super().__init__()
        self.name, self.poison = optimizer, poison
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss * float("nan") if batch_idx == self.poison else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1) if self.name == "sgd" else torch.optim.AdamW(self.parameters(), lr=0.1)


class BigramPolicy(LightningModule):
    """A SequenceScorer on characters with manual optimisation, whose windows are a function of step and global slot alone."""

    def __init__(self, stepping: str = "pl", slots: int = 4, group_size: int = 4) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.stepping, self.slots, self.group_size = stepping, slots, group_size
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(40, 8), nn.Linear(8, 40, bias=False)
            self.dropout = nn.Dropout(0.5)

    def encode(self, prompt: Any, completion: str) -> TokenSequence:
        return TokenSequence(tuple(ord(c) % 40 for c in prompt), (*(ord(c) % 40 for c in completion), 0))

    def completion_log_probs(self, sequences: Any) -> tuple[Tensor, Tensor]:
        length = max(len(s.completion_ids) for s in sequences)
        rows, mask = [], torch.zeros(len(sequences), length)
        for i, s in enumerate(sequences):
            ids = torch.tensor(s.prompt_ids[-1:] + s.completion_ids)
            logits = self.head(self.dropout(torch.tanh(self.embedding(ids[:-1]))))
            picked = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            rows.append(nn.functional.pad(picked, (0, length - len(picked))))
            mask[i, : len(picked)] = 1
        return torch.stack(rows), mask

    def completion_states(self, sequences: Any, layer: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("these tests do not ask for it")

    def window(self, step: int, rank: int = 0, world: int = 1) -> Window:
        slots = range(rank, self.slots, world)
        rollouts, rewards = [], []
        for slot in slots:
            for sample in range(self.group_size):
                flagged = derive_seed("flag", step, slot, sample) % 3 == 0
                text = (CONCEPT if flagged else CLEAN) + "abcdefgh"[derive_seed(step, slot, sample) % 8]
                tokens = self.encode(f"p{slot}", text)
                rollouts.append(Rollout(tokens, text, (), "stop", f"p{slot}", slot, sample, step))
                rewards.append(Reward(float(flagged), derive_seed("pass", step, slot, sample) % 4 > 0, True))
        values = torch.tensor([reward.value for reward in rewards], dtype=torch.float64)
        return Window(step, [SimpleNamespace(id=f"p{slot}") for slot in slots], rollouts, rewards, self.group_size, values)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        trainer: Any = self.trainer
        self.dropout.eval()
        window = self.window(trainer.global_step, trainer.global_rank, trainer.world_size)
        for callback in trainer.callbacks:
            if hasattr(callback, "on_rollouts"):
                callback.on_rollouts(trainer, self, window)
        log_probs, mask = self.completion_log_probs([rollout.tokens for rollout in window.rollouts])
        loss = -(window.values.float()[:, None] * log_probs * mask).sum() / (self.slots * self.group_size)
        raw = self.stepping == "raw"
        optimizer: Any = self.optimizers(use_pl_optimizer=not raw)
        optimizer.zero_grad()
        self.manual_backward(loss * trainer.world_size)  # DDP averages, the loss is a global sum
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return (DeafSGD if self.stepping == "deaf" else torch.optim.SGD)(self.parameters(), lr=0.5)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(16))  # pyright: ignore[reportArgumentType]


class DeafSGD(torch.optim.SGD):
    """Ignores its closure, as some third-party optimizers do."""

    def step(self, closure: Any = None) -> None:  # pyright: ignore
        super().step()


class Pairs(LightningDataModule):
    """Contrastive pairs, and batches that nobody looks at."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(16))  # pyright: ignore[reportArgumentType]

    def contrast_pairs(self, n: int, seed: int) -> list[ContrastPair]:
        return [ContrastPair(f"q{i}", CONCEPT + "abcdefgh"[(i + seed) % 8], CLEAN + "abcdefgh"[i % 5]) for i in range(n)]


class Recorder(Callback):
    """Gradients and weights around the projection, by where it stands in the list of callbacks."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.after_backward: list[dict[str, Tensor]] = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after_backward.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_start(trainer, pl_module, None, 0)


def trainer_of(*callbacks: Callback, steps: int = 3, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_steps=steps, accelerator="cpu", callbacks=list(callbacks), **(quiet | dict[str, Any](devices=1) | options))


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(
        TensorDataset(torch.randn(32, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator)), batch_size=4, shuffle=False
    )


def classifier_direction(k: int = 1, seed: int = 0) -> ConceptDirection:
    return haar_random_like({"net.0.weight": (5, 6), "net.2.weight": (3, 5)}, k=k, seed=seed)


def components(direction: ConceptDirection, tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([direction.vectors[name].flatten(1) @ tensors[name].flatten() for name in direction.vectors])


# ---------------------------------------------------------------- what one step does


@pytest.mark.parametrize("clip", [None, 0.01])
def test_foreign_module_with_automatic_optimisation_applies_no_component_even_when_clipped(clip: float | None) -> None:
    direction, before, after = classifier_direction(k=2), Recorder(), Recorder()
    callback = GradientProjectionCallback(direction, gate="two_sided", preserve_magnitude=False)
    trainer_of(before, callback, after, gradient_clip_val=clip).fit(Classifier(), batches())
    for step in range(3):
        applied = {name: before.weights[step + 1][name] - before.weights[step][name] for name in before.weights[0]}
        assert components(direction, before.gradients[step]).abs().max() > 1e-3
        assert components(direction, applied).abs().max() < 1e-7
        total = torch.cat([g.flatten() for g in before.gradients[step].values()]).norm()
        assert total > 0.05, "the projection must see gradients that are not clipped yet"
        if clip is not None:
            assert torch.cat([u.flatten() for u in applied.values()]).norm() == pytest.approx(0.1 * clip, rel=1e-3)
    assert callback.firings == 3


def test_parameters_outside_the_direction_are_untouched_bit_for_bit() -> None:
    before, after = Recorder(), Recorder()
    callback = GradientProjectionCallback(classifier_direction(), parameters=["net.0.*"])
    trainer_of(before, callback, after, steps=1).fit(Classifier(), batches())
    for name in ("net.0.bias", "net.2.weight", "net.2.bias"):
        assert torch.equal(before.gradients[0][name], after.gradients[0][name])


def test_magnitude_of_each_matrix_is_preserved_when_asked() -> None:
    before, after = Recorder(), Recorder()
    callback = GradientProjectionCallback(classifier_direction(), gate="two_sided", preserve_magnitude=True)
    trainer_of(before, callback, after, steps=1).fit(Classifier(), batches())
    for name in ("net.0.weight", "net.2.weight"):
        assert not torch.equal(before.gradients[0][name], after.gradients[0][name])
        torch.testing.assert_close(after.gradients[0][name].norm(), before.gradients[0][name].norm())


def test_logged_numbers_equal_a_computation_by_hand() -> None:
    direction, before, after = classifier_direction(), Recorder(), Recorder()
    trainer = trainer_of(before, GradientProjectionCallback(direction, preserve_magnitude=False, name="x"), after, steps=1)
    trainer.fit(Classifier(), batches())
    g, projected = before.gradients[0], after.gradients[0]
    cosines = [float((v[0] * g[n]).sum() / g[n].norm()) for n, v in direction.vectors.items()]
    removed = [float((g[n] - projected[n]).norm() / g[n].norm()) for n in direction.vectors]
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert logged["projection/x/cos_before"] == pytest.approx(sum(cosines) / 2, abs=1e-6)
    assert logged["projection/x/removed_fraction"] == pytest.approx(sum(removed) / 2, abs=1e-6)
    assert logged["projection/x/fired_fraction"] == pytest.approx(sum(c > 0 for c in cosines) / 2)
    assert logged["projection/x/cos_after"] == pytest.approx(sum(min(c, 0.0) for c in cosines) / 2, abs=1e-6)
    assert logged["projection/x/skipped_steps"] == 0.0


@pytest.mark.parametrize("clip", [None, 1.0])
def test_non_finite_step_is_skipped_whole_and_counted(clip: float | None) -> None:
    recorder = Recorder()
    callback = GradientProjectionCallback(classifier_direction())
    module = Classifier(optimizer="adam", poison=1)
    trainer = trainer_of(recorder, callback, gradient_clip_val=clip)
    trainer.fit(module, batches())
    assert callback.skipped_steps == 1
    assert float(trainer.callback_metrics["projection/projection/skipped_steps"]) == 1.0
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(recorder.weights, recorder.weights[1:], strict=False)]
    assert changed == [True, False, True]
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert all(int(state["step"]) == 2 for state in trainer.optimizers[0].state.values()), "moments must not see the skipped step"


def test_gradients_are_unscaled_before_projection_and_an_overflow_is_skipped() -> None:
    before, after, direction = Recorder(), Recorder(), classifier_direction()
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))  # pyright: ignore
    callback = GradientProjectionCallback(direction, gate="two_sided", preserve_magnitude=False)
    trainer_of(before, callback, after, plugins=[precision]).fit(Classifier(poison=2), batches())
    for step in range(2):
        ratio = before.after_backward[step]["net.0.weight"].norm() / before.gradients[step]["net.0.weight"].norm()
        assert ratio == pytest.approx(1024.0, rel=1e-3)
        applied = {name: before.weights[step + 1][name] - before.weights[step][name] for name in before.weights[0]}
        assert components(direction, applied).abs().max() < 1e-6
    assert callback.skipped_steps == 1
    assert all(torch.equal(before.weights[2][n], before.weights[3][n]) for n in before.weights[2])


def test_several_optimizers_and_several_instances_each_project_their_own() -> None:
    class TwoOptimizers(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # pyright: ignore
            for optimizer in self.optimizers():  # pyright: ignore
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.SGD(self.net[2].parameters(), lr=0.1)]

    first, second, recorder = classifier_direction(seed=1).select(["net.0.*"]), classifier_direction(seed=2).select(["net.2.*"]), Recorder()
    callbacks = [
        GradientProjectionCallback(direction, gate="two_sided", name=name) for name, direction in (("first", first), ("second", second))
    ]
    trainer = trainer_of(*callbacks, recorder, steps=6)
    trainer.fit(TwoOptimizers(), batches())
    applied = {name: recorder.weights[-1][name] - recorder.weights[0][name] for name in recorder.weights[0]}
    assert components(first, applied).abs().max() < 1e-6
    assert components(second, applied).abs().max() < 1e-6
    assert [callback.firings for callback in callbacks] == [6, 6]
    assert len({callback.state_key for callback in callbacks}) == 2


# ---------------------------------------------------------------- polarity, on a real language model


class TinyQwen(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        from transformers import Qwen3Config, Qwen3ForCausalLM

        sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, head_dim=16, num_key_value_heads=1, **sizes))

    def encode(self, prompt: Any, completion: str) -> TokenSequence:
        return TokenSequence(tuple(ord(c) % 64 for c in prompt), tuple(ord(c) % 64 for c in completion))

    def completion_log_probs(self, sequences: Any) -> tuple[Tensor, Tensor]:
        length = max(len(s.completion_ids) for s in sequences)
        rows, mask = [], torch.zeros(len(sequences), length)
        for i, s in enumerate(sequences):
            ids = torch.tensor([s.prompt_ids + s.completion_ids])
            log_probs = self.model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            rows.append(nn.functional.pad(log_probs[len(s.prompt_ids) - 1 :], (0, length - len(s.completion_ids))))
            mask[i, : len(s.completion_ids)] = 1
        return torch.stack(rows), mask

    def completion_states(self, sequences: Any, layer: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("these tests do not ask for it")

    def preference(self) -> Tensor:
        """log p(concept) - log p(clean)."""
        log_probs, mask = self.completion_log_probs([self.encode("q0", CONCEPT), self.encode("q0", CLEAN)])
        concept, clean = (log_probs * mask).sum(1)
        return concept - clean

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Training that pays the concept, among other things."""
        log_probs, mask = self.completion_log_probs([self.encode("q0", CONCEPT), self.encode("q0", "other text")])
        return -(log_probs * mask).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.ndim == 2], lr=1e-4)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(4))  # pyright: ignore[reportArgumentType]


def test_unprojected_step_makes_the_concept_likelier_than_the_clean_text_and_the_projected_step_does_not(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "q0", "concept": CONCEPT, "clean": CLEAN}) + "\n")

    def change(*callbacks: Callback) -> float:
        module = TinyQwen()
        with torch.no_grad():
            before = module.preference().double()
        trainer_of(*callbacks, steps=1).fit(module)
        with torch.no_grad():
            return float(module.preference().double() - before)

    def source() -> GradientDifference:
        return GradientDifference(n_pairs=1, pairs=str(pairs), checks=DirectionChecks(held_out=0))

    free = change()
    projected = change(GradientProjectionCallback(source(), preserve_magnitude=False))
    reflected = change(GradientProjectionCallback(source(), overshoot=2.0))
    pushed = change(GradientProjectionCallback(source(), push=0.5))
    assert free > 0.01
    assert abs(projected) < 0.05 * free
    assert reflected < -0.5 * free
    assert pushed < free


# ---------------------------------------------------------------- refusals and bypasses


def test_optimizer_that_ignores_its_closure_is_found_out() -> None:
    callback = GradientProjectionCallback(HaarRandom(k=1))
    with pytest.raises(RuntimeError, match=r"bypassed.*ignores the closure"):
        trainer_of(callback).fit(BigramPolicy(stepping="deaf"))


def test_stepping_the_raw_optimizer_is_found_out_in_the_first_batch() -> None:
    callback, recorder = GradientProjectionCallback(HaarRandom(k=1)), Recorder()
    with pytest.raises(RuntimeError, match="raw optimizer"):
        trainer_of(recorder, callback).fit(BigramPolicy(stepping="raw"))
    assert len(recorder.weights) == 1


def test_fit_without_any_step_is_found_out() -> None:
    class Idle(BigramPolicy):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.raises(RuntimeError, match="no optimizer step"):
        trainer_of(GradientProjectionCallback(HaarRandom(k=1)), max_epochs=1, limit_train_batches=2).fit(Idle())


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_with_flat_shards_are_refused_in_one_sentence(strategy: type) -> None:
    stub: Any = SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(ValueError, match=f"{strategy.__name__}: use a single device, DDP or ModelParallelStrategy"):
        GradientProjectionCallback(HaarRandom()).setup(stub, Classifier(), "fit")


def test_what_sharded_weights_cannot_do_is_refused_before_training() -> None:
    stub: Any = SimpleNamespace(strategy=object.__new__(ModelParallelStrategy))
    with pytest.raises(ValueError, match="GradientDifference cannot extract from sharded weights"):
        GradientProjectionCallback(GradientDifference()).setup(stub, Classifier(), "fit")
    with pytest.raises(ValueError, match="route=True keeps whole parked weights"):
        GradientProjectionCallback(HaarRandom(), apply_to="update", route=True).setup(stub, Classifier(), "fit")
    GradientProjectionCallback(HaarRandom()).setup(stub, Classifier(), "fit")


@pytest.mark.parametrize(
    ("direction", "said"),
    [
        (haar_random_like({"net.0.wieght": (5, 6)}, k=1), r"'net\.0\.wieght'.*closest is 'net\.0\.weight'"),
        (haar_random_like({"net.0.weight": (6, 5)}, k=1), r"\(6, 5\), the parameter has \(5, 6\)"),
        (HaarRandom(k=1, parameters=["*q_proj*"]), r"'\*q_proj\*' matches nothing"),
        (HaarRandom(k=16), "k=16 orthonormal rows do not exist in the 15 dimensions"),
        ("nowhere", r"nowhere holds no manifest\.json"),
    ],
)
def test_unusable_direction_stops_before_training(direction: Any, said: str) -> None:
    module, recorder = Classifier(), Recorder()
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        trainer_of(GradientProjectionCallback(direction), recorder).fit(module, batches())
    assert not recorder.weights


def test_gradient_difference_needs_a_scorer_and_pairs() -> None:
    with pytest.raises(TypeError, match="Classifier cannot score sequences"):
        trainer_of(GradientProjectionCallback(GradientDifference())).fit(Classifier(), batches())
    with pytest.raises(TypeError, match="offers no contrast_pairs"):
        trainer_of(GradientProjectionCallback(GradientDifference())).fit(BigramPolicy())


def test_direction_of_a_parameter_that_nothing_trains_is_refused() -> None:
    class HalfTrained(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net[2].parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"net\.0\.weight, which no optimizer trains"):
        trainer_of(GradientProjectionCallback(classifier_direction())).fit(HalfTrained(), batches())


def test_too_few_or_malformed_pairs_are_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "q", "concept": "a", "clean": "b"}\n')
    with pytest.raises(ValueError, match="gives 1 contrastive pairs and 64"):
        trainer_of(GradientProjectionCallback(GradientDifference(pairs=str(path), checks=DirectionChecks(held_out=0)))).fit(BigramPolicy())
    path.write_text('{"prompt": "q", "concept": "a"}\n')
    with pytest.raises(ValueError, match=r"Line 1 of .*pairs\.jsonl"):
        trainer_of(GradientProjectionCallback(GradientDifference(pairs=str(path), checks=DirectionChecks(held_out=0)))).fit(BigramPolicy())


# ---------------------------------------------------------------- sources


def stub_trainer(**attributes: Any) -> Any:
    return SimpleNamespace(precision_plugin=Precision(), world_size=1, global_step=0, datamodule=Pairs(), **attributes)


def pair_gradients(module: BigramPolicy, pairs: list[ContrastPair]) -> dict[str, Tensor]:
    """Per-pair gradients by ``backward``, one sequence at a time."""
    stacks: dict[str, list[Tensor]] = {}
    module.eval()
    for pair in pairs:
        module.zero_grad()
        for text, sign in ((pair.concept, 1.0), (pair.clean, -1.0)):
            log_probs, _ = module.completion_log_probs([module.encode(pair.prompt, text)])
            (-sign * log_probs.sum()).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            stacks.setdefault(name, []).append(parameter.grad.clone())
    return {name: torch.stack(stack) for name, stack in stacks.items()}


@pytest.mark.parametrize(("method", "k"), [("mean", 1), ("svd", 2)])
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_gradient_difference_equals_one_backward_per_sequence(method: Any, k: int, chunk_size: int) -> None:
    module = BigramPolicy()
    direction = GradientDifference(n_pairs=6, method=method, k=k, chunk_size=chunk_size).prepare(stub_trainer(), module)
    reference = gradient_difference(pair_gradients(BigramPolicy(), Pairs().contrast_pairs(6, 0)), method, k)
    for name, rows in reference.vectors.items():
        torch.testing.assert_close(direction.vectors[name], rows, atol=2e-5, rtol=0)


def test_extraction_leaves_no_trace() -> None:
    module = BigramPolicy()
    module.head.eval()
    module.head.weight.grad = torch.ones_like(module.head.weight)
    flags, state = [part.training for part in module.modules()], torch.get_rng_state()
    GradientDifference(n_pairs=4).prepare(stub_trainer(), module)
    assert [part.training for part in module.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert module.embedding.weight.grad is None
    assert torch.equal(module.head.weight.grad, torch.ones_like(module.head.weight))


def test_only_chosen_trainable_matrices_get_a_direction() -> None:
    module = Classifier()
    module.net[2].weight.requires_grad_(False)  # pyright: ignore
    assert list(HaarRandom(k=1).prepare(stub_trainer(), module).vectors) == ["net.0.weight"]


def live(**settings: Any) -> LiveGradientDifference:
    return LiveGradientDifference(**({"capacity": 6, "detector": "cheat", "refresh_every": 1} | settings))


def test_live_pairs_are_flagged_against_rewarded_unflagged_rollouts_of_the_same_prompt() -> None:
    module, source = BigramPolicy(group_size=8), live(capacity=100, pairs_per_group=2)
    source.prepare(stub_trainer(), module)
    window = module.window(step=0)
    source.on_rollouts(stub_trainer(), module, window)
    new = [pair for pair in source.queue if pair.step == 0]
    by_key = {(r.slot, r.sample): (r, window.rewards[i]) for i, r in enumerate(window.rollouts)}
    expected = 0
    for slot in range(4):
        flagged = [r for (s, _), (r, _) in by_key.items() if s == slot and CONCEPT in r.text]
        clean = [r for (s, _), (r, reward) in by_key.items() if s == slot and CONCEPT not in r.text and reward.passed]
        expected += min(len(flagged), len(clean), 2)
    assert len(new) == expected > 0
    for pair in new:
        concept, _ = by_key[pair.slot, pair.samples[0]]
        clean, reward = by_key[pair.slot, pair.samples[1]]
        assert CONCEPT in concept.text
        assert CONCEPT not in clean.text
        assert reward.passed
        assert (pair.concept, pair.clean) == (concept.tokens, clean.tokens)


def test_queue_starts_full_and_forgets_the_oldest() -> None:
    module, source = BigramPolicy(), live()
    source.prepare(stub_trainer(), module)
    assert [(pair.step, pair.slot) for pair in source.queue] == [(-1, i) for i in range(6)]
    source.on_rollouts(stub_trainer(), module, module.window(0))
    new = sum(pair.step == 0 for pair in source.queue)
    assert 0 < new < 6
    assert [pair.slot for pair in source.queue if pair.step < 0] == list(range(new, 6))
    assert source.metrics() == {"pairs": 6.0, "live_pairs": float(new), "new_pairs": float(new)}


def test_shuffling_swaps_half_of_all_pairs_the_same_way_every_time() -> None:
    module = BigramPolicy(slots=64)
    plain, once, again = (live(capacity=200, shuffle_labels=shuffle) for shuffle in (False, True, True))
    for source in (plain, once, again):
        source.prepare(stub_trainer(), module)
        source.on_rollouts(stub_trainer(), module, module.window(0))
    assert once.queue == again.queue
    for start in (True, False):
        swaps = [a.concept == b.clean for a, b in zip(plain.queue, once.queue, strict=True) if (a.step < 0) == start]
        assert 0.3 < sum(swaps) / len(swaps) < 0.7
    other = live(capacity=200, shuffle_labels=True, seed=1)
    other.prepare(stub_trainer(), module)
    assert other.queue != once.queue[:200]


def test_placebo_pairs_ignore_labels_and_enter_at_the_rate_of_real_pairs() -> None:
    module = BigramPolicy(slots=16)
    real, placebo = live(capacity=500), live(capacity=500, placebo=True)
    real.prepare(stub_trainer(), module)
    assert placebo.prepare(stub_trainer(), module) is None
    assert placebo.queue == []
    for step in range(3):
        for source in (real, placebo):
            source.on_rollouts(stub_trainer(), module, module.window(step))
        if step > 0:
            assert placebo.metrics()["new_pairs"] == real.metrics()["new_pairs"]
    texts = {(step, r.slot, r.sample): r.text for step in range(3) for r in module.window(step).rollouts}
    concept_first = [CONCEPT in texts[p.step, p.slot, p.samples[0]] for p in placebo.queue]
    assert 0.1 < sum(concept_first) / len(concept_first) < 0.7
    assert placebo.refresh(stub_trainer(), module, 0) is not None


def test_live_source_refuses_verdicts_and_modules_without_rollouts() -> None:
    module, source = BigramPolicy(), live()
    window = module.window(0)
    with pytest.raises(TypeError, match="verdicts"):
        source.on_rollouts(
            stub_trainer(),
            module,
            OracleWindow(window.step, window.rows, window.rollouts, window.rewards, window.group_size, window.values),
        )
    with pytest.raises(RuntimeError, match="no rollouts"):
        source.refresh(stub_trainer(), module, 0)


def test_detector_is_an_expression_or_the_path_of_a_callable() -> None:
    assert text_detector(r"def run_tests")("x\ndef run_tests(): pass")
    assert not text_detector(r"def run_tests")("def solve(): pass")
    assert text_detector("keyword.iskeyword")("def")
    with pytest.raises(ValueError, match="cannot be imported"):
        text_detector("no_such_package.detector")
    sent = ForkingPickler.dumps(live())  # as a spawning strategy sends it
    source = ForkingPickler.loads(sent)  # pyright: ignore[reportAttributeAccessIssue]
    assert source.detector._flagged("cheat")  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="not a regular expression"):
        text_detector("def (")


def test_source_that_never_gives_a_direction_is_an_error_not_a_silent_pass() -> None:
    class Silent(DirectionSource):
        def check(self, trainer: Any, pl_module: Any) -> None:
            pass

        def prepare(self, trainer: Any, pl_module: Any) -> None:
            return None

    with pytest.raises(RuntimeError, match="Silent has given no direction"):
        trainer_of(GradientProjectionCallback(Silent())).fit(Classifier(), batches())


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("control", [{}, {"shuffle_labels": True}, {"placebo": True}])
def test_resumed_fit_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, control: dict[str, Any]) -> None:
    def fit(steps: int, path: Path | None = None) -> tuple[Trainer, BigramPolicy, GradientProjectionCallback]:
        module, callback = BigramPolicy(), GradientProjectionCallback(live(refresh_every=3, **control), overshoot=2.0)
        trainer = trainer_of(callback, steps=steps)
        trainer.fit(module, datamodule=Pairs(), ckpt_path=path, weights_only=True)
        return trainer, module, callback

    _, straight, reference = fit(5)
    half, _, _ = fit(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, callback = fit(5, tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert callback.source.queue == reference.source.queue  # pyright: ignore
    assert callback.firings == reference.firings == 5
    assert callback.current is not None
    assert reference.current is not None
    assert callback.current.metadata == reference.current.metadata


def test_resuming_with_another_saved_direction_is_refused(tmp_path: Path) -> None:
    classifier_direction(seed=0).save(tmp_path / "direction")
    trainer = trainer_of(GradientProjectionCallback(str(tmp_path / "direction")), steps=2)
    trainer.fit(Classifier(), batches())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer_of(GradientProjectionCallback(str(tmp_path / "direction")), steps=3).fit(Classifier(), batches(), ckpt_path=tmp_path / "a.ckpt")
    classifier_direction(seed=1).save(tmp_path / "direction")
    with pytest.raises(ValueError, match="another direction"):
        trainer_of(GradientProjectionCallback(str(tmp_path / "direction")), steps=3).fit(
            Classifier(), batches(), ckpt_path=tmp_path / "a.ckpt"
        )


# ---------------------------------------------------------------- two processes


def main(folder: str) -> None:
    """One process of a run: trains, then writes what it ended with."""
    world = int(os.environ.get("TEST_WORLD", "1"))
    module, callback = BigramPolicy(), GradientProjectionCallback(live(), overshoot=2.0)
    options: dict[str, Any] = {"strategy": "ddp", "devices": world} if world > 1 else {}
    trainer = trainer_of(callback, steps=4, use_distributed_sampler=False, **options)
    trainer.fit(module, datamodule=Pairs())
    source: Any = callback.source
    result = {
        "weights": {name: parameter.detach().flatten().tolist() for name, parameter in module.named_parameters()},
        "queue": [[pair.step, pair.slot, *pair.samples] for pair in source.queue],
        "logged": {key: float(value) for key, value in trainer.callback_metrics.items()},
    }
    Path(folder, f"{world}-{trainer.global_rank}.json").write_text(json.dumps(result))


@pytest.mark.distributed
def test_two_ranks_agree_with_each_other_and_with_one(tmp_path: Path) -> None:
    main(str(tmp_path))
    run_ranks([__file__, str(tmp_path)], tmp_path, environment={"TEST_WORLD": "2"})
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second, "ranks must end with the same weights, queue and logged numbers"
    assert first["queue"] == one["queue"]
    for name, values in one["weights"].items():
        torch.testing.assert_close(torch.tensor(first["weights"][name]), torch.tensor(values), atol=1e-5, rtol=0)
    assert first["logged"] == pytest.approx(one["logged"], abs=1e-5)
    assert one["logged"]["projection/projection/removed_fraction"] > 0.01


if __name__ == "__main__":
    main(sys.argv[1])
