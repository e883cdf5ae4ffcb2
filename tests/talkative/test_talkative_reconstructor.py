"""The reconstructor: cut where the activation leaves, the identity at initialisation, read at the right token of every row."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_talkative import MODELS, WIDTH, save_target, tokenizer

from theodolite.lightning_modules.talkative.reconstructor import TextReconstructor, build_reconstructor
from theodolite.lightning_modules.talkative.settings import ReconstructorSettings
from theodolite.sites import ActivationSite, collect_sites

TEXTS = ["sea", "the boat in the harbour .", "anna sails", "happy farm cow milks"]


def built(model: str | dict[str, Any], width: int = WIDTH, **settings: Any) -> TextReconstructor:
    given = ReconstructorSettings(model=model, **({"suffix": "<read>", "layers": 2} | settings))
    return build_reconstructor(given, "reconstructor", width, "float32", tokenizer()).eval()


@pytest.mark.parametrize("kind", list(MODELS))
def test_untrained_it_returns_the_producers_own_activation_at_the_last_token(kind: str, tmp_path: Path) -> None:
    target = save_target(tmp_path / kind, kind)
    reader = built(target, prefix="in the")
    model: Any = AutoModelForCausalLM.from_pretrained(target).eval()
    for text in TEXTS:
        ids = torch.tensor([tokenizer()(f"in the {text} <read>", add_special_tokens=False)["input_ids"]])
        states = collect_sites(model, [ActivationSite(1, "resid_post")], input_ids=ids)
        expected = states[ActivationSite(1, "resid_post")][0, -1]
        torch.testing.assert_close(reader.reconstruct([text])[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_a_reconstruction_does_not_depend_on_the_length_of_its_neighbours(kind: str) -> None:
    reader = built(MODELS[kind])
    together = reader.reconstruct([*TEXTS, TEXTS[0]])
    alone = torch.cat([reader.reconstruct([text]) for text in [*TEXTS, TEXTS[0]]])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    reader.batch_size = 2
    torch.testing.assert_close(reader.reconstruct([*TEXTS, TEXTS[0]]), alone, atol=1e-5, rtol=0)
    assert reader.reconstruct([]).shape == (0, WIDTH)
    assert len({tuple(row.tolist()) for row in alone[:4]}) == 4


def test_it_returns_the_producers_units() -> None:
    reader = built(MODELS["qwen3"])
    plain, mean = reader.reconstruct(TEXTS), torch.linspace(-3, 3, WIDTH)
    reader.standardise.set(mean, torch.tensor(7.0))
    torch.testing.assert_close(reader.reconstruct(TEXTS), plain * 7 + mean, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(reader.standardise(reader.reconstruct(TEXTS)), plain, atol=1e-5, rtol=1e-5)


def test_fingerprint_changes_with_every_weight_and_with_the_template() -> None:
    reader, twin, other = built(MODELS["qwen3"]), built(MODELS["qwen3"]), built(MODELS["qwen3"], prefix="the")
    assert reader.fingerprint() == twin.fingerprint() != other.fingerprint()
    with torch.no_grad():
        twin.head.bias[0] = 1e-3  # pyright: ignore
    assert reader.fingerprint() != twin.fingerprint()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"layers": 9}, "layers is 9, but the model has 3 layers"), ({"model": MODELS["qwen3"] | {"vocab_size": 50}}, "fewer embeddings")],
)
def test_a_model_that_does_not_fit_is_refused_in_one_sentence(settings: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"model": MODELS["qwen3"]} | settings
    with pytest.raises(ValueError, match=words):
        built(**given)
