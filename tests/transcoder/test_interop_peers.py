"""Coders written here and read by SAELens, and written by SAELens and sparsify and read here; in an environment that has both."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from theodolite.lightning_modules.transcoder.interop import load_weights, save_saelens
from theodolite.lightning_modules.transcoder.weights import CoderWeights, coder_from

pytestmark = pytest.mark.peers


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = numbers(50, 6, seed=9)


def random_weights(d_out: int, skip: bool = False, **other: Any) -> CoderWeights:
    tensors = (numbers(24, 6), numbers(24, seed=1), numbers(24, d_out, seed=2), numbers(d_out, seed=3))
    return CoderWeights(*tensors, numbers(d_out, 6, seed=4) if skip else None, **other)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_saelens_computes_what_was_exported(kind: str, tmp_path: Path) -> None:
    saelens = pytest.importorskip("sae_lens")
    transcoder = "transcoder" in kind
    sites: dict[str, Any] = {
        "input_site": "mlp_in_unscaled.2",
        "target_site": "mlp_out.2" if transcoder else "mlp_in_unscaled.2",
        "model": "gpt2",
    }
    selection: dict[str, Any] = {"k": 4} if kind == "topk" else {"threshold": numbers(24, seed=5).abs()}
    weights = random_weights(5 if transcoder else 6, "skip" in kind, rescaled=not transcoder, **selection, **sites)
    save_saelens(weights, tmp_path)
    theirs = saelens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == kind
    assert theirs.cfg.metadata.hook_name == "blocks.2.ln2.hook_normalized"
    with torch.no_grad():
        assert torch.allclose(theirs(X), coder_from(weights)(X), atol=1e-5)


@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "transcoder", "skip_transcoder", "jumprelu_transcoder"])
def test_what_saelens_saved_computes_the_same_here(kind: str, tmp_path: Path) -> None:
    registry = pytest.importorskip("sae_lens.registry")
    coder_class, config_class = registry.get_sae_class(kind)
    extra: dict[str, Any] = {"d_out": 5} if "transcoder" in kind else {}
    extra |= {"k": 4, "rescale_acts_by_decoder_norm": True} if kind == "topk" else {}
    theirs = coder_class(
        config_class(d_in=6, d_sae=24, dtype="float32", device="cpu", apply_b_dec_to_input="transcoder" not in kind, **extra)
    )
    with torch.no_grad():
        for seed, parameter in enumerate(theirs.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=20 + seed))
        if hasattr(theirs, "threshold"):
            theirs.threshold.abs_()
    theirs.save_model(tmp_path)
    with torch.no_grad():
        assert torch.allclose(coder_from(load_weights(tmp_path))(X), theirs(X), atol=2e-5)


@pytest.mark.parametrize("transcode", [False, True])
def test_what_sparsify_saved_computes_the_same_here(transcode: bool, tmp_path: Path) -> None:
    pytest.importorskip("sparsify")
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify import SaeConfig  # type: ignore[import-not-found]
        from sparsify.sparse_coder import SparseCoder  # type: ignore[import-not-found]
    theirs = SparseCoder(6, SaeConfig(num_latents=24, k=4, transcode=transcode, skip_connection=transcode), dtype=torch.float32)
    with torch.no_grad():
        for seed, parameter in enumerate(theirs.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=20 + seed))
    theirs.save_to_disk(tmp_path / "layers.3.mlp")
    weights = load_weights(tmp_path / "layers.3.mlp")
    assert weights.target_site == "mlp_out_raw.3"
    assert weights.input_site == ("mlp_in.3" if transcode else "mlp_out_raw.3")
    with torch.no_grad():
        assert torch.allclose(coder_from(weights)(X), theirs(X).sae_out, atol=2e-5)
