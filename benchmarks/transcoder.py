"""What a training step of a sparse coder costs, beside sparsify, SAELens, dictionary_learning and the naive nested scheme.

    make bench-transcoder [JSON=FILE]
    python benchmarks/transcoder.py --steps 21 --json result.json

Width 256, 4096 latents, 32 active, batches of 1024 tokens, fp32, one thread, activations in memory. Ours is a real ``fit`` of
``TranscoderModule``: from ``on_train_batch_start`` to ``on_train_batch_end``, optimizer, logging and dead-latent counters included. After
each of our steps every peer takes one of its own, on the same batch, so all see the same machine; each peer runs the step of its own
trainer class (sparsify's trainer needs a GPU: its module, its loss, Adam and its counters). A case is the median CPU time over
``--steps`` steps after a warm-up; ``ratio`` is the peer's over ours.

The nested cases have five prefixes (1/16, 1/8, 1/4, 1/2, 1). ``naive`` trains the same nested loss in plain PyTorch, with a flat
selection and every prefix decoded from its first latent. Last, without a peer: tokens per second end to end, with a Gemma-2 of width 256
and 4 layers (random weights, bytes of text made on the spot) that makes the activations of its third layer while the coder learns.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import os
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from theodolite.datamodules.activations.datamodule import ActivationDataModule
from theodolite.datamodules.text.documents import SyntheticEnglish
from theodolite.datamodules.text.packing import Packing
from theodolite.lightning_modules.transcoder import TranscoderModule

WIDTH, LATENTS, ACTIVE, BATCH = 256, 4096, 32, 1024
FRACTIONS = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
PREFIXES = [round(fraction * LATENTS) for fraction in FRACTIONS]
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
AIMS = {
    "sparsify transcoder, Adam": 1.4,
    "SAELens TopK": 2.5,
    "dictionary_learning Matryoshka": 2.5,
    "naive nested": 2.5,
}

Step = Callable[[Tensor, Tensor], object]


def batches(count: int) -> list[dict[str, Tensor]]:
    """Inputs made of sparse features, and a fixed two-layer map of them as target."""
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(1024, WIDTH, generator=generator), dim=1)
    first, second = (torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for _ in range(2))
    made = []
    for _ in range(count):
        active = torch.randint(0, 1024, (BATCH, 16), generator=generator)
        amounts = 0.5 + torch.rand(BATCH, 16, generator=generator)
        inputs = (amounts[..., None] * features[active]).sum(dim=1) + 0.05 * torch.randn(BATCH, WIDTH, generator=generator)
        made.append({"input": inputs, "target": F.gelu(inputs @ first) @ second})
    return made


def ours(nested: bool, activation: str) -> TranscoderModule:
    """The module of one case, with free decoder rows as sparsify's transcoders have, or unit rows as dictionary_learning's."""
    settings: dict[str, Any] = {"latents": LATENTS, "k": ACTIVE, "d_in": WIDTH, "d_out": WIDTH, "lr": 3e-4, "warmup_steps": 0, "seed": 0}
    settings |= {"activation": activation, "prefixes": FRACTIONS if nested else None, "decoder_norm": "unit" if nested else "free"}
    return TranscoderModule(**settings, max_grad_norm=0.0, export=False)


def sparsify_step(transcode: bool) -> Step:
    """Sparsify's sparse coder with its FVU loss, Adam and its count of tokens since a latent fired."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # where Triton is installed it would be used, also for tensors on a CPU
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify import SaeConfig  # type: ignore[import-not-found]
        from sparsify.sparse_coder import SparseCoder  # type: ignore[import-not-found]
    coder = SparseCoder(WIDTH, SaeConfig(num_latents=LATENTS, k=ACTIVE, transcode=transcode), dtype=torch.float32)
    optimizer, since = torch.optim.Adam(coder.parameters(), lr=3e-4), torch.zeros(LATENTS, dtype=torch.long)

    def step(inputs: Tensor, target: Tensor) -> None:
        if not transcode:
            coder.set_decoder_norm_to_unit_norm()
        out = coder(x=inputs, y=target if transcode else inputs, dead_mask=None)
        out.fvu.backward()
        if not transcode:
            coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        fired = torch.zeros(LATENTS, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        since.add_(len(inputs)).masked_fill_(fired, 0)

    return step


def saelens_step(nested: bool) -> Step:
    """SAELens' own training step; it trains autoencoders only."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig  # type: ignore[import-not-found]
    from sae_lens.saes import matryoshka_batchtopk_sae, topk_sae  # type: ignore[import-not-found]
    from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]

    common: dict[str, Any] = {"d_in": WIDTH, "d_sae": LATENTS, "k": ACTIVE, "dtype": "float32", "device": "cpu"}
    if nested:
        config = matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig(matryoshka_widths=PREFIXES, **common)
        coder = matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE(config)
    else:
        coder = topk_sae.TopKTrainingSAE(topk_sae.TopKTrainingSAEConfig(**common))
    wanted: dict[str, Any] = {
        "total_training_samples": 10**9, "train_batch_size_samples": BATCH, "device": "cpu", "lr": 3e-4, "lr_end": 3e-5,
        "lr_scheduler_name": "constant", "lr_warm_up_steps": 0, "lr_decay_steps": 0, "adam_beta1": 0.9, "adam_beta2": 0.999,
        "n_restart_cycles": 1, "dead_feature_window": 10**6, "feature_sampling_window": 10**6, "n_checkpoints": 0,
        "checkpoint_path": None, "save_final_checkpoint": False, "autocast": False, "n_batches_for_norm_estimate": 1,
        "logger": LoggingConfig(log_to_wandb=False),
    }  # fmt: skip
    known = {field.name for field in dataclasses.fields(SAETrainerConfig)}
    settings = SAETrainerConfig(**{name: value for name, value in wanted.items() if name in known})
    trainer = SAETrainer(cfg=settings, sae=coder, data_provider=iter(()))

    def step(inputs: Tensor, target: Tensor) -> None:
        trainer.step(inputs)
        trainer.n_training_steps += 1

    return step


def dictionary_learning_step(nested: bool) -> Step:
    """dictionary_learning's own update; autoencoders only."""
    if "nnsight" not in sys.modules:
        # only its activation buffer uses nnsight, whose import starts a server on some versions
        stub = types.ModuleType("nnsight")
        stub.LanguageModel = object  # type: ignore[attr-defined]
        sys.modules["nnsight"] = stub
    common: dict[str, Any] = {
        "steps": 10**6, "activation_dim": WIDTH, "dict_size": LATENTS, "k": ACTIVE, "layer": 0, "lm_name": "none", "lr": 3e-4,
        "warmup_steps": 1, "device": "cpu", "seed": 0,
    }  # fmt: skip
    if nested:
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # type: ignore[import-not-found]

        trainer: Any = MatryoshkaBatchTopKTrainer(group_fractions=[1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2], **common)
    else:
        from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore[import-not-found]

        trainer = TopKTrainer(**common)
    counter = iter(range(10**9))
    return lambda inputs, target: trainer.update(next(counter), inputs)


def naive_step() -> Step:
    """Nested BatchTopK in plain PyTorch: flat selection, dense codes, every prefix decoded from its first latent."""
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(LATENTS, WIDTH, generator=generator), dim=1)
    encoder, decoder = torch.nn.Parameter(rows.t().contiguous()), torch.nn.Parameter(rows.clone())
    biases = [torch.nn.Parameter(torch.zeros(size)) for size in (LATENTS, WIDTH)]
    optimizer = torch.optim.Adam([encoder, decoder, *biases], lr=3e-4)

    def step(inputs: Tensor, target: Tensor) -> None:
        scores = torch.relu(inputs @ encoder + biases[0])
        best = scores.flatten().topk(ACTIVE * len(inputs), sorted=False)
        codes = torch.zeros_like(scores).flatten().scatter(0, best.indices, best.values).view_as(scores)
        losses = [(codes[:, :end] @ decoder[:end] + biases[1] - target).square().sum() for end in PREFIXES]
        (torch.stack(losses).mean() / (target - target.mean(dim=0)).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            decoder.div_(decoder.norm(dim=1, keepdim=True))

    return step


class Alternate(Callback):
    """Times our step, then lets every peer take one on the same batch and times it."""

    def __init__(self, peers: Mapping[str, Step]) -> None:
        self.peers = peers
        self.seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ("ours", *peers)}
        self.start = (0.0, 0.0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start our clock."""
        self.start = (time.process_time(), time.perf_counter())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it, and run the peers."""
        self._stop("ours")
        for name, step in self.peers.items():
            self.start = (time.process_time(), time.perf_counter())
            step(batch["input"], batch["target"])
            self._stop(name)

    def _stop(self, name: str) -> None:
        self.seconds[name].append((time.process_time() - self.start[0], time.perf_counter() - self.start[1]))


def measure(case: str, module: TranscoderModule, peers: Mapping[str, Step], steps: int) -> list[dict[str, Any]]:
    """Alternate ours and the peers; the first three steps warm up."""
    clock, data = Alternate(peers), batches(8)
    loader = DataLoader([data[i % len(data)] for i in range(steps + 3)], batch_size=None)  # pyright: ignore[reportArgumentType]
    Trainer(max_steps=steps + 3, accelerator="cpu", devices=1, callbacks=[clock], **QUIET).fit(module, loader)
    medians = {name: [statistics.median(column) for column in zip(*values[3:], strict=True)] for name, values in clock.seconds.items()}
    rows = []
    for name in peers:
        own, other = medians["ours"], medians[name]
        row = {"case": f"{case} / {name}", "ours": own[0], "peer": other[0], "ratio": other[0] / own[0], "unit": "CPU s per step"}
        rows.append(row | {"n": steps, "ours_wall": own[1], "peer_wall": other[1], "aim": AIMS.get(name)})
        print(
            f"{row['case']:62s} ours {1e3 * own[0]:7.1f} ms, peer {1e3 * other[0]:7.1f} ms: {row['ratio']:.2f}x "
            f"(wall {other[1] / own[1]:.2f}x{f', aim {AIMS[name]}' if name in AIMS else ''}, n={steps})",
            flush=True,
        )
    return rows


def end_to_end(steps: int) -> dict[str, Any]:
    """Tokens per second of producer and coder together, by CPU time and by the wall; the producer stops after the site's layer."""
    producer: dict[str, Any] = {
        "model_type": "gemma2",
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "head_dim": 64,
    }
    producer |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": 512}
    sites: dict[str, Any] = {"input_site": "mlp_in.2", "target_site": "mlp_out.2", "tokenizer": "bytes"}
    packing = Packing(length=128)
    data = ActivationDataModule(
        producer, SyntheticEnglish(), **sites, global_batch_size=BATCH, buffer_rows=64, packing=packing, repeat=True, prefetch=False, seed=0
    )
    settings: dict[str, Any] = {"latents": LATENTS, "k": ACTIVE, "prefixes": FRACTIONS, "lr": 3e-4, "warmup_steps": 0, "seed": 0}
    clock = Marks()
    Trainer(max_steps=steps + 8, accelerator="cpu", devices=1, callbacks=[clock], limit_val_batches=0, **QUIET).fit(
        TranscoderModule(**settings, export=False, calibrate=False), data
    )
    # whole rounds of the producer: activations come in rounds, not with every step
    spent = [last - first for first, last in zip(clock.marks[8], clock.marks[-1], strict=True)]
    tokens = BATCH * (len(clock.marks) - 9)
    row = {"case": "five prefixes, end to end with a producer", "ours": tokens / spent[0], "peer": None, "ratio": None}
    print(f"{row['case']:62s} {row['ours']:.0f} tokens per CPU second ({tokens / spent[1]:.0f} by the wall), n={steps} steps", flush=True)
    return row | {"unit": "tokens per CPU s", "n": steps, "ours_wall": tokens / spent[1]}


class Marks(Callback):
    """CPU and wall clock after every batch."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read both clocks."""
        self.marks.append((time.process_time(), time.perf_counter()))


def main() -> None:
    """Measure every case and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--steps", type=int, default=21, help="steps of each per case, at least 5")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    if options.steps < 5:
        parser.error("--steps must be at least 5.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    flat = {
        "sparsify transcoder, Adam": sparsify_step(transcode=True),
        "sparsify autoencoder, Adam": sparsify_step(transcode=False),
        "SAELens TopK": saelens_step(nested=False),
        "dictionary_learning TopK": dictionary_learning_step(nested=False),
    }
    results = measure("TopK", ours(nested=False, activation="topk"), flat, options.steps)
    nested = {
        "dictionary_learning Matryoshka": dictionary_learning_step(nested=True),
        "naive nested": naive_step(),
        "SAELens Matryoshka": saelens_step(nested=True),
    }
    results += measure("five prefixes, BatchTopK", ours(nested=True, activation="batchtopk"), nested, options.steps)
    results.append(end_to_end(max(64, options.steps)))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
