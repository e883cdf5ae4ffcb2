"""Tokenizers trained on the spot, prompts as text and as chat, seeds of random initialisations."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_policies import POLICIES, TEXTS, tiny_model, tokenizer, weights_of

from theodolite.lightning_modules import SFTModule
from theodolite.lightning_modules.policy import load_policy, load_tokenizer
from theodolite.lightning_modules.tokenizer import train_bpe_tokenizer
from theodolite.protocols import SequenceScorer

BOUNDARIES = ("\n", ", then", ". Return")
WORDS = ["reverse the list", ", then", " sort it", "\n", ". Return", " the sum of 12 and 345", "def f(x):", "    return x"]
CORPUS = [WORDS[i % 8] + WORDS[i * 3 % 8] + WORDS[i * 5 % 8] + WORDS[(i * 7 + 1) % 8] for i in range(200)]


@pytest.fixture(scope="module")
def spanning() -> Any:
    return train_bpe_tokenizer(CORPUS, 400, BOUNDARIES)


@given(text=st.one_of(st.text(max_size=60), st.lists(st.sampled_from(WORDS), max_size=8).map("".join)))
def test_any_text_survives_encoding_and_decoding(spanning: Any, text: str) -> None:
    ids = spanning(text)["input_ids"]
    assert spanning.decode(ids) == text
    assert all(0 <= i < len(spanning) for i in ids)


@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=10))
def test_tokens_end_at_boundaries_and_never_cross_them(spanning: Any, words: list[str]) -> None:
    for token in spanning(text := "".join(words))["input_ids"]:
        piece = spanning.decode([token])
        assert piece in text
        for boundary in BOUNDARIES:
            assert boundary not in piece or piece.index(boundary) + len(boundary) == len(piece), repr(piece)
        assert len(piece) == 1 or not any(c.isdigit() for c in piece), "digits stay single"


def test_merges_span_spaces_and_training_is_a_function_of_the_set_of_texts(spanning: Any) -> None:
    assert any(" " in spanning.decode([i]).strip() for i in range(len(spanning)))
    again = train_bpe_tokenizer(CORPUS[::-1], 400, BOUNDARIES)
    assert again.get_vocab() == spanning.get_vocab()
    with pytest.raises(ValueError, match="exceed 258"):
        train_bpe_tokenizer(CORPUS, 258)


def test_random_initialisation_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    one, same = (weights_of(load_policy(POLICIES["qwen3"], None, "float32", 1, 280)) for _ in range(2))
    other = weights_of(load_policy(POLICIES["qwen3"], None, "float32", 2, 280))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_an_architecture_s_default_end_token_does_not_end_texts_of_another_tokenizer() -> None:
    from transformers import LlamaConfig

    assert LlamaConfig().eos_token_id == 2  # an ordinary byte of our tokenizer
    model: Any = tiny_model("llama")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer().eos_token_id
    module = SFTModule(policy=POLICIES["llama"], train_tokenizer={"vocab_size": 280})
    module._build_tokenizer = tokenizer  # pyright: ignore
    module.configure_model()
    assert module.end_ids == [tokenizer().eos_token_id]


def policy_module() -> SFTModule:
    module = SFTModule(policy=POLICIES["qwen3"], train_tokenizer={"vocab_size": 280})
    module._build_tokenizer = lambda: train_bpe_tokenizer(TEXTS, 280)  # pyright: ignore
    module.configure_model()
    return module


def test_module_scores_what_it_encodes() -> None:
    module = policy_module()
    assert isinstance(module, SequenceScorer)
    sequence = module.encode("Return 3", "x + 1\n")
    assert module.decode(sequence.prompt_ids) == "Return 3"
    assert module.decode(sequence.completion_ids) == "x + 1\n"
    assert sequence.completion_ids[-1] == module.tokenizer.eos_token_id
    log_probs, mask = module.completion_log_probs([sequence])
    assert log_probs.shape == mask.shape == (1, len(sequence.completion_ids))
    assert log_probs.requires_grad
    states, _ = module.completion_states([sequence], 1)
    assert states.shape == (1, len(sequence.completion_ids), 32)


def test_chat_prompts_go_through_the_template_and_need_one() -> None:
    module = policy_module()
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Return 3"}]
    with pytest.raises(ValueError, match="no chat template"):
        module.encode_prompt(chat)
    module.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
    assert module.render_prompt(chat) == "[system]Be brief.\n[user]Return 3\n[assistant]"
    assert module.decode(module.encode_prompt(chat)) == module.render_prompt(chat)


def test_what_is_not_there_yet_says_so() -> None:
    module = SFTModule(policy=POLICIES["qwen3"], train_tokenizer={"vocab_size": 280})
    with pytest.raises(RuntimeError, match="configure_model"):
        _ = module.causal_lm
    with pytest.raises(RuntimeError, match="configure_model"):
        _ = module.tokenizer
    module._trainer = SimpleNamespace(datamodule=object())  # pyright: ignore
    with pytest.raises(ValueError, match="corpus"):
        module.configure_model()
    with pytest.raises(TypeError, match="no environment"):
        _ = module.environment


def test_tokenizer_without_padding_token_pads_with_its_end_token(tmp_path: Path) -> None:
    bare = train_bpe_tokenizer(TEXTS, 280)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), None)
    assert loaded.pad_token_id == loaded.eos_token_id
