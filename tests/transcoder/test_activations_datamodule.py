"""Activations on the fly, end to end: the numbers of a plain forward pass, in the same order whatever interrupts or divides the work."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_language_models import FAMILIES, tiny_language_model

from theodolite.datamodules.activations.datamodule import ActivationDataModule
from theodolite.datamodules.activations.paired_rows import PairProducer
from theodolite.datamodules.text.documents import SyntheticEnglish
from theodolite.datamodules.text.packing import Packing
from theodolite.protocols import ActivationSource
from theodolite.sites import collect_sites, parse_site

GEMMA: dict[str, Any] = {key: value for key, value in FAMILIES["gemma2"].items() if key != "vocab_size"}


def data(**settings: Any) -> ActivationDataModule:
    small: dict[str, Any] = {
        "model": GEMMA, "tokenizer": "bytes", "text": SyntheticEnglish(200, sentences=3), "input_site": "mlp_in.1",
        "target_site": "blocks.1.hook_mlp_out", "global_batch_size": 32, "buffer_rows": 16, "model_batch_rows": 4, "lanes": 4,
        "validation_share": 0.2, "test_share": 0.2,
        "packing": Packing(length=12), "validation_rows": 6, "steps_per_epoch": 5, "seed": 3, "repeat": True,
    }  # fmt: skip
    return ActivationDataModule(**(small | settings))


class Recorder(LightningModule):
    """Keeps every batch; its one weight only gives Lightning something to do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[dict[str, Tensor]] = []
        self.held_out: list[dict[str, Tensor]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.weight * batch["input"].mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.held_out.append(batch)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, max_epochs=-1, num_sanity_val_steps=0, **(quiet | settings))


@pytest.mark.parametrize(("boundary", "dtype"), [("flow", "float32"), ("break", "bfloat16")])
def test_batches_hold_the_states_of_a_plain_forward_pass(tmp_path: Path, boundary: Any, dtype: str) -> None:
    module, source = Recorder(), data(packing=Packing(length=12, boundary=boundary), dtype=dtype, repeat=boundary == "flow")
    assert isinstance(source, ActivationSource)
    trainer(tmp_path, max_steps=6, limit_val_batches=0, enable_checkpointing=False).fit(module, datamodule=source)
    assert len(module.batches) == 6
    rows = list(islice(source._packed("train"), 200))
    seen = 0
    for batch in module.batches:
        assert batch["input"].shape == batch["target"].shape == (32, 32)
        assert str(batch["input"].dtype) == f"torch.{dtype}"
        number, position = batch["row"] // 12, batch["row"] % 12
        assert torch.equal(position, batch["position"])
        assert bool((position > 0).all())
        assert bool((batch["token"] > 2).all()), "no special token"
        for i in range(0, 32, 8):
            row = rows[int(number[i])]
            assert int(row.tokens[position[i]]) == int(batch["token"][i])
            mask = row.attends[None].long()
            sites = [source.input_site, source.target_site]
            found = collect_sites(source.producer, sites, input_ids=row.tokens[None], attention_mask=mask, use_cache=False)
            for name, site in zip(("input", "target"), sites, strict=True):
                tolerance = 1e-5 if dtype == "float32" else 0.05
                torch.testing.assert_close(batch[name][i], found[site][0, position[i]], rtol=tolerance, atol=tolerance)
            seen += 1
    assert seen == 24


@pytest.mark.parametrize("steps", [5, 7])
def test_a_resumed_fit_sees_the_same_batches_bit_for_bit(tmp_path: Path, steps: int) -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, max_steps=12, limit_val_batches=0, enable_checkpointing=False).fit(whole, datamodule=data())
    part = trainer(tmp_path, max_steps=steps, limit_val_batches=0, enable_checkpointing=False)
    part.fit(first, datamodule=data())
    part.save_checkpoint(tmp_path / "part.ckpt")
    rest = trainer(tmp_path, max_steps=12, limit_val_batches=0, enable_checkpointing=False)
    rest.fit(second, datamodule=data(prefetch=False), ckpt_path=str(tmp_path / "part.ckpt"))
    together = first.batches + second.batches
    assert len(together) == len(whole.batches) == 12
    for a, b in zip(together, whole.batches, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_running_out_of_memory_halves_the_forward_passes_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, starved = Recorder(), Recorder()
    trainer(tmp_path, max_steps=4, limit_val_batches=1, enable_checkpointing=False).fit(plain, datamodule=data())
    real, sizes = PairProducer._forward, []

    def forward(self: PairProducer, rows: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, rows)

    monkeypatch.setattr(PairProducer, "_forward", forward)
    trainer(tmp_path, max_steps=4, limit_val_batches=1, enable_checkpointing=False).fit(starved, datamodule=data())
    assert max(sizes) == 4
    for a, b in zip(plain.batches + plain.held_out, starved.batches + starved.held_out, strict=True):
        assert torch.equal(a["row"], b["row"])
        assert torch.equal(a["token"], b["token"])
        torch.testing.assert_close(a["target"], b["target"])


@pytest.mark.parametrize(("split", "count"), [("validation", 6), ("test", 4)])
def test_held_out_rows_come_once_each(tmp_path: Path, split: str, count: int) -> None:
    module, source = Recorder(), data(test_rows=4)
    runner = trainer(tmp_path, enable_checkpointing=False)
    (runner.validate if split == "validation" else runner.test)(module, datamodule=source, verbose=False)
    tokens = source.held_out_tokens(count, split)
    assert tokens.shape == (count, 12)
    kept = [(row, position) for row in range(count) for position in range(1, 12) if int(tokens[row, position]) != 2]
    assert torch.cat([batch["row"] for batch in module.held_out]).tolist() == [12 * row + position for row, position in kept]
    assert torch.cat([batch["token"] for batch in module.held_out]).tolist() == [int(tokens[place]) for place in kept]
    with pytest.raises(ValueError, match=f"7 held-out rows were asked for, but data.{split}_rows is {count}"):
        source.held_out_tokens(7, split)


def test_no_document_trains_calibrates_and_tests() -> None:
    source = data()
    splits = [{document.text for document in source._documents(split)} for split in ("train", "validation", "test")]
    assert all(splits)
    assert len(set.union(*splits)) == sum(map(len, splits))


def test_an_autoencoder_shares_its_one_site(tmp_path: Path) -> None:
    module = Recorder()
    source = data(target_site=None)
    trainer(tmp_path, max_steps=1, limit_val_batches=1, enable_checkpointing=False).fit(module, datamodule=source)
    assert all(batch["input"].data_ptr() == batch["target"].data_ptr() for batch in module.batches + module.held_out)


def test_text_that_ends_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    few = data(text=SyntheticEnglish(20, sentences=3), repeat=False)
    with pytest.raises(RuntimeError, match="repeat: true"):
        trainer(tmp_path, max_steps=1000, limit_val_batches=0, enable_checkpointing=False).fit(Recorder(), datamodule=few)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_batch_size": 30}, "32 is"),
        ({"buffer_rows": 20}, "16 is|24 is"),
        ({"lanes": 0}, "at least 1"),
        ({"drop": ["bos"]}, "begins"),
        ({"dtype": "float8"}, "bfloat16"),
        ({"tokenizer": None}, "data.tokenizer"),
        ({"model": "/nowhere/at/all", "tokenizer": None}, "config.json"),
        ({"input_site": "mlp.1"}, "mlp_in_unscaled"),
        ({"validation_share": 2.0}, "validation_share"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(**settings)


def test_a_layer_the_model_lacks_and_too_little_held_out_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers 0 to 2"):
        trainer(tmp_path, max_steps=1).fit(Recorder(), datamodule=data(input_site="mlp_in.3"))
    with pytest.raises(ValueError, match="validation_share"):
        data(validation_rows=10000).held_out_tokens(1, "validation")
    with pytest.raises(ValueError, match="test_share"):
        data(test_rows=10000).held_out_tokens(1, "test")


def test_the_model_in_a_folder_is_read_with_its_own_weights(tmp_path: Path) -> None:
    model: Any = tiny_language_model("llama", vocab_size=259)
    model.save_pretrained(tmp_path / "model")
    source = data(model=str(tmp_path / "model"), target_site="mlp_out_raw.1")
    tokens = source.held_out_tokens(2, "validation")
    site = parse_site("mlp_out_raw.1")
    expected = collect_sites(model, [site], input_ids=tokens)[site]
    assert torch.equal(collect_sites(source.producer, [site], input_ids=tokens)[site], expected)
    identity = source.model.identity()
    assert identity == data(model=str(tmp_path / "model"), target_site="mlp_out_raw.1").model.identity()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "model")
    assert source.model.identity() != identity
