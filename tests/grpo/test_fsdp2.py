"""Weights in shards over two gloo ranks against one process: the same rollouts, metrics and weights, and resumes to the bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_fits import PlainDescent
from test_two_ranks import command, difference, log_of, rows_of, two_ranks
from tiny_policies import callback, config, grpo, prompts, tiny_model, tokenizer

from theodolite.cli import main
from theodolite.doctor import shards
from theodolite.functional.extraction import haar_random_like
from theodolite.lightning_modules.grpo.losses import TokenBatch
from theodolite.lightning_modules.grpo.module import GRPOModule
from theodolite.lightning_modules.sft import SFTModule
from theodolite.lightning_modules.sharded_weights import check_sharding
from theodolite.sharded_memory import decoder_layers

STRATEGY = "lightning.pytorch.strategies.ModelParallelStrategy"
SIZES = {"data_parallel_size": "2", "tensor_parallel_size": "1", "save_distributed_checkpoint": "false"}
SHARDS = [f"--trainer.strategy.class_path={STRATEGY}", *(f"--trainer.strategy.init_args.{key}={value}" for key, value in SIZES.items())]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": LINEAR, "init_lora_weights": False}  # of no size that ranks divide


class ShortOfMemory(PlainDescent):
    """Rank 1 is out of memory the first time that it computes several rollouts at once."""

    ran_out = False

    def microbatch_loss(self, window: Any, indices: Any, *more: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = super().microbatch_loss(window, indices, *more)
        if self.global_rank == 1 and len(indices) > 1 and not self.ran_out:
            self.ran_out = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return loss


class Squared:
    """A loss that is not linear in the advantage, so that nothing is skipped or merged."""

    def __call__(self, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (batch.advantages - batch.log_probs).square(), {}


class Share(Callback):
    """Writes how many numbers of a moment this rank holds, and when its weights were in shards."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder, self.in_shards = Path(folder), set[str]()

    def note(self, when: str, module: Any) -> None:
        self.in_shards |= {when} if module.in_shards else set()

    def on_rollouts(self, trainer: Any, pl_module: Any, window: Any) -> None:
        self.note("rollouts", pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self.note("backward", pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.note("update", pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        moments = sum(state["exp_avg"].to_local().numel() for state in trainer.optimizers[0].state.values())
        held = {"moments": moments, "trained": sum(p.numel() for p in pl_module.trainable_parameters()), "when": sorted(self.in_shards)}
        (self.folder / f"share-{trainer.global_rank}.json").write_text(json.dumps(held))


def written(folder: Path, name: str, grader: str = "one_sided", callbacks: tuple[Any, ...] = (), **model: Any) -> str:
    witness = callback("tiny_policies.Witness", folder=str(folder / f"witness-{name}"))
    kind = {"class_path": model.pop("class_path", "grpo_fits.PlainDescent")}
    own = grpo(**({"lr": 0.3, "export": False, "max_grad_norm": 0.3, "table_every": 0} | model)) | kind
    data = {"class_path": "test_two_ranks.OddPrompts", "grader": grader}
    limits = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    return config(folder, name, own, data, callbacks=[witness, *callbacks], **limits)


SEVERAL: dict[str, Any] = {"updates_per_window": 2, "beta": 0.1, "eval_drift": True}
CASES: dict[str, dict[str, Any]] = {
    "adapter": {"lora": LORA, "beta": 0.1, "micro_batch_size": 1, "balance_ranks": False},
    "adapter_split": SEVERAL | {"lora": LORA, "split_backward": True, "merge_adapter": True, "token_budget": 20},
    "full": SEVERAL | {"micro_batch_size": 4},
    "full_split": {"split_backward": True, "zero_variance": "drop"},
    "patterns": {"trainable": ["*.layers.1.*"], "zero_variance": "refill", "kl_estimator": "k1_reward", "beta": 0.1},
    "own_loss": {"loss": {"class_path": "test_fsdp2.Squared"}, "overlap_grading": True},
    "nothing": {"grader": "all_nan"},
    "one_token": {"max_new_tokens": 1},
    "memory": {"split_backward": True, "class_path": "test_fsdp2.ShortOfMemory"},
}


def projection(folder: Path) -> dict[str, Any]:
    model = tiny_model("qwen3")
    shapes = {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters() if name.endswith("o_proj.weight")}
    haar_random_like(shapes, k=2, seed=0).save(folder / "direction")
    settings = {"direction": str(folder / "direction"), "gate": "two_sided", "apply_to": "both"}
    return callback("theodolite.callbacks.gradient_projection.GradientProjectionCallback", **settings)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_two_ranks_in_shards_compute_what_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases: dict[str, dict[str, Any]] = CASES | {"projected": {"callbacks": (projection(tmp_path),)}}
    lines = [command(tmp_path, written(tmp_path, name, **settings)) for name, settings in cases.items()]
    assert two_ranks(tmp_path, lines, limit_s=400.0, strategy=SHARDS) == [0, 0], log_of(tmp_path, 0)[-2000:] + log_of(tmp_path, 1)[-2000:]
    assert "microbatches are halved, the window is tried again" in log_of(tmp_path, 1)
    for name, settings in cases.items():
        one: dict[str, Any] = settings | ({"class_path": "grpo_fits.PlainDescent"} if name == "memory" else {})
        main(command(tmp_path, written(tmp_path, f"{name}-one", **one)))
        ranks = [load_file(tmp_path / f"witness-{name}" / f"weights-{rank}.safetensors") for rank in range(2)]
        assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
        print(f"{name}: largest weight difference, over the largest weight, {difference(tmp_path, name, f'{name}-one'):.1e}")
        assert difference(tmp_path, name, f"{name}-one") < 1e-6, name
        first, second = rows_of(tmp_path, name), rows_of(tmp_path, f"{name}-one")
        assert len([row for row in first if "train/loss" in row]) == 4 // settings.get("updates_per_window", 1)
        for a, b in zip(first, second, strict=True):
            assert a == {k: pytest.approx(v, rel=1e-4, abs=2e-6, nan_ok=True) if isinstance(v, float) else v for k, v in b.items()}, name
    moved = [difference(tmp_path, name, "nothing") for name in ("full", "full_split", "patterns", "own_loss", "projected")]
    assert min(moved) > 1e-3, "a run that learns nothing would agree with anything"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "full"])
def test_resumed_shards_end_in_the_bytes_of_the_uninterrupted_run_and_export_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any] | None
) -> None:
    monkeypatch.chdir(tmp_path)
    policy = tmp_path / "base"
    tiny_model("qwen3").save_pretrained(policy)  # pyright: ignore[reportCallIssue]
    tokenizer().save_pretrained(policy)

    def line(name: str, *more: str) -> list[str]:
        checkpoints = callback("lightning.pytorch.callbacks.ModelCheckpoint", every_n_train_steps=2, save_top_k=-1, filename="{step}")
        callbacks = [callback("tiny_policies.Witness", folder=str(tmp_path / f"witness-{name}")), checkpoints]
        callbacks += [callback("test_fsdp2.Share", folder=str(tmp_path))] if name == "straight" else []
        model = grpo(policy=str(policy), train_tokenizer=None, lora=lora, warmup_steps=3, table_every=0)
        limits: dict[str, Any] = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 0}
        return [*command(tmp_path, config(tmp_path, name, model, prompts(), callbacks=callbacks, **limits)), *more]

    saved = f"{tmp_path}/run-straight/checkpoints/step=2.ckpt"
    lines = [line("straight"), line("resumed", f"--ckpt_path={saved}")]
    assert two_ranks(tmp_path, lines, strategy=SHARDS) == [0, 0], log_of(tmp_path, 0)[-2000:] + log_of(tmp_path, 1)[-2000:]
    shares = [json.loads((tmp_path / f"share-{rank}.json").read_text()) for rank in range(2)]
    assert sum(share["moments"] for share in shares) == shares[0]["trained"]
    assert max(share["moments"] for share in shares) < 0.6 * shares[0]["trained"], "three rows are two and one"
    assert [share["when"] for share in shares] == [["backward", "update"]] * 2
    assert difference(tmp_path, "straight", "resumed") == 0.0
    tail = rows_of(tmp_path, "resumed")
    assert tail == rows_of(tmp_path, "straight")[-len(tail) :]
    assert any("train/loss" in row for row in tail)
    names = torch.load(saved, weights_only=True)["state_dict"]
    assert all("lora_" in name for name in names) == (lora is not None)
    base: Any = AutoModelForCausalLM.from_pretrained(policy)
    exported = tmp_path / "run-straight" / "policy"
    loaded = PeftModel.from_pretrained(base, exported) if lora else AutoModelForCausalLM.from_pretrained(exported)
    trained = load_file(tmp_path / "witness-straight" / "weights-0.safetensors")
    for name, value in loaded.named_parameters():
        assert torch.equal(value, trained[f"model.{name}"]), name
    assert json.loads((exported / ("adapter_config.json" if lora else "config.json")).read_text())
    main(line("single", f"--ckpt_path={saved}"))
    assert difference(tmp_path, "straight", "single") < 1e-5, "one process goes on from what two saved"


def test_a_gradient_in_shards_that_runs_out_of_memory_ends_the_run_with_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    module = PlainDescent(policy={"model_type": "qwen3"}, train_tokenizer={"vocab_size": 280})
    monkeypatch.setattr(PlainDescent, "in_shards", True)
    monkeypatch.setattr(module, "trainable_parameters", list)

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "_accumulate", fail)
    nothing: Any = None
    with pytest.raises(RuntimeError, match=r"a rank cannot go back without the others; lower model\.micro_batch_size"):
        module.accumulate(nothing, [[0, 1]], nothing)


def stub(tensor: int = 1, folder: bool = False, own_numerics: bool = False) -> Any:
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: tensor)}
    strategy = SimpleNamespace(device_mesh=mesh, _save_distributed_checkpoint=folder)
    trainer = SimpleNamespace(strategy=strategy, world_size=2, checkpoint_callbacks=[object()])
    return SimpleNamespace(trainer=trainer, engine=SimpleNamespace(own_numerics=own_numerics))


@pytest.mark.parametrize(
    ("settings", "watchers", "said"),
    [
        ({"tensor": 2}, [], "tensor_parallel_size to 1 and data_parallel_size to 2"),
        ({"folder": True}, [], "save_distributed_checkpoint to false"),
        ({"own_numerics": True}, [], "set model.rollout to null, or trainer.strategy to ddp"),
        ({}, ["Watcher"], "Watcher looks at the gradient after every microbatch"),
    ],
)
def test_what_shards_cannot_do_is_refused_in_one_sentence(settings: dict[str, Any], watchers: list[str], said: str) -> None:
    check_sharding(stub(), [])
    with pytest.raises(ValueError, match=said):
        check_sharding(stub(**settings), watchers)


def test_a_module_that_would_keep_its_weights_whole_says_so() -> None:
    module: Any = SFTModule(policy={"model_type": "qwen3"}, train_tokenizer={"vocab_size": 280})
    module._trainer = SimpleNamespace(strategy=object.__new__(ModelParallelStrategy))
    with pytest.raises(ValueError, match="SFTModule does not lay its weights in shards"):
        module.setup("fit")


def test_a_checkpoint_whose_weights_would_not_all_find_their_shards_is_refused() -> None:
    module: Any = GRPOModule(policy={"model_type": "qwen3"}, train_tokenizer={"vocab_size": 280})
    module.model = torch.nn.Linear(2, 2)
    module._sharded = [object()]
    checkpoint: dict[str, Any] = {}
    module._trained_names()
    with pytest.raises(ValueError, match="saved under another strategy, so it cannot be resumed under ModelParallelStrategy"):
        module.on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="of other parameters"):
        module.on_load_checkpoint({"theodolite_shards_of": ["model.bias"]})
    module.on_load_checkpoint({"theodolite_shards_of": ["model.weight", "model.bias"]})


def test_the_doctor_says_what_the_strategy_lacks() -> None:
    strategy = {"class_path": STRATEGY, "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1}}
    config: dict[str, Any] = {"trainer": {"devices": 2, "strategy": strategy}}
    assert [finding.remedy for finding in shards(config)] == ["set trainer.strategy's save_distributed_checkpoint to false"]
    strategy["init_args"] |= {"save_distributed_checkpoint": False}
    assert [finding.remedy for finding in shards(config)] == [""]
    config["model"] = {"init_args": {"rollout": {"class_path": "VLLMRollout"}}}
    assert shards(config)[0].remedy.endswith("cannot be given weights in shards")
    assert shards({"trainer": {"devices": 2, "strategy": "ddp"}}) == []


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2", "mistral_window", "gemma2_window"])
def test_layers_are_what_the_architecture_does_not_split(kind: str) -> None:
    model: Any = tiny_model(kind)
    assert len(decoder_layers(model)) == model.config.num_hidden_layers
