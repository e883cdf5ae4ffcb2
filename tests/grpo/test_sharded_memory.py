"""What a rank of two is said to need with weights in shards, beside the most that it has resident in each phase of a real window."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_fsdp2 import SHARDS, STRATEGY
from test_two_ranks import command, log_of, two_ranks
from tiny_policies import POLICIES, callback, config, grpo, prompts

from theodolite.policy_memory import PHASES, RolloutSize, at_most, meta_model, needs, policy_memory
from theodolite.sharded_memory import decoder_layers

SIZES: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
POLICY: dict[str, Any] = POLICIES["qwen3"] | SIZES | {"num_hidden_layers": 6, "initializer_range": 0.02}
GROUP, MICRO, VOCABULARY = 16, 8, 280
"""Of several microbatches: the second begins with the gradient of the first in place."""
HELD = ("weights", "gradients", "optimizer")


def resident(key: str) -> int:
    """Bytes, from what the kernel says of this process: ``VmRSS`` now, ``VmHWM`` at most since the last reset."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024


class Peaks(Callback):
    """Writes the most that was resident in the phases of the second window, above what is not this model's.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder, self.peaks, self.longest = Path(folder), dict[str, int](), [0, 0]

    def note(self, when: str) -> None:
        self.peaks[when] = resident("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")

    def on_rollouts(self, trainer: Any, pl_module: Any, window: Any) -> None:
        self.note("sampling")
        tokens = [rollout.tokens for rollout in window.rollouts]
        self.longest = [max(len(t.prompt_ids) for t in tokens), max(len(t.completion_ids) for t in tokens)]

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.note("gradient")

    def on_after_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gc.collect()
        self.note("update")
        tensors = [*pl_module.parameters(), *(p.grad for p in pl_module.parameters())]
        tensors += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors if t is not None]
        held = sum({s.data_ptr(): s.nbytes() for s in storages}.values())  # a layer's gradients are views of one buffer
        above = resident("VmRSS") - held  # libraries, buffers of collectives
        found = {"held": held, "longest": self.longest} | {when: peak - above for when, peak in self.peaks.items()}
        (self.folder / f"peaks-{trainer.global_rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("split", [False, True], ids=["layer by layer", "whole"])
def test_what_a_rank_of_two_is_said_to_need_is_what_it_has_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: bool) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "65536")  # what is freed goes back to the kernel at once
    monkeypatch.chdir(tmp_path)
    model = grpo(policy=POLICY, lr=1e-4, export=False, table_every=0, group_size=GROUP, max_new_tokens=24, micro_batch_size=MICRO)
    limits = {"max_steps": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    watching = [callback("test_sharded_memory.Peaks", folder=str(tmp_path))]
    line = command(tmp_path, config(tmp_path, "run", model | {"split_backward": split}, prompts(), callbacks=watching, **limits))
    assert two_ranks(tmp_path, [line], limit_s=800.0, strategy=SHARDS) == [0, 0], log_of(tmp_path, 0)[-2000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"peaks-{rank}.json").read_text())
        size = RolloutSize(2 * GROUP, MICRO, *found["longest"])
        parts = policy_memory(meta_model(POLICY | {"vocab_size": VOCABULARY}, torch.float32, None), size, shards=2, split=split)
        held = sum(parts.get(name, 0) for name in (*HELD, "shards of gradients"))
        ratios = {"held": held / found["held"]}
        for name, phases in (("sampling", PHASES[:1]), ("gradient", PHASES[1:])):
            alone = {key: value for key, value in parts.items() if key in HELD or any(key in phase for phase in phases)}
            ratios[name] = at_most(alone) / found[name]
        print(rank, {name: round(ratio, 3) for name, ratio in ratios.items()})
        assert ratios["held"] == pytest.approx(1.0, abs=0.01)
        assert all(0.9 < ratio < 1.15 for ratio in ratios.values())


def test_shards_divide_what_is_held_and_nothing_that_is_computed() -> None:
    shape = POLICIES["qwen3"] | {"vocab_size": 61}
    size = RolloutSize(rollouts=6, micro=2, prompt=10, completion=5)
    model = meta_model(shape, torch.float32, None)
    whole, layerwise, gathered = (policy_memory(model, size, shards=n, split=split) for n, split in ((1, False), (2, False), (2, True)))
    ours = [p for layer in decoder_layers(model)[:1] for p in layer.parameters()]
    layer, everything = (4 * sum(p.numel() for p in group) for group in (ours, model.parameters()))
    rest = everything - 2 * layer
    uneven = 2 * 4 * 32 // 2  # 61 rows, of embeddings and of the head, are 31 and 30
    assert layerwise["weights"] == layerwise["gradients"] == everything // 2 + uneven
    assert layerwise["optimizer"] == 2 * layerwise["weights"]
    assert layerwise["weights gathered to sample"] == whole["weights"] == everything
    assert layerwise["weights gathered for the gradient"] == layerwise["whole gradients"] == rest + 2 * layer
    assert gathered["whole gradients"] == gathered["their sum over ranks"] == whole["gradients"]
    for name in ("cache of a rollout batch", "activations of a microbatch", "logits of a microbatch"):
        assert whole[name] == layerwise[name] == gathered[name]
    adapter = meta_model(shape, torch.bfloat16, {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj"]})
    parts = policy_memory(adapter, size, reference=False, merged=True, shards=2, split=True)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    assert parts["optimizer"] == 8 * sum(-(-len(p) // 2) * p.shape[1] for p in trained), "three rows are two and one"
    assert parts["weights gathered to sample"] == 2 * sum(p.numel() * p.element_size() for p in adapter.parameters())


def test_the_estimate_of_a_config_knows_the_strategy() -> None:
    strategy: dict[str, Any] = {"class_path": STRATEGY, "init_args": {"data_parallel_size": 4}}
    policy = POLICIES["qwen3"] | {"vocab_size": 64}
    tree: dict[str, Any] = {"model": {"init_args": {"policy": policy}}, "data": {"init_args": {"prompts_per_step": 4}}}
    (_, whole), (_, parts) = needs(tree, 4), needs(tree | {"trainer": {"strategy": strategy}}, 4)
    assert parts["optimizer"] == whole["optimizer"] / 4
    assert "weights gathered to sample" in parts
