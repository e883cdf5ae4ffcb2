"""The verbaliser: where an activation goes, what it leaves alone, and texts that depend on nothing but their own name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_talkative import MODELS, WIDTH, rows, tokenizer, verbaliser

from theodolite.lightning_modules.decoding import Sampling
from theodolite.lightning_modules.scoring import selected_log_probs
from theodolite.lightning_modules.talkative.injection import FixedNorm, Projection, injected
from theodolite.sites import ActivationSite, capture_sites

MARKER = 1
SAMPLING = Sampling(6)


def streams(module: Any, inject: bool, activations: torch.Tensor, layers: int) -> dict[ActivationSite, torch.Tensor]:
    ids = torch.tensor(module.prompt_ids).expand(len(activations), -1)
    sites = [ActivationSite(layer, "resid_pre") for layer in range(3)]
    with torch.no_grad(), capture_sites(module.lm, sites) as plain:
        module.lm(input_ids=ids)
        found = dict(plain)
    if not inject:
        return found
    values = module.injection(module.standardise(activations))
    assert len(values) == layers
    with torch.no_grad(), injected(module.lm, values, module.position), capture_sites(module.lm, sites) as changed:
        module.lm(input_ids=ids)
        return dict(changed)


@pytest.mark.parametrize("kind", list(MODELS))
def test_injection_overwrites_one_position_and_leaves_the_others_bit_for_bit(kind: str) -> None:
    module, activations = verbaliser(kind), rows(3)
    assert module.position == MARKER
    plain, changed = streams(module, False, activations, 1), streams(module, True, activations, 1)
    first = ActivationSite(0, "resid_pre")
    others = [i for i in range(len(module.prompt_ids)) if i != MARKER]
    assert torch.equal(changed[first][:, others], plain[first][:, others])
    assert torch.equal(changed[first][:, MARKER], activations), "the identity projection puts in the activation itself"
    for layer in (1, 2):  # causal: what stands before the marker never learns of it
        site = ActivationSite(layer, "resid_pre")
        torch.testing.assert_close(changed[site][:, :MARKER], plain[site][:, :MARKER], atol=1e-6, rtol=0)
        assert not torch.allclose(changed[site][:, MARKER + 1 :], plain[site][:, MARKER + 1 :])


@pytest.mark.parametrize("per_layer", [False, True])
def test_layer_overwrite_repeats_the_activation_before_each_layer(per_layer: bool) -> None:
    module, activations = verbaliser(layers=2, per_layer=per_layer), rows(3)
    changed = streams(module, True, activations, 2)
    for layer in (0, 1):
        assert torch.equal(changed[ActivationSite(layer, "resid_pre")][:, MARKER], activations)
    assert not torch.allclose(changed[ActivationSite(2, "resid_pre")][:, MARKER], activations)
    assert len(list(module.injection.parameters())) == (4 if per_layer else 2)


def test_fixed_norm_keeps_direction_and_has_no_parameters() -> None:
    injection, activations = FixedNorm(WIDTH, WIDTH, 1, 150.0), rows(4)
    (value,) = injection(activations)
    torch.testing.assert_close(value.norm(dim=1), torch.full((4,), 150.0))
    torch.testing.assert_close(torch.cosine_similarity(value, activations), torch.ones(4))
    assert not list(injection.parameters())


@pytest.mark.parametrize(("width", "model_width"), [(5, 5), (5, 8), (8, 5)])
def test_projection_is_the_identity_at_initialisation_padded_or_cut(width: int, model_width: int) -> None:
    state, activations = torch.get_rng_state(), torch.arange(1.0, 1 + width)[None]
    (value,) = Projection(width, model_width, 1, False)(activations)
    kept = min(width, model_width)
    assert torch.equal(value[:, :kept], activations[:, :kept])
    assert float(value[:, kept:].detach().abs().sum()) == 0.0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", list(MODELS))
def test_shared_prefix_decoding_agrees_with_teacher_forcing(kind: str) -> None:
    module, activations = verbaliser(kind), rows(5)
    decoded = module.write(activations, [[10 * r + k for k in range(4)] for r in range(5)], SAMPLING)
    index, mask = torch.arange(5).repeat_interleave(4), torch.ones(20, 6)
    with torch.no_grad():
        for shared in {module.shared_prefix, False}:
            module.shared_prefix = shared
            log_probs = selected_log_probs(module(activations, index, decoded.ids, mask), decoded.ids)
            torch.testing.assert_close(log_probs, decoded.log_probs, atol=1e-5, rtol=0)
    assert not set(decoded.ids.flatten().tolist()) & set(tokenizer().all_special_ids)


def test_gradients_agree_between_the_shared_prefix_and_the_padded_path() -> None:
    gradients = []
    for shared in (True, False):
        module, activations = verbaliser(layers=2).double(), rows(3).double()
        module.shared_prefix = shared
        ids, mask = torch.arange(20, 32).view(6, 2), torch.tensor([[1.0, 1.0]] * 5 + [[1.0, 0.0]])
        logits = module(activations, torch.tensor([0, 0, 1, 1, 2, 2]), ids, mask)
        (selected_log_probs(logits, ids) * mask).sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("injection" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_a_text_depends_on_its_activation_and_seed_not_on_its_company(kind: str) -> None:
    module, activations = verbaliser(kind), rows(16)
    seeds = [[1000 * r + k for k in range(32)] for r in range(16)]
    together = module.write(activations, seeds, SAMPLING).ids.view(16, 32, -1)
    backwards = module.write(activations.flip(0), [group[::-1] for group in seeds[::-1]], SAMPLING).ids.view(16, 32, -1).flip(0, 1)
    alone = torch.stack([module.write(activations[r : r + 1], [seeds[r]], SAMPLING).ids for r in range(16)])
    extended = torch.cat(
        [module.write(activations, [g[a:b] for g in seeds], SAMPLING).ids.view(16, b - a, -1) for a, b in ((0, 5), (5, 32))], 1
    )
    for name, ids in {"order": backwards, "alone": alone, "extended": extended}.items():
        same = float((ids == together).float().mean())
        print(f"{kind}, {name}: {same:.4%} of {ids.numel()} tokens identical")
        assert same >= 0.999, name
    assert len({tuple(ids) for ids in together.view(-1, 6).tolist()}) > 400


def test_writing_leaves_random_state_modes_and_gradients_alone() -> None:
    module = verbaliser("gpt2").train()
    state, modes = torch.get_rng_state(), [part.training for part in module.modules()]
    module.write(rows(2), [[1], [2]], SAMPLING)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in module.modules()] == modes
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    ("settings", "width", "words"),
    [
        ({"marker": "the sea", "prompt": "in the sea"}, WIDTH, "is 2 tokens; choose a string of exactly one"),
        ({"marker": "<read>", "prompt": "<read>", "chat": True}, WIDTH, "no chat template"),
        ({"marker": "se", "prompt": "se <unk>"}, WIDTH, "stands 2 times"),
        ({"layers": 4}, WIDTH, "layers is 4, but the model has 3 layers"),
        ({"injection": "fixed_norm", "scale": 3.0}, WIDTH + 1, "use injection=projection"),
    ],
)
def test_a_verbaliser_that_cannot_work_is_refused_in_one_sentence(settings: dict[str, Any], width: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        verbaliser(width=width, **settings)
