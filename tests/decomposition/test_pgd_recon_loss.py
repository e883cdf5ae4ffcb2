"""The callback and the attack under it: the same numbers for every split of the same rows, in every stage, without a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from tiny_lightning import TinyReconstruction, TinyRows  # noqa: E402

from theodolite.callbacks.pgd_recon_loss import PGDReconLossCallback, table_text  # noqa: E402
from theodolite.evaluation_rows import RowStore  # noqa: E402
from theodolite.protocols import MaskedReconstruction  # noqa: E402
from theodolite.reconstruction_attack import AttackSettings, attack_reconstruction, untouched  # noqa: E402

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def trainer(folder: Path, *callbacks: PGDReconLossCallback, **settings: Any) -> Trainer:
    return Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), default_root_dir=folder, **QUIET, **settings)


def losses(net: LightningModule, folder: Path, callback: PGDReconLossCallback, **data: Any) -> dict[str, float]:
    run = trainer(folder, callback)
    run.validate(net, TinyRows(**data), verbose=False)
    return {key: float(value) for key, value in run.callback_metrics.items() if callback.name in key}


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_attacks_and_persistent_sources_are_the_same_on_several_ranks(ranks: int, tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "attack_ranks.py"), str(tmp_path), "1", str(ranks)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one = json.loads((tmp_path / "1-0.json").read_text())
    assert one["float64/shared"]["left_out"] == 3
    for rank in range(ranks):
        found = json.loads((tmp_path / f"{ranks}-{rank}.json").read_text())
        assert found.keys() == one.keys()
        for setting, values in one.items():
            tolerance = 1e-9 if setting.startswith("float64") else 1e-5
            assert found[setting] == pytest.approx(values, rel=tolerance), setting


def test_numbers_do_not_depend_on_microbatches_batches_or_what_is_kept(tmp_path: Path) -> None:
    net = TinyReconstruction(kind="kl")
    common: dict[str, Any] = {"n_steps": [0, 1, 5, 20], "attack_batch_size": 8, "legacy_ranks": 4}
    reference = losses(net, tmp_path, PGDReconLossCallback(**common), global_batch_size=8)
    assert reference.keys() >= {f"val/pgd_recon/{kind}/n{n}" for kind in ("joint_8", "averaged_4x2", "separate_2") for n in (0, 1, 5, 20)}
    for micro, batch, keep in ((3, 8, False), (2, 16, True), (None, 3, False), (1, 5, True)):
        callback = PGDReconLossCallback(**common, micro_batch_size=micro, keep_prepared=keep)
        found = losses(net, tmp_path, callback, global_batch_size=batch)
        assert found == pytest.approx(reference, rel=1e-9)
    for n in (1, 5, 20):
        assert reference[f"val/pgd_recon/averaged_4x2/n{n}"] == pytest.approx(reference[f"val/pgd_recon/joint_8/n{n}"], rel=1e-12)
    assert reference["val/pgd_recon/separate_2/n20"] > reference["val/pgd_recon/joint_8/n20"]


def test_memory_of_one_microbatch_unless_asked_otherwise(tmp_path: Path) -> None:
    for keep, prepared in ((False, 4 * (2 + 1)), (True, 4)):
        net = TinyReconstruction()
        callback = PGDReconLossCallback(n_steps=2, attack_batch_size=16, micro_batch_size=4, keep_prepared=keep)
        losses(net, tmp_path, callback)
        assert net.prepared == prepared


def test_every_number_is_written_beside_its_attack_batch(tmp_path: Path) -> None:
    callback = PGDReconLossCallback(n_steps=[1, 5], attack_batch_size=6, legacy_ranks=3, micro_batch_size=2, seed=7, name="tight")
    metrics = losses(TinyReconstruction(), tmp_path, callback)
    written = json.loads((tmp_path / "pgd" / "tight.val.step_000000.json").read_text())
    assert (written["attack_batch_size"], written["micro_batch_size"], written["seed"], written["rows_left_out"]) == (6, 2, 7, 4)
    assert {(row["attack"], row["attack_batch"]) for row in written["results"]} == {("joint_6", 6), ("averaged_3x2", 6), ("separate_2", 2)}
    for row in written["results"]:
        assert metrics[f"val/tight/{row['attack']}/n{row['n_steps']}"] == row["loss"]
        assert row["attacks"] == 2
        assert row["loss"] == pytest.approx(sum(row["per_attack"]) / 2)
        assert row["standard_error"] == pytest.approx(abs(row["per_attack"][0] - row["per_attack"][1]) / 2)
    text = table_text(written["results"])
    assert all(label in text for label in ("joint_6", "averaged_3x2", "separate_2", "2 attacks", "±"))


def test_it_works_in_fit_and_test_and_changes_nothing_about_training(tmp_path: Path) -> None:
    def fitted(*callbacks: PGDReconLossCallback) -> tuple[dict[str, Any], TinyReconstruction, torch.Tensor]:
        torch.manual_seed(3)
        net = TinyReconstruction(dropout=0.5)
        run = trainer(tmp_path, *callbacks, max_epochs=2, num_sanity_val_steps=1)
        run.fit(net, TinyRows())
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in net.parameters())
        return dict(run.callback_metrics), net, torch.rand(3)

    steps = PGDReconLossCallback(n_steps=[0, 3], attack_batch_size=8)
    own = PGDReconLossCallback(n_steps=[2], attack_batch_size=8, mask_scope="unique_per_datapoint", name="own")
    metrics, attacked, after = fitted(steps, own)
    _, alone, expected = fitted()
    torch.testing.assert_close(after, expected, rtol=0, atol=0)
    for one, other in zip(attacked.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert one.requires_grad
    assert {"val/pgd_recon/joint_8/n0", "val/pgd_recon/joint_8/n3", "val/own/unique/n2"} <= metrics.keys()
    assert sorted(path.name for path in (tmp_path / "pgd").iterdir()) == [
        f"{name}.val.step_{step:06d}.json" for name in ("own", "pgd_recon") for step in (2, 4)
    ]
    run = trainer(tmp_path, steps)
    run.test(attacked, TinyRows(), verbose=False)
    assert float(run.callback_metrics["test/pgd_recon/joint_8/n3"]) == pytest.approx(float(metrics["val/pgd_recon/joint_8/n3"]), rel=1e-12)


def test_modes_flags_gradients_and_randomness_are_put_back_even_after_an_error() -> None:
    net = TinyReconstruction(dropout=0.5)
    net.dropout.train()
    net.matrices["gate"].requires_grad_(False)
    net.matrices["first"].grad = torch.ones_like(net.matrices["first"])
    before = torch.get_rng_state()

    def fail() -> None:
        with untouched(net):
            assert not net.dropout.training
            assert not any(parameter.requires_grad for parameter in net.parameters())
            torch.rand(5)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert net.dropout.training
    assert net.matrices["first"].requires_grad
    assert not net.matrices["gate"].requires_grad
    assert net.matrices["first"].grad is not None
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_rows_of_the_data_are_attacked_once_each_and_in_their_place() -> None:
    stores = [RowStore(rank, 3, limit=10) for rank in range(3)]
    for rank, store in enumerate(stores):
        for batch in torch.arange(rank, 14, 3).split(2):
            store.add({"ids": batch}, len(batch))
    for start, stop, micro in ((0, 10, None), (0, 4, 1), (4, 8, 2), (9, 10, 3)):
        pieces = [piece for store in stores for piece in store.pieces(start, stop, micro)]
        for piece, slots in pieces:
            assert piece["ids"].tolist() == slots
        assert sorted(slot for _, slots in pieces for slot in slots) == list(range(start, stop))


def test_a_module_that_is_no_lightning_module_can_be_attacked_too() -> None:
    class Plain:
        """y = source, and larger is worse."""

        def leading_shape(self, batch: Any) -> tuple[int, ...]:
            return (len(batch["x"]),)

        def source_channels(self) -> dict[str, int]:
            return {"only": 1}

        def prepare(self, batch: Any) -> Any:
            return batch["x"]

        def loss_sum(self, prepared: Any, sources: Any) -> tuple[torch.Tensor, int]:
            return (prepared * sources["only"][..., 0]).sum(), len(prepared)

    plain = Plain()
    assert isinstance(plain, MaskedReconstruction)
    store = RowStore()
    store.add({"x": torch.tensor([3.0, -1.0, -4.0, 1.0])}, 4)
    for scope, expected in (("shared_across_batch", 0.0), ("unique_per_datapoint", 1.0)):
        settings = AttackSettings((10,), 0.1, "zeroes", scope, attack_batch_size=4)  # pyright: ignore[reportArgumentType]
        outcomes, _ = attack_reconstruction(plain, store, settings)
        (outcome,) = outcomes.values()
        assert outcome.row("", 10, settings)["loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_steps": []}, "n_steps"),
        ({"n_steps": [1, 1]}, "different"),
        ({"step_size": 0.0}, "step_size"),
        ({"attack_batch_size": 0}, "attack_batch_size"),
        ({"legacy_ranks": 7}, "63 would"),
        ({"legacy_ranks": 2, "mask_scope": "unique_per_row"}, "needs a shared mask_scope"),
        ({"mask_scope": "everything"}, "mask_scope"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGDReconLossCallback(**settings)


def test_what_cannot_be_attacked_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="BoringModel cannot be attacked"):
        trainer(tmp_path, PGDReconLossCallback()).validate(BoringModel(), verbose=False)
    with pytest.raises(ValueError, match="are called 'pgd_recon'"):
        trainer(tmp_path, PGDReconLossCallback(), PGDReconLossCallback()).validate(TinyReconstruction(), TinyRows(), verbose=False)
    with pytest.raises(ValueError, match="has 16 rows and fills no attack batch of 64"):
        trainer(tmp_path, PGDReconLossCallback()).validate(TinyReconstruction(), TinyRows(), verbose=False)
    with pytest.raises(ValueError, match="cannot be cut"):
        RowStore().add({"x": torch.zeros(3), "y": torch.zeros(2)}, 3)
