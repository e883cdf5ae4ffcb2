"""The estimate against what PyTorch really holds, and refusals that say what would fit."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_language_models import tiny_config, tiny_language_model

from theodolite.lightning_modules.transcoder import Transcoder
from theodolite.memory_estimate import (
    GIB,
    CoderSize,
    available_memory,
    check_memory,
    coder_memory,
    language_model_memory,
)


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
@pytest.mark.parametrize("skip", [False, True])
def test_coder_counts_its_parameters(activation: str, skip: bool) -> None:
    coder = Transcoder(16, 12, 64, 4, activation, skip=skip, init="random")  # type: ignore[arg-type]
    size = CoderSize(16, 12, 64, 32, dense=activation == "jumprelu", skip=skip)
    assert size.parameters == sum(p.numel() for p in coder.parameters())
    parts = coder_memory(size)
    optimizer = torch.optim.Adam(coder.parameters())
    for parameter in coder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    assert parts["optimizer"] == moments
    assert parts["coder gradients"] == moments // 2


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama"])
def test_language_models_are_counted_without_loading_them(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        loaded = tiny_language_model(family, dtype)
        expected = sum(p.nbytes for p in loaded.parameters())
        assert language_model_memory(tiny_config(family), dtype, 128)["language model"] == expected


def test_sizes_of_the_published_recipe() -> None:
    """Gemma-2-2B's dictionary: 170 million parameters, 2.7 GB with gradients and Adam in float32."""
    parts = coder_memory(CoderSize(2304, 2304, 36864, 1024, 4))
    assert sum(parts[name] for name in ("coder weights", "coder gradients", "optimizer")) == pytest.approx(2.72e9, rel=0.01)


def test_what_does_not_fit_is_refused_with_a_size_that_does() -> None:
    size = CoderSize(2304, 2304, 36864, 4096, 4)
    parts = coder_memory(size)
    assert check_memory(parts, 100 * GIB, size).startswith("memory: about ")
    with pytest.raises(ValueError, match=r"would \(data\.global_batch_size\)") as refusal:
        check_memory(parts, 4 * GIB, size)
    tokens = int(re.findall(r"Batches of (\d+) tokens", str(refusal.value))[0])
    assert sum(coder_memory(CoderSize(2304, 2304, 36864, tokens, 4)).values()) <= 4 * GIB
    with pytest.raises(ValueError, match=r"would \(model\.latents\)") as refusal:
        check_memory(parts, 2 * GIB, size)
    latents = int(re.findall(r"dictionary of (\d+) latents", str(refusal.value))[0])
    assert sum(coder_memory(CoderSize(2304, 2304, latents, 4096, 4)).values()) <= 2 * GIB
    with pytest.raises(ValueError, match="leave too little"):
        check_memory(parts | {"language model": 60 * GIB}, 40 * GIB, size)


def test_available_memory_is_that_of_this_machine() -> None:
    assert 2**20 < available_memory(torch.device("cpu")) < 2**50
