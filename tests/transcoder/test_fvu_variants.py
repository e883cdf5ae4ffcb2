"""The named variants against NumPy, torchmetrics, and (marked peers) the libraries themselves."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.regression import R2Score

from theodolite.functional.fvu_variants import VARIANTS, named_variants


def rows(n: int = 96, d: int = 5, mean: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    means = mean * torch.randn(d, generator=generator, dtype=torch.float64)
    target = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, d) + means
    return target, target + 0.2 * torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.1


def test_each_variant_is_its_formula_in_numpy() -> None:
    target, reconstruction = rows()
    found = {name: float(value) for name, value in named_variants(target, reconstruction, 32).items()}
    y, p = target.numpy(), reconstruction.numpy()
    e, centred = (y - p) ** 2, (y - y.mean(0)) ** 2
    batches = [slice(i, i + 32) for i in range(0, 96, 32)]
    local = [(y[b] - y[b].mean(0)) ** 2 for b in batches]
    expected = {
        "fvu": e.sum() / centred.sum(),
        "sparsify": np.mean([e[b].sum() / c.sum() for b, c in zip(batches, local, strict=True)]),
        "sae_lens_legacy": np.concatenate([e[b].sum(1) / c.sum(1) for b, c in zip(batches, local, strict=True)]).mean(),
        "dictionary_learning": np.mean([(y[b] - p[b]).var(0, ddof=1).sum() / y[b].var(0, ddof=1).sum() for b in batches]),
        "torchmetrics_r2_uniform": (e.sum(0) / centred.sum(0)).mean(),
        "scalar_mean": np.mean([e[b].mean() / (y[b].var(ddof=1) + 1e-8) for b in batches]),
        "uncentred": e.sum() / (y**2).sum(),
        "sae_bench": e.sum(1).mean() / ((y**2).sum(1).mean() - (y**2).mean() ** 2),
    }
    expected |= {name: expected["fvu"] for name in ("sae_lens", "torchmetrics_r2")} | {"sae_bench_legacy": expected["sae_lens_legacy"]}
    assert found.keys() == VARIANTS.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-10), name


def test_the_variants_that_differ_do_differ_on_activations_with_a_mean_and_a_scale() -> None:
    target, reconstruction = rows()
    found = named_variants(target, reconstruction, 8)
    for name in ("sparsify", "sae_lens_legacy", "dictionary_learning", "torchmetrics_r2_uniform", "scalar_mean", "sae_bench"):
        assert abs(float(found[name] / found["fvu"]) - 1) > 0.02, name
    small = {name: float(value) for name, value in named_variants(target * 1e-6, reconstruction * 1e-6).items()}
    assert small["fvu"] == pytest.approx(float(named_variants(target, reconstruction)["fvu"]), rel=1e-9)
    assert small["scalar_mean"] < 0.2 * float(named_variants(target, reconstruction)["scalar_mean"])


@pytest.mark.parametrize(("name", "average"), [("torchmetrics_r2", "variance_weighted"), ("torchmetrics_r2_uniform", "uniform_average")])
def test_torchmetrics_says_the_same(name: str, average: Any) -> None:
    target, reconstruction = rows()
    score = R2Score(multioutput=average).set_dtype(torch.float64)
    score.update(reconstruction, target)
    assert float(named_variants(target, reconstruction)[name]) == pytest.approx(1 - float(score.compute()), rel=1e-10)


@pytest.mark.peers
def test_sae_lens_says_the_same() -> None:
    evals = pytest.importorskip("sae_lens.evals")
    target, reconstruction = rows()
    calculator = evals.ExplainedVarianceCalculator()
    for start in range(0, 96, 32):
        calculator.add_batch(reconstruction[start : start + 32], target[start : start + 32])
    assert float(named_variants(target, reconstruction)["sae_lens"]) == pytest.approx(1 - calculator.compute(), rel=1e-9)


@pytest.mark.peers
def test_sparsify_says_the_same() -> None:
    sparsify = pytest.importorskip("sparsify")
    target, _ = (part.float() for part in rows(d=8))
    coder = sparsify.SparseCoder(8, sparsify.SparseCoderConfig(num_latents=32, k=4))
    out = coder(target)
    assert float(named_variants(target, out.sae_out.detach())["sparsify"]) == pytest.approx(out.fvu.item(), rel=1e-5)


@pytest.mark.peers
def test_dictionary_learning_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if "nnsight" not in sys.modules:  # only its activation buffers need it
        stub: Any = types.ModuleType("nnsight")
        stub.LanguageModel = object
        monkeypatch.setitem(sys.modules, "nnsight", stub)
    evaluation = pytest.importorskip("dictionary_learning.evaluation")
    target, reconstruction = (part.float() for part in rows())
    batches = list(zip(target.split(32), reconstruction.split(32), strict=True))
    active = iter(batches)

    class Coder:
        activation_dim, dict_size = 5, 7

        def __call__(self, x: Tensor, output_features: bool = False) -> tuple[Tensor, Tensor]:
            return next(reconstructions), torch.rand(len(x), 7)

    reconstructions = iter([p for _, p in batches])
    found = evaluation.evaluate(Coder(), iter([y for y, _ in active]), device="cpu", n_batches=3)
    expected = float(named_variants(target, reconstruction, 32)["dictionary_learning"])
    assert 1 - found["frac_variance_explained"] == pytest.approx(expected, rel=1e-4)
