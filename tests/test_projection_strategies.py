"""The callback on updates, under routing, on parts of a gradient, and on several processes: DDP and FSDP2 against one process.

Run as a script, this file is one rank (see ``main``).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent))
from warm_processes import run_ranks

from theodolite.callbacks.gradient_projection import GradientProjectionCallback
from theodolite.functional.directions import ConceptDirection
from theodolite.functional.extraction import haar_random_like

SHAPES = {"net.0.weight": (5, 6), "net.2.weight": (3, 5)}


class Classifier(LightningModule):
    """Somebody else's module: automatic optimisation, nothing known of projections."""

    def __init__(self, optimizer: str = "adamw", poison: int | None = None) -> None:
        super().__init__()
        self.kind, self.poison = optimizer, poison
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            for layer in (self.net[0], self.net[2], self):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss * float("nan") if batch_idx == self.poison and self.global_rank == self.trainer.world_size - 1 else loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen = {name: p.detach().clone() for name, p in self.named_parameters()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        made = {"adamw": lambda p: torch.optim.AdamW(p, lr=0.05), "sgd": lambda p: torch.optim.SGD(p, lr=0.1)}
        return made[self.kind](self.parameters())


def batches(rank: int = 0, world: int = 1) -> DataLoader:
    """The same global batches of 8 on any number of ranks."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 6, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    return DataLoader(TensorDataset(x[rank::world], y[rank::world]), batch_size=8 // world)


def direction(k: int = 1) -> ConceptDirection:
    return haar_random_like(SHAPES, k=k, seed=0)


def trainer_of(*callbacks: Callback, steps: int = 5, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_steps=steps, accelerator="cpu", callbacks=list(callbacks), **(quiet | dict[str, Any](devices=1) | options))


def fitted(callback: GradientProjectionCallback, optimizer: str = "adamw", **options: Any) -> tuple[Classifier, Trainer, dict[str, Tensor]]:
    module = Classifier(optimizer)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = trainer_of(callback, **options)
    trainer.fit(module, batches())
    return module, trainer, {name: p.detach() - start[name] for name, p in module.named_parameters()}


def cosine(rows: Tensor, moved: Tensor) -> float:
    return float((rows.flatten(1) @ moved.flatten()).norm() / moved.norm())


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize(("apply_to", "stays"), [("gradient", False), ("update", True), ("both", True)])
def test_a_foreign_module_under_adamw_stays_off_the_direction_only_with_update_projection(apply_to: Any, stays: bool) -> None:
    callback = GradientProjectionCallback(direction(2), gate="two_sided", apply_to=apply_to, measure_update=True)
    _, trainer, moved = fitted(callback)
    for name, rows in direction(2).vectors.items():
        assert (cosine(rows, moved[name]) < 1e-5) if stays else (cosine(rows, moved[name]) > 1e-2)
    logged = {key.removeprefix("projection/projection/"): float(value) for key, value in trainer.callback_metrics.items()}
    assert abs(logged["update_cos_before"]) > 1e-3
    assert (abs(logged["update_cos_after"]) < 1e-5) == stays
    assert logged["cin_null"] == pytest.approx(((2 / 30 + 2 / 15) / 2) ** 0.5)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_global_cosine_is_that_of_all_matrices_as_one_vector() -> None:
    grabbed: dict[str, Tensor] = {}

    class Grab(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            grabbed.update({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})

    callback = GradientProjectionCallback(direction(), measure_only=True, log_per_module=True)
    trainer = trainer_of(Grab(), callback, steps=1)
    trainer.fit(Classifier(), batches())
    long = torch.cat([grabbed[name].flatten() for name in SHAPES])
    v = torch.cat([direction().vectors[name].flatten() for name in SHAPES])
    logged = {key.removeprefix("projection/projection/"): float(value) for key, value in trainer.callback_metrics.items()}
    assert logged["global_cos"] == pytest.approx(float(long @ v / (long.norm() * v.norm())), abs=1e-6)
    assert logged["net.0/cos_before"] == pytest.approx(
        float(grabbed["net.0.weight"].flatten() @ direction().vectors["net.0.weight"].flatten() / grabbed["net.0.weight"].norm()), abs=1e-6
    )


def test_routing_trains_the_full_policy_evaluates_and_ends_with_the_deployed_one_and_resumes_exactly(tmp_path: Path) -> None:
    batch = next(iter(batches()))
    same = DataLoader(
        TensorDataset(*(part.repeat(8, *[1] * (part.ndim - 1)) for part in batch)), batch_size=8
    )  # a resumed fit restarts the data

    def routed() -> GradientProjectionCallback:
        return GradientProjectionCallback(direction(), gate="two_sided", apply_to="update", route=True)

    free, callback = Classifier(), routed()
    trainer_of(steps=8).fit(free, same)
    module = Classifier()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = trainer_of(callback, steps=8, val_check_interval=4, limit_val_batches=1, num_sanity_val_steps=0)
    trainer.fit(module, same, same)
    for name, rows in direction().vectors.items():
        deployed = dict(module.named_parameters())[name].detach()
        assert cosine(rows, module.seen[name] - start[name]) < 1e-5, "evaluation must see the deployed weights"
        assert cosine(rows, deployed - start[name]) < 1e-5
        torch.testing.assert_close(deployed + callback.projector.parked[name], dict(free.named_parameters())[name].detach())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again, straight = Classifier(), Classifier()
    trainer_of(routed(), steps=10).fit(again, same, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    trainer_of(routed(), steps=10).fit(straight, same)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), straight.parameters(), strict=True))


def test_parts_of_a_gradient_are_credited_with_what_they_add() -> None:
    class TwoParts(Classifier):
        def __init__(self) -> None:
            super().__init__("sgd")
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # pyright: ignore
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            for part, rows in (("policy", slice(0, 5)), ("teacher", slice(5, 8))):
                self.manual_backward(nn.functional.cross_entropy(self.net(batch[0][rows]), batch[1][rows], reduction="sum"))
                for one in self.trainer.callbacks:  # type: ignore[attr-defined]
                    if hasattr(one, "on_microbatch_gradients"):
                        one.on_microbatch_gradients(self.trainer, self, None, part)
            optimizer.step()

    trainer = trainer_of(GradientProjectionCallback(direction(), measure_parts=True), steps=1)
    trainer.fit(TwoParts(), batches())
    logged = {key.removeprefix("projection/projection/"): float(value) for key, value in trainer.callback_metrics.items()}
    assert logged["part/policy/cos"] + logged["part/teacher/cos"] == pytest.approx(logged["global_cos"], abs=1e-6)
    assert abs(logged["part/teacher/cos"]) > 1e-3


def test_real_adapter_matrices_without_a_direction_are_left_alone_and_b_stays_off_it() -> None:
    class Adapted(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                base = nn.Sequential()
                base.add_module("o_proj", nn.Linear(6, 5, bias=False))
                self.net: Any = get_peft_model(base, LoraConfig(r=3, target_modules=["o_proj"]))  # pyright: ignore

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net(batch[0]).sub(batch[0][:, :5]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)

    name = "net.base_model.model.o_proj.lora_B.default.weight"
    v = torch.nn.functional.normalize(torch.randn(1, 5, generator=torch.Generator().manual_seed(0)))
    module = Adapted()
    callback = GradientProjectionCallback(ConceptDirection({name: v}, "lora_B"), gate="two_sided", apply_to="update")
    trainer_of(callback, steps=6).fit(module, batches())
    weights = dict(module.named_parameters())
    product = (weights[name] @ weights[name.replace("lora_B", "lora_A")]).detach()
    assert product.norm() > 1e-2
    assert (v @ product).norm() < 1e-6 * product.norm()


def test_a_direction_from_another_revision_stops_the_fit_before_it_starts() -> None:
    module = Classifier()
    module.net.config = SimpleNamespace(_name_or_path="org/model", _commit_hash="abc")  # type: ignore[assignment]
    given = ConceptDirection(direction().vectors, metadata={"model": "org/model", "model_revision": "older"})
    with pytest.raises(ValueError, match="revision 'older' of org/model and 'abc' is trained"):
        trainer_of(GradientProjectionCallback(given)).fit(module, batches())
    trainer_of(GradientProjectionCallback(given, check_model=False), steps=1).fit(module, batches())


# ---------------------------------------------------------------- several processes

CASES: dict[str, dict[str, Any]] = {
    "gradient": {"gate": "one_sided", "preserve_magnitude": True},
    "both": {"gate": "two_sided", "apply_to": "both"},
    "flattened": {"gate": "two_sided", "apply_to": "update", "target": "flattened"},
    "global": {"gate": "one_sided", "gate_scope": "global", "overshoot": 2.0},
    "output": {"gate": "two_sided", "apply_to": "update"},
    "poisoned": {"gate": "two_sided", "apply_to": "both"},
}


def main(folder: str, kind: str) -> None:
    """One process of every case: trains, then writes what it ended with."""
    world = 1 if kind == "single" else 2
    results = {}
    for case, settings in CASES.items():
        used = direction(2)
        if case == "output":
            used = ConceptDirection({name: torch.linalg.qr(torch.randn(n, 1, generator=torch.Generator().manual_seed(n)))[0].T
                                     for name, (n, _) in SHAPES.items()}, "lora_B")  # fmt: skip
        if os.environ.get("LOCAL_RANK") == "1":  # as read from a file whose reader has an order of its own in every process
            used = ConceptDirection(dict(reversed(used.vectors.items())), used.space)
        callback = GradientProjectionCallback(used, **settings)
        options: dict[str, Any] = {"devices": world}
        if kind == "ddp":
            options["strategy"] = "ddp"
        if kind == "fsdp2":
            options["strategy"] = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        module = Classifier(poison=2 if case == "poisoned" else None)
        trainer = trainer_of(callback, steps=4, use_distributed_sampler=False, **options)
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        trainer.fit(module, batches(rank, world))
        parts: dict[str, Any] = dict(module.named_parameters())
        weights = {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten().tolist() for n, p in parts.items()}
        logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
        results[case] = {"weights": weights, "logged": logged, "skipped": callback.skipped_steps}
    Path(folder, f"{kind}-{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(results))


@pytest.mark.distributed
def test_one_process_two_ddp_ranks_and_two_fsdp2_ranks_make_the_same_steps(tmp_path: Path) -> None:
    read: dict[str, list[dict[str, Any]]] = {}
    for kind in ("single", "ddp", "fsdp2"):
        ranks = ["0"] if kind == "single" else ["0", "1"]
        run_ranks([__file__, str(tmp_path), kind], tmp_path, len(ranks))
        read[kind] = [json.loads((tmp_path / f"{kind}-{rank}.json").read_text()) for rank in ranks]
    (one,) = read["single"]
    for kind in ("ddp", "fsdp2"):
        assert read[kind][0] == read[kind][1], "ranks must agree"
        for case, expected in one.items():
            found = read[kind][0][case]
            assert found["skipped"] == expected["skipped"] == (1 if case == "poisoned" else 0)
            for name, values in expected["weights"].items():
                torch.testing.assert_close(
                    torch.tensor(found["weights"][name]), torch.tensor(values), atol=1e-6, rtol=1e-5, msg=f"{kind} {case} {name}"
                )
            assert found["logged"] == pytest.approx(expected["logged"], abs=2e-6), (kind, case)
    assert abs(one["both"]["logged"]["projection/projection/update_cos_before"]) > 1e-3


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
