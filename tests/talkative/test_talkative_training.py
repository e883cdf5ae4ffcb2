"""Training: one gradient for every split, what RL may not touch, exact Gumbel texts, and settings that cannot work."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_talkative import MODELS, GradientWitness, data, made, save_target, tokenizer, trainer_of

from theodolite.lightning_modules.talkative import TalkativeGRPO, TalkativeGumbel, TalkativeModule, TalkativeSFT
from theodolite.lightning_modules.talkative.evaluation import evaluation_metrics, evaluation_sums
from theodolite.lightning_modules.talkative.grpo import TextWindow
from theodolite.lightning_modules.talkative.settings import ReconstructorSettings, VerbaliserSettings
from theodolite.protocols import ActivationRows, TalkativeAutoencoder

KINDS: dict[str, tuple[type[TalkativeModule], dict[str, Any]]] = {
    "sft": (TalkativeSFT, {}),
    "gumbel": (TalkativeGumbel, {"tau": (1.0, 0.5), "lm_kl": 0.1, "natural_prefix": "the sea", "entropy": 0.01}),
    "grpo": (TalkativeGRPO, {"group_size": 4, "beta": 0.05, "lm_kl": 0.1, "natural_prefix": "the sea", "entropy": 0.01}),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("banks")


def fitted(name: str, target: str, cache: Path, path: Path, steps: int = 1, **settings: Any) -> tuple[TalkativeModule, GradientWitness]:
    kind, own = KINDS[name]
    module, witness = made(kind, target, **(own | settings)), GradientWitness()
    trainer_of(path, witness, steps=steps).fit(module, datamodule=data(target, cache))
    return module, witness


@pytest.mark.parametrize("name", list(KINDS))
def test_the_gradient_is_the_same_for_every_split_into_microbatches(name: str, target: str, cache: Path, tmp_path: Path) -> None:
    _, whole = fitted(name, target, cache, tmp_path)
    texts = 32 if name == "grpo" else 8
    for micro in (texts // 2, 1):
        _, split = fitted(name, target, cache, tmp_path, micro_batch_size=micro)
        assert whole.gradients.keys() == split.gradients.keys()
        largest = max(float(g.abs().max()) for g in whole.gradients.values())
        for key, gradient in whole.gradients.items():
            torch.testing.assert_close(split.gradients[key], gradient, atol=2e-6 * max(1.0, largest), rtol=1e-5)


@pytest.mark.parametrize("name", ["gumbel", "grpo"])
def test_a_held_out_reconstructor_never_learns_from_what_the_verbaliser_writes(name: str, target: str, cache: Path, tmp_path: Path) -> None:
    module, witness = fitted(name, target, cache, tmp_path, steps=2)
    fresh = made(KINDS[name][0], target, **KINDS[name][1])
    trainer_of(tmp_path).validate(fresh, datamodule=data(target, cache), verbose=False)
    held_out = {key: value for key, value in module.state_dict().items() if key.startswith("readers.held_out.")}
    assert held_out
    for key, value in held_out.items():
        assert torch.equal(value, fresh.state_dict()[key]), key
    assert not any(key.startswith("readers.held_out.") for key in witness.gradients)
    assert all(p.grad is None for p in module.texts_to_vectors["held_out"].parameters())
    for part in ("verbaliser.lm.", "verbaliser.injection.", "readers.reconstructor.head."):
        assert any(key.startswith(part) and float(gradient.abs().max()) > 0 for key, gradient in witness.gradients.items()), part


def test_every_reconstructor_learns_from_captions(target: str, cache: Path, tmp_path: Path) -> None:
    _, witness = fitted("sft", target, cache, tmp_path)
    for part in ("verbaliser.lm.", "verbaliser.injection.", "readers.reconstructor.trunk.", "readers.held_out.trunk."):
        assert any(key.startswith(part) and float(gradient.abs().max()) > 0 for key, gradient in witness.gradients.items()), part


@pytest.mark.parametrize("train", ["frozen", "lora"])
def test_a_frozen_or_adapted_base_does_not_move_and_is_not_exported(train: str, target: str, cache: Path, tmp_path: Path) -> None:
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]} if train == "lora" else None
    settings = VerbaliserSettings(model=target, fixed_length=True, train=train, lora=lora)
    module, witness = fitted("grpo", target, cache, tmp_path, steps=2, verbaliser=settings, export=True)
    learnt = {key for key in witness.gradients if key.startswith("verbaliser.")}
    assert learnt
    assert all("injection" in key or "lora_" in key for key in learnt)
    again = made(TalkativeModule, target, verbaliser=settings, weights=str(tmp_path / "talkative"))
    trainer_of(tmp_path / "again").validate(again, datamodule=data(target, cache), verbose=False)
    assert again.fingerprint() == module.fingerprint()
    stored = (tmp_path / "talkative" / "talkative.safetensors").read_bytes()[:4000]
    assert b"mlp.up_proj" not in stored.split(b"readers.")[-1]


class AllTexts(TextWindow):
    """A window that computes every copy of a text."""

    def merged(self) -> TextWindow:
        return self


class RepeatingGRPO(TalkativeGRPO):
    copies = 0

    def collect(self, rows: ActivationRows) -> TextWindow:
        window = super().collect(rows)
        self.copies = len(window.index) - len(window.merged().index)
        return AllTexts(**{field.name: getattr(window, field.name) for field in fields(TextWindow)})


def test_identical_texts_of_a_group_are_computed_once_with_the_same_gradient(target: str, cache: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = KINDS["grpo"][1] | {"temperature": 0.05}
    _, merged = fitted("grpo", target, cache, tmp_path, steps=1, **settings)
    module, witness = made(RepeatingGRPO, target, **settings), GradientWitness()
    trainer_of(tmp_path, witness).fit(module, datamodule=data(target, cache))
    assert isinstance(module, RepeatingGRPO)
    assert module.copies > 0
    for key, gradient in merged.gradients.items():
        torch.testing.assert_close(witness.gradients[key], gradient, atol=2e-6, rtol=1e-5)


def test_gumbel_texts_are_the_models_own_and_carry_gradient_to_the_first_word(target: str, cache: Path, tmp_path: Path) -> None:
    module, _ = fitted("gumbel", target, cache, tmp_path)
    assert isinstance(module, TalkativeGumbel)
    activations = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    noise = module.noise(["a", "b", "c"])
    ids, one_hot, logits = module.write_softly(activations, noise, 1.0)
    with torch.no_grad():
        forced = module.writer(activations, torch.arange(3), ids, torch.ones(3, 4))
    torch.testing.assert_close(logits.detach(), forced, atol=1e-5, rtol=0)
    assert torch.equal(ids, (forced + noise).argmax(-1)), "each word is the sample that the noise names"
    assert torch.equal(one_hot.detach().round(), torch.nn.functional.one_hot(ids, one_hot.shape[-1]).float())
    kept = logits.grad_fn
    assert kept is not None
    read = module.in_loop(ids, torch.full((3,), 4), one_hot)
    (first,) = torch.autograd.grad(read.square().sum(), [one_hot], retain_graph=True)
    assert bool((first.abs().sum(-1) > 0).all()), "every word, the first included, has a gradient"
    torch.testing.assert_close(read.detach(), module.in_loop.read(module.tokenizer.batch_decode(ids)), atol=1e-5, rtol=0)


def test_it_is_a_talkative_autoencoder_whose_unfinished_texts_are_none(target: str, cache: Path, tmp_path: Path) -> None:
    module = made(TalkativeModule, target, verbaliser=VerbaliserSettings(model=target), max_new_tokens=3)
    trainer_of(tmp_path).validate(module, datamodule=data(target, cache), verbose=False)
    assert isinstance(module, TalkativeAutoencoder)
    activations = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    names = ["1:7", "1:9", "2:7", "3:8"]
    texts = module.describe(activations, names, range(32), 1.0, 3, 5)
    flat = [text for row in texts for text in row]
    assert [len(row) for row in texts] == [32] * 4
    assert flat.count("") > 64, "an untrained model rarely ends within 3 words, and what does not end says nothing"
    later = module.describe(activations[2:], names[2:], range(8, 12), 1.0, 3, 5)
    assert later == [row[8:12] for row in texts[2:]]
    greedy = module.describe(activations, names, range(2), 0.0, 3, 5)
    assert all(a == b for a, b in greedy)
    assert list(module.reconstructors) == ["reconstructor", "held_out"]
    assert module.describe(activations[:0], [], range(2), 1.0, 3, 5) == []


def test_evaluation_leaves_weights_gradients_and_random_state_alone(target: str, cache: Path, tmp_path: Path) -> None:
    module, rows = made(TalkativeSFT, target), data(target, cache)
    trainer_of(tmp_path).fit(module, datamodule=rows)
    before, state = {key: value.clone() for key, value in module.state_dict().items()}, torch.get_rng_state()
    gradients = {key: None if p.grad is None else p.grad.clone() for key, p in module.named_parameters()}
    values = evaluation_metrics(evaluation_sums(module, rows.dataset(rows.table("validation"))[range(7)]))
    assert {"fve", "fve_held_out", "fve_greedy", "fve_caption", "caption_loss", "unusable_rate"} <= values.keys()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    for key, p in module.named_parameters():
        old = gradients[key]
        assert (p.grad is None) == (old is None)
        assert p.grad is None or (old is not None and torch.equal(p.grad, old))


VERBALISER: dict[str, Any] = {"model": MODELS["qwen3"], "tokenizer": "t"}


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (TalkativeGRPO, {"group_size": 1}, "at least 2 texts per activation"),
        (TalkativeGRPO, {"beta": -1.0}, "model.beta is -1.0"),
        (TalkativeGRPO, {"aggregation": "sum"}, "choose one of dapo, dr_grpo, grpo"),
        (TalkativeGRPO, {"lm_kl": 0.1}, "model.lm_kl needs model.natural_prefix"),
        (TalkativeGumbel, {"tau": (1.0, 0.0)}, "must be above 0"),
        (TalkativeGumbel, {"verbaliser": VerbaliserSettings(**VERBALISER)}, "set model.verbaliser.fixed_length to true"),
        (TalkativeModule, {"loss": "l1"}, "choose one of relative_mse, directional, mse"),
        (TalkativeModule, {"weights": "runs/none"}, "holds no talkative.json"),
        (TalkativeModule, {"verbaliser": VerbaliserSettings(**VERBALISER, train="lora")}, "when, and only when"),
        (TalkativeModule, {"verbaliser": VerbaliserSettings(**VERBALISER, injection="fixed_norm")}, "needs a scale above 0"),
        (TalkativeModule, {"verbaliser": VerbaliserSettings(**VERBALISER, prompt="no marker")}, "exactly once"),
        (TalkativeModule, {"verbaliser": VerbaliserSettings(model=MODELS["qwen3"])}, "model.verbaliser.tokenizer must say"),
        (TalkativeModule, {"reconstructor": ReconstructorSettings(model=MODELS["qwen3"], suffix="")}, "suffix is empty"),
        (TalkativeModule, {"held_out": ReconstructorSettings(model="./nowhere/at/all")}, "model.held_out.model is the folder"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_built(
    kind: type[TalkativeModule], settings: dict[str, Any], words: str, target: str
) -> None:
    with pytest.raises(ValueError, match=words) as stop:
        made(kind, target, **settings)
    assert "\n" not in str(stop.value)


def test_weights_of_other_settings_or_changed_bytes_are_refused(target: str, cache: Path, tmp_path: Path) -> None:
    fitted("sft", target, cache, tmp_path, export=True)
    folder = tmp_path / "talkative"
    other = made(TalkativeModule, target, weights=str(folder), reconstructor=ReconstructorSettings(model=target, layers=1, suffix="<read>"))
    with pytest.raises(ValueError, match=r"another model\.reconstructor\.layers"):
        trainer_of(tmp_path).validate(other, datamodule=data(target, cache), verbose=False)
    with open(folder / "talkative.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ValueError, match="is not the file that"):
        trainer_of(tmp_path).validate(made(TalkativeModule, target, weights=str(folder)), datamodule=data(target, cache), verbose=False)


def test_a_caption_of_another_length_is_refused_with_its_words(target: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 4 tokens, but fixed_length texts have 5"):
        fitted("sft", target, cache, tmp_path, max_new_tokens=5)
    assert tokenizer().pad_token_id is not None
