"""FVUCallback on modules that know nothing of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_language_models import tiny_language_model, token_rows

from theodolite.callbacks.fvu import FVUCallback
from theodolite.functional.fvu import fraction_of_variance_unexplained


class Foreign(LightningModule):
    """A linear reconstruction with dropout, whose steps return what they reconstruct."""

    def __init__(self, shape: str = "dict") -> None:
        super().__init__()
        self.layer, self.shape = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2)), shape
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": []}

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def _step(self, batch: Tensor, stage: str) -> dict[str, Tensor]:
        out = self(batch)
        if not self.trainer.sanity_checking:
            self.seen[stage].append((batch.detach().double(), out.detach().double()))
        return {"loss": (out - batch).square().mean(), "target": batch, "reconstruction": out}

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self._step(batch, "train")

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        found = self._step(batch, "val")
        return (found["target"], found["reconstruction"]) if self.shape == "tuple" else found

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def loader(n: int = 40, width: int = 6, seed: int = 0, batch: int = 4) -> DataLoader:
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 3
    return DataLoader(rows, batch_size=batch)  # pyright: ignore[reportArgumentType]


def fit(folder: Path, module: LightningModule, callbacks: list[Any], train: Any, val: Any = None, **settings: Any) -> Trainer:
    fixed: dict[str, Any] = {"max_steps": 10, "log_every_n_steps": 4, "accelerator": "cpu", "enable_model_summary": False}
    fixed |= {"enable_checkpointing": False, "logger": CSVLogger(folder), "enable_progress_bar": False}
    resume = settings.pop("ckpt_path", None)
    trainer = Trainer(default_root_dir=folder, callbacks=callbacks, **(fixed | settings))
    torch.manual_seed(0)
    trainer.fit(module, train, val, ckpt_path=resume)
    return trainer


def logged(folder: Path, key: str) -> list[float]:
    lines = [line.split(",") for line in next(folder.rglob("metrics.csv")).read_text().splitlines()]
    column = lines[0].index(key)
    return [float(line[column]) for line in lines[1:] if line[column]]


def fvu_of(pairs: list[tuple[Tensor, Tensor]]) -> float:
    return float(fraction_of_variance_unexplained(torch.cat([y for y, _ in pairs]), torch.cat([r for _, r in pairs])))


@pytest.mark.parametrize("shape", ["dict", "tuple"])
def test_training_is_measured_by_windows_and_validation_as_a_whole(tmp_path: Path, shape: str) -> None:
    module = Foreign(shape)
    trainer = fit(tmp_path, module, [FVUCallback()], loader(), loader(22, seed=1))
    assert logged(tmp_path, "train/fvu") == pytest.approx([fvu_of(module.seen["train"][:4]), fvu_of(module.seen["train"][4:8])], rel=1e-6)
    assert logged(tmp_path, "val/fvu") == pytest.approx([fvu_of(module.seen["val"])], rel=1e-6)
    assert len(module.seen["val"]) == 6, "the last batch is short"
    assert {"train/fvu", "val/fvu"} <= trainer.progress_bar_metrics.keys()
    assert "val/fvu_median" not in trainer.progress_bar_metrics
    assert logged(tmp_path, "val/fvu_median")[0] > 0
    assert logged(tmp_path, "val/fvu_dropped") == [0.0]


def test_a_window_of_its_own_length(tmp_path: Path) -> None:
    module = Foreign()
    fit(tmp_path, module, [FVUCallback(window=3)], loader(), log_every_n_steps=1)
    expected = [fvu_of(module.seen["train"][i : i + 3]) for i in (0, 3, 6)]
    assert list(dict.fromkeys(logged(tmp_path, "train/fvu"))) == pytest.approx(expected, rel=1e-6)


def test_several_validation_loaders_are_kept_apart(tmp_path: Path) -> None:
    module = Foreign()
    fit(tmp_path, module, [FVUCallback(train=False)], loader(), [loader(8, seed=1), loader(12, seed=2)])
    for index, pairs in ((0, module.seen["val"][:2]), (1, module.seen["val"][2:])):
        assert logged(tmp_path, f"val/fvu/dataloader_idx_{index}") == pytest.approx([fvu_of(pairs)], rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"forward": True}, {"target": "layer.0 input", "reconstruction": "layer output"}], ids=str)
def test_measuring_leaves_no_trace(tmp_path: Path, settings: dict[str, Any]) -> None:
    finals = []
    for callbacks in ([], [FVUCallback(**settings)]):
        torch.manual_seed(1)
        module = Foreign()
        pairs = PairLoader() if settings.get("forward") else loader()
        fit(tmp_path / str(len(callbacks)), PairModule(module) if settings.get("forward") else module, callbacks, pairs)
        finals.append([*module.state_dict().values(), torch.get_rng_state(), *(p.grad for p in module.parameters())])
        assert all(part.training for part in module.modules())
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


class PairModule(LightningModule):
    """A transcoder from ``input`` to ``target`` in a dict; its forward has dropout, which measuring must switch off."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
        self.measured: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.layer(x) if isinstance(self.inner, Foreign) else self.inner(x)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return (self(batch["input"]) - batch["target"]).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        kept = batch["position"] > 0
        self.measured.append((batch["target"][kept].double(), self(batch["input"])[kept].double()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class PairLoader:
    """Batches of activations with positions, 0 included."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(3)
        for _ in range(10):
            x = torch.randn(8, 6, generator=generator)
            yield {"input": x, "target": x.flip(1) * 2 + 1, "position": torch.arange(8) % 4}


def test_a_transcoder_is_run_in_evaluation_mode_and_first_positions_are_dropped(tmp_path: Path) -> None:
    module = PairModule()
    fit(tmp_path, module, [FVUCallback(forward=True)], PairLoader(), PairLoader(), num_sanity_val_steps=0)
    assert logged(tmp_path, "val/fvu_forward") == pytest.approx([fvu_of(module.measured)], rel=1e-6)
    assert logged(tmp_path, "val/fvu_forward_dropped") == [0.25]


class LanguageModel(LightningModule):
    """A language model with a probe on its MLP's output."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.model = tiny_language_model(family).requires_grad_(False)
        self.probe = nn.Linear(32, 32)
        self.rows: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        from theodolite.sites import collect_sites, parse_site

        kept = batch["attention_mask"].bool() & (batch["input_ids"] != 1)
        kept[:, 0] = False
        sites = [parse_site("mlp_in.1"), parse_site("mlp_out.1")]
        tokens: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        found = collect_sites(self.model, sites, **tokens)
        self.model(**tokens)
        self.rows.append((found[sites[1]][kept].double(), self.probe(found[sites[0]])[kept].double()))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_pair_of_sites_drops_first_bos_and_padding_by_default(tmp_path: Path, family: str) -> None:
    module = LanguageModel(family)
    ids = token_rows(4, 8)
    ids[2, 5] = 1
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batches = [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}]
    callback = FVUCallback(target="blocks.1.hook_mlp_out", reconstruction="probe output")
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback])
    found = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)[0]  # pyright: ignore[reportArgumentType]
    assert found["val/fvu_blocks.1.hook_mlp_out"] == pytest.approx(fvu_of(module.rows), rel=1e-6)
    assert found["val/fvu_blocks.1.hook_mlp_out_dropped"] == pytest.approx((4 + 1 + 2) / 32)
    assert not module.probe._forward_hooks


def test_bf16_true_does_not_touch_the_sums(tmp_path: Path) -> None:
    class Offset(Foreign):
        def _step(self, batch: Tensor, stage: str) -> dict[str, Tensor]:
            found = super()._step(batch, stage)
            self.seen[stage][-1] = (found["target"].detach().double() + 40, found["reconstruction"].detach().double() + 40)
            return found | {"target": found["target"].float() + 40, "reconstruction": found["reconstruction"].float() + 40}

    module, callback = Offset(), FVUCallback()
    fit(tmp_path, module, [callback], loader(), loader(8, seed=2), precision="bf16-true", num_sanity_val_steps=0)
    assert next(module.parameters()).dtype == torch.bfloat16
    assert callback._sums["train", 0].metric.fvu_mean.dtype == torch.float64
    assert logged(tmp_path, "val/fvu") == pytest.approx([fvu_of(module.seen["val"])], rel=1e-6)


def test_a_run_resumed_inside_a_window_logs_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    class Plain(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(6, 6))

    from torchdata.stateful_dataloader import StatefulDataLoader

    def rows() -> Any:
        return StatefulDataLoader(loader(60).dataset, batch_size=4)

    torch.manual_seed(5)
    start = Plain().state_dict()
    modules = [Plain(), Plain(), Plain()]
    for module in modules[:2]:
        module.load_state_dict(start)
    fit(tmp_path / "whole", modules[0], [FVUCallback(window=5)], rows(), max_steps=10, log_every_n_steps=1)
    saving = ModelCheckpoint(tmp_path, "part", every_n_train_steps=7)
    part: dict[str, Any] = {"max_steps": 7, "log_every_n_steps": 1, "enable_checkpointing": True}
    fit(tmp_path / "part", modules[1], [FVUCallback(window=5), saving], rows(), **part)
    fit(tmp_path / "rest", modules[2], [FVUCallback(window=5)], rows(), log_every_n_steps=1, ckpt_path=str(tmp_path / "part.ckpt"))
    whole, rest = (list(dict.fromkeys(logged(tmp_path / name, "train/fvu"))) for name in ("whole", "rest"))
    assert whole[1:] == rest
    assert len(whole) == 2


def test_groups_are_named_and_worse_than_the_mean_is_remarked_on(tmp_path: Path) -> None:
    class Nested(Foreign):
        def _step(self, batch: Tensor, stage: str) -> dict[str, Tensor]:
            found = super()._step(batch, stage)
            return found | {"reconstruction": torch.stack([batch * 0 - 50, found["reconstruction"]], -2)}

    module = Nested()
    with pytest.warns(UserWarning, match="worse than predicting the mean"):
        fit(tmp_path, module, [FVUCallback(groups=["half", "all"]), FVUCallback(groups=["a", "b"], name="again")], loader(), loader(8))
    assert logged(tmp_path, "val/fvu_all") == logged(tmp_path, "val/fvu") == pytest.approx([fvu_of(module.seen["val"])], rel=1e-6)
    assert logged(tmp_path, "val/fvu_half")[0] == logged(tmp_path, "val/fvu_max")[0] > 1
    assert logged(tmp_path, "val/again_a") == logged(tmp_path, "val/fvu_half")


class LogsItself(PairModule):
    logs_fvu_as = "fvu"


def test_no_callback_logs_under_the_name_of_the_modules_own_fvu(tmp_path: Path) -> None:
    names = {"fvu": False, "fvu_1024": False, "fvu_max": False, "fvu_forward": True, "coder_fvu": True, "fvu_mlp_out.8": True}
    for name, fits in names.items():
        callback = FVUCallback(forward=True, name=name)
        if fits:
            callback.setup(Trainer(logger=False), LogsItself(), "fit")
            continue
        with pytest.raises(ValueError, match=f"LogsItself logs {name} itself"):
            fit(tmp_path, LogsItself(), [callback], PairLoader())
    named = [
        FVUCallback(),
        FVUCallback(target="layer.0 input", reconstruction="layer output"),
        FVUCallback(forward=True),
        FVUCallback(forward="coder"),
    ]
    assert [callback.name for callback in named] == ["fvu", "fvu_layer.0_input", "fvu_forward", "fvu_coder"]


def test_what_cannot_be_measured_is_refused_in_one_sentence(tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [{"target": "mlp_in.1"}, {"drop": ["bos"]}, {"window": 0}]
    for settings in [*bad, {"target": "a", "reconstruction": "b", "forward": True}]:
        with pytest.raises(ValueError, match="FVUCallback"):
            FVUCallback(**settings)
    with pytest.raises(TypeError, match="target and reconstruction"):
        fit(tmp_path, PairModule(), [FVUCallback()], PairLoader())
    with pytest.raises(ValueError, match="no activation site"):
        fit(tmp_path, Foreign(), [FVUCallback(target="layer.9 input", reconstruction="layer output")], loader())
    with pytest.raises(TypeError, match="batch is"):
        fit(tmp_path, Foreign(), [FVUCallback(forward=True)], loader())
