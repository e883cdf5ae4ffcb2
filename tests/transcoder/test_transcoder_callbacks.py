"""Splicing and top contexts against brute force on a tiny random model."""

from __future__ import annotations

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_language_models import tiny_language_model

from theodolite.callbacks.transcoder_contexts import TopContexts
from theodolite.callbacks.transcoder_splice import SpliceEvaluation
from theodolite.lightning_modules.transcoder import TranscoderModule
from theodolite.sites import collect_sites, parse_site

LENGTH = 12


class HeldOut(LightningDataModule):
    """Held-out tokens of a tiny Llama, whose activations are the test batches."""

    def __init__(self) -> None:
        super().__init__()
        self.input_site, self.target_site = parse_site("mlp_in.1"), parse_site("mlp_out.1")
        self.global_batch_size, self.input_width, self.target_width = 24, 32, 32
        self.producer = tiny_language_model("llama")
        self.tokens = torch.randint(0, 64, (6, LENGTH), generator=torch.Generator().manual_seed(0))
        found = collect_sites(self.producer, [self.input_site, self.target_site], input_ids=self.tokens)
        self.pairs = [found[site].reshape(-1, 32).detach() for site in (self.input_site, self.target_site)]

    def held_out_tokens(self, sequences: int, split: str) -> Tensor:
        assert split == "test", "what the callbacks measure in a test"
        return self.tokens[:sequences]

    def test_dataloader(self) -> DataLoader:
        rows = torch.arange(len(self.tokens) * LENGTH)
        batches = [{"input": self.pairs[0][part], "target": self.pairs[1][part], "row": part} for part in rows.split(20)]
        return DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType]


def evaluated(folder: Path, *callbacks: Any) -> tuple[TranscoderModule, HeldOut, dict[str, float]]:
    data, module = HeldOut(), TranscoderModule(latents=48, k=4, activation="topk", prefixes=[8, 48], seed=1)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    runner = Trainer(accelerator="cpu", devices=1, default_root_dir=folder, callbacks=list(callbacks), **quiet)
    return module, data, dict(runner.test(module, data, verbose=False)[0])


def test_spliced_cross_entropy_is_that_of_a_model_rebuilt_by_hand(tmp_path: Path) -> None:
    """The MLP of the layer is replaced by a plain function, without any hook."""
    module, data, logged = evaluated(tmp_path, SpliceEvaluation(sequences=4, batch_sequences=3))
    model: Any = data.producer
    mlp = model.model.layers[1].mlp
    tokens = data.tokens[:4]

    def loss() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(input_ids=tokens).logits[:, :-1].reshape(-1, 64), tokens[:, 1:].reshape(-1)))

    original, clean = mlp.forward, loss()
    found = {"clean": clean}
    for name, prefix in (("first", 0), ("all", 1)):
        mlp.forward = lambda x, prefix=prefix: torch.cat([original(x)[:, :1], module.coder(x[:, 1:], prefix)], dim=1)
        found[name] = loss()
    mlp.forward = lambda x: torch.zeros_like(x)
    found["zero"] = loss()
    mlp.forward = original
    assert math.isclose(logged["test/ce"], clean, rel_tol=1e-5)
    assert math.isclose(logged["test/ce_spliced"], found["all"], rel_tol=1e-5)
    assert math.isclose(logged["test/ce_zero"], found["zero"], rel_tol=1e-5)
    recovered = [(found["zero"] - found[name]) / (found["zero"] - clean) for name in ("first", "all")]
    assert math.isclose(logged["test/ce_recovered_8"], recovered[0], rel_tol=1e-3)
    assert math.isclose(logged["test/ce_recovered"], recovered[1], rel_tol=1e-3)
    assert logged["test/kl_spliced"] > 0
    assert loss() == clean, "nothing of the splice stays behind"


def test_top_contexts_are_the_largest_activations(tmp_path: Path) -> None:
    module, data, _ = evaluated(tmp_path, TopContexts(contexts=3, window=2, sequences=6))
    written = json.loads((tmp_path / "latents.json").read_text())
    dense = module.coder.encode(data.pairs[0]).dense()
    assert written["tokens"] == len(dense)
    for latent, record in enumerate(written["latents"]):
        assert math.isclose(record["density"], float((dense[:, latent] > 0).double().mean()))
        values, rows = dense[:, latent].sort(descending=True, stable=True)
        expected = [(float(v), int(r)) for v, r in zip(values[:3], rows[:3], strict=True) if v > 0]
        assert [(context["value"], context["row"]) for context in record["contexts"]] == [(pytest.approx(v), r) for v, r in expected]
        for context in record["contexts"]:
            sequence, position = divmod(context["row"], LENGTH)
            assert context["tokens"][context["at"]] == int(data.tokens[sequence, position])
            assert context["tokens"] == data.tokens[sequence, max(0, position - 2) : position + 3].tolist()


def test_a_target_that_cannot_be_replaced_is_refused(tmp_path: Path) -> None:
    data = HeldOut()
    data.target_site = parse_site("resid_mid.1")
    runner = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=[SpliceEvaluation()])
    with pytest.raises(ValueError, match=r"cannot replace resid_mid\.1"):
        runner.test(TranscoderModule(latents=48, k=4), data, verbose=False)


def test_threads_that_read_one_model_do_not_see_each_others_passes() -> None:
    """Activations are made ahead of time in a thread while an evaluation runs the same model."""
    model, site = tiny_language_model("llama"), parse_site("mlp_in.1")
    batches = [torch.full((2, 8), token) for token in range(12)]
    expected = [collect_sites(model, [site], input_ids=batch)[site] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = list(pool.map(lambda batch: collect_sites(model, [site], input_ids=batch)[site], batches))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
