"""Two ways to score sequences agree with each other and with one plain forward pass per sequence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_policies import ragged, tiny_model

from theodolite.lightning_modules.policy import add_lora
from theodolite.lightning_modules.scoring import (
    completion_log_probs,
    completion_states,
    pad_sequences,
    selected_log_probs,
    shared_prefix_log_probs,
    supports_shared_prefix,
)
from theodolite.protocols import TokenSequence

SHAPES = [(9, 4), (9, 12), (9, 1), (3, 7), (3, 0), (17, 5), (1, 6), (17, 5)]
FULL = ("qwen3", "llama", "gpt2")


def one_by_one(model: nn.Module, sequences: list[TokenSequence], temperature: float) -> tuple[Tensor, Tensor]:
    """A forward pass per sequence, without padding, cache or positions."""
    width = max(1, *(len(s.completion_ids) for s in sequences))
    values, mask = [], torch.zeros(len(sequences), width)
    for row, sequence in enumerate(sequences):
        ids = torch.tensor([sequence.prompt_ids + sequence.completion_ids])
        log_probs = (model(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)
        picked = log_probs[:-1].gather(-1, ids[0, 1:, None])[:, 0][len(sequence.prompt_ids) - 1 :]
        values.append(nn.functional.pad(picked, (0, width - len(picked))))
        mask[row, : len(picked)] = 1
    return torch.stack(values), mask


def gradients(model: nn.Module, log_probs: Tensor) -> Tensor:
    """Of a weighted sum in which every token counts differently."""
    weights = torch.linspace(-1, 2, log_probs.numel(), dtype=torch.float64).view_as(log_probs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((weights * log_probs.double()).sum(), parameters, allow_unused=True)
    return torch.cat([g.flatten().double() for g in found if g is not None])


def lora(model: nn.Module) -> nn.Module:
    wrapped = add_lora(model, {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}, seed=0)
    return wrapped.eval()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", FULL)
def test_shared_prefix_equals_padded_equals_one_by_one(kind: str, adapter: bool, temperature: float) -> None:
    model = lora(tiny_model(kind)) if adapter else tiny_model(kind)
    assert supports_shared_prefix(model)
    sequences = ragged(SHAPES)
    expected, mask = one_by_one(model, sequences, temperature)
    batch = pad_sequences(sequences, 0, "cpu")
    padded = completion_log_probs(model, batch, temperature)
    shared, shared_mask = shared_prefix_log_probs(model, sequences, 0, "cpu", temperature)
    assert torch.equal(batch.mask, mask)
    assert torch.equal(shared_mask, mask)
    for ours in (padded, shared):
        torch.testing.assert_close(ours.double(), expected * mask, atol=1e-5, rtol=0)
        assert (ours[mask == 0] == 0).all()
    reference = gradients(model, expected * mask)
    for ours in (padded, shared):
        assert (gradients(model, ours) - reference).norm() / reference.norm() < 1e-6


@pytest.mark.parametrize("shapes", [[(5, 1)], [(5, 0)], [(1, 1), (1, 3)], [(4, 0), (4, 0)]])
def test_single_tokens_and_empty_completions_are_scored(shapes: list[tuple[int, int]]) -> None:
    model = tiny_model("qwen3")
    expected, mask = one_by_one(model, ragged(shapes), 1.0)
    shared, shared_mask = shared_prefix_log_probs(model, ragged(shapes), 0, "cpu")
    torch.testing.assert_close(shared.double(), expected * mask, atol=1e-5, rtol=0)
    assert torch.equal(shared_mask, mask)


def test_padding_reaches_no_further_into_a_position_table_than_the_sequences_do() -> None:
    model = tiny_model("gpt2")  # 40 learned positions
    sequences = ragged([(38, 2), (2, 38)])
    expected, mask = one_by_one(model, sequences, 1.0)
    shared, _ = shared_prefix_log_probs(model, sequences, 0, "cpu")
    torch.testing.assert_close(shared.double(), expected * mask, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["mistral_window", "gemma2_window"])
def test_sliding_windows_are_found_and_the_padded_path_is_exact_for_them(kind: str) -> None:
    model = tiny_model(kind)
    assert not supports_shared_prefix(model)
    assert not supports_shared_prefix(lora(tiny_model(kind)))
    sequences = ragged(SHAPES)
    expected, mask = one_by_one(model, sequences, 1.0)
    padded = completion_log_probs(model, pad_sequences(sequences, 0, "cpu"))
    torch.testing.assert_close(padded.double(), expected * mask, atol=1e-5, rtol=0)


def test_recurrent_and_foreign_models_are_not_taken_for_ones_with_a_full_cache() -> None:
    mamba: dict[str, Any] = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 50}
    from theodolite.lightning_modules.policy import load_policy

    assert not supports_shared_prefix(load_policy(mamba, None, "float32", 0))
    assert not supports_shared_prefix(nn.Linear(2, 2))


def test_gradient_checkpointing_switches_prefix_sharing_off() -> None:
    model: Any = tiny_model("qwen3")
    model.gradient_checkpointing_enable()
    assert not supports_shared_prefix(model)


def test_bfloat16_logits_are_scored_in_float32() -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(selected_log_probs(logits, ids), expected.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", FULL)
def test_states_are_those_of_a_plain_forward_pass_and_carry_no_gradient(kind: str) -> None:
    model = tiny_model(kind)
    sequences = ragged(SHAPES)
    for layer in (0, 1, 2):
        states = completion_states(model, pad_sequences(sequences, 0, "cpu"), layer)
        assert not states.requires_grad
        for row, sequence in enumerate(sequences):
            ids = torch.tensor([sequence.prompt_ids + sequence.completion_ids])
            plain = model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0, len(sequence.prompt_ids) :]
            torch.testing.assert_close(states[row, : len(plain)], plain.detach(), atol=1e-5, rtol=1e-5)


def test_states_of_a_layer_that_is_not_there_and_empty_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 layers"):
        completion_states(tiny_model("qwen3"), pad_sequences(ragged([(3, 2)]), 0, "cpu"), 3)
    with pytest.raises(ValueError, match="empty prompt"):
        pad_sequences([TokenSequence((), (1,))], 0, "cpu")
