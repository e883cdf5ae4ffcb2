"""A GRPO step beside TRL's: same model, tokenizer, prompts, reward and adapter; sampling, grading, gradient and update included.

    make bench-grpo [JSON=FILE]                                     (sets up .venv-peers with TRL)
    .venv-peers/bin/python benchmarks/grpo_vs_trl.py --cases uniform --json result.json

A random Qwen3 (width 128, 4 layers, LoRA r = 32 on every linear layer, float32) answers 16 prompts of about 64 tokens 8 times with up to 64
tokens. Each implementation lives in a process of its own and waits for its turn: one step of TRL, one of ours, and so on, so that both see
the same machine. One thread each. A number is the median over ``--steps`` steps after ``--warmup``; TRL is tried with several microbatch
sizes, the fastest of which in CPU seconds is the peer of every number; ``peers`` holds all of them. ``ratio`` is TRL over ours.

Memory is given four times: the peak of the whole process; what it held when its first step began (libraries, model, adapter); the peak
above that; and, as a floor, what a process holds that only imports the libraries and loads model and adapter (case ``floor``: PyTorch,
transformers and PEFT with Lightning, or with TRL). About 12 minutes on an idle machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "uniform": {"vocab": 1000, "end_ids": 1, "trl_micro": [4, 16, 128]},
    "ragged": {"vocab": 1000, "end_ids": 24, "trl_micro": [4, 16, 128]},
    "vocabulary 32,000": {"vocab": 32000, "end_ids": 1, "trl_micro": [32]},
}
NUMBERS = {
    "cpu": "CPU s per step",
    "wall": "s per step",
    "peak_mib": "MiB, peak of the process",
    "idle_mib": "MiB, the process before its first step",
    "above_idle_mib": "MiB, peak above the process before its first step",
}
PROMPTS, GROUP, LENGTH, RANK = 16, 8, 64, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(folder: Path, vocab: int, end_ids: int) -> None:
    """Write model, tokenizer and prompts. ``end_ids`` of the vocabulary end a completion: 24 of 1000 give a mean of 32 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(800)]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<pad>", "<eos>", "<unk>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([" ".join(rng.choices(words, k=100)) for _ in range(400)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    prompts = []
    for _ in range(256):
        ids = tokenizer(" ".join(rng.choices(words, k=80)))["input_ids"]
        prompts.append(tokenizer.decode(ids[: rng.randint(48, 80)]))
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024, "tie_word_embeddings": True}
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model: Any = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab, **sizes, **ends))
    model.generation_config.eos_token_id = [int(ends["eos_token_id"] or 0), *range(400, 400 + end_ids - 1)]
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.json").write_text(json.dumps(prompts))


def reward_of(text: str) -> float:
    """Share of vowels: cheap, and different for almost every completion."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


def memory_mib(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (the most so far) of this process; getrusage's maximum would start at the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


class Turn:
    """Waits for the parent's word before a step and reports it afterwards."""

    def __init__(self) -> None:
        self.at: tuple[float, float] = (0.0, 0.0)
        self.idle: float | None = None

    def begin(self) -> None:
        """Wait for one's turn."""
        if self.idle is None:
            self.idle = memory_mib("VmRSS")
        sys.stdin.readline()
        self.at = time.perf_counter(), time.process_time()

    def end(self, tokens: float) -> None:
        """Report a step."""
        peak = memory_mib("VmHWM")
        row = {"wall": time.perf_counter() - self.at[0], "cpu": time.process_time() - self.at[1], "tokens": tokens}
        row |= {"peak_mib": peak, "idle_mib": self.idle or 0.0, "above_idle_mib": peak - (self.idle or 0.0)}
        print("STEP " + json.dumps(row), flush=True)


def run_trl(folder: Path, steps: int, micro: int) -> None:
    """TRL's trainer, step by step."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

    turn = Turn()
    accumulation = PROMPTS * GROUP // micro
    config = GRPOConfig(
        output_dir=str(folder / f"trl-{micro}"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,
        num_generations=GROUP,
        max_completion_length=LENGTH,
        max_steps=steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        beta=0.0,
        loss_type="dapo",
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )

    class Steps(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
            turn.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **keywords: Any) -> None:
            if "completions/mean_length" in (logs or {}):
                turn.end(logs["completions/mean_length"])

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [reward_of(text) for text in completions]

    data = Dataset.from_dict({"prompt": json.loads((folder / "prompts.json").read_text())})
    lora: Any = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=TARGETS)
    model = str(folder / "model")
    GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=data, peft_config=lora, callbacks=[Steps()]).train()


def run_ours(folder: Path, steps: int, micro: int) -> None:
    """Our trainer, step by step; ``micro`` is the token budget of a microbatch."""
    importlib.import_module("theodolite.cli")  # first, as in every run of the command line
    from lightning.pytorch import Callback, LightningDataModule, Trainer
    from torch.utils.data import DataLoader

    from theodolite.lightning_modules import GRPOModule
    from theodolite.protocols import Grade, Reward, Verdict

    turn = Turn()

    class Row:
        def __init__(self, number: int, prompt: str) -> None:
            self.id, self.prompt = str(number), prompt

    class Vowels:
        def start(self) -> None: ...

        def close(self) -> None: ...

        def grade(self, rows: Any, completions: Any) -> list[Grade]:
            return [Grade(Reward(reward_of(text), False, True), Verdict(False, "incorrect", "ok", False)) for text in completions]

    class Prompts(LightningDataModule):
        global_batch_size, environment = PROMPTS, Vowels()

        def train_dataloader(self) -> Any:
            rows = [Row(i, prompt) for i, prompt in enumerate(json.loads((folder / "prompts.json").read_text()))]
            return DataLoader(rows, batch_size=PROMPTS, collate_fn=list)  # pyright: ignore[reportArgumentType]

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return batch

    class Steps(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            turn.begin()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            turn.end(float(trainer.callback_metrics["train/completion_tokens"]))
            print({k: round(float(v), 3) for k, v in trainer.callback_metrics.items() if k.startswith("time/")}, file=sys.stderr)

    lora = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGETS}
    fast: dict[str, Any] = {"split_backward": True, "token_budget": micro, "merge_adapter": True, "export": False, "table_every": 0}
    module = GRPOModule(policy=str(folder / "model"), lora=lora, group_size=GROUP, max_new_tokens=LENGTH, lr=1e-3, seed=0, **fast)
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, callbacks=[Steps()], log_every_n_steps=1, **quiet)
    trainer.fit(module, datamodule=Prompts())


def run_floor(folder: Path, kind: str) -> None:
    """Import what one side is built on, load the model with its adapter, and say what that holds."""
    if kind == "ours":
        importlib.import_module("theodolite.light_torchmetrics").import_torchmetrics()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    importlib.import_module({"ours": "lightning.pytorch", "trl": "trl.trainer.grpo_trainer"}[kind])
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    get_peft_model(model, LoraConfig(r=RANK, task_type="CAUSAL_LM", target_modules=TARGETS))
    AutoTokenizer.from_pretrained(folder / "model")
    print(f"FLOOR {memory_mib('VmHWM')}", flush=True)


def surroundings() -> dict[str, str]:
    """Environment of every process that is measured."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Worker:
    """One implementation in a process of its own."""

    def __init__(self, folder: Path, kind: str, micro: int, steps: int) -> None:
        command = [sys.executable, __file__, "--worker", kind, "--micro", str(micro), "--steps", str(steps), "--folder", str(folder)]
        self.name, self.rows = f"{kind} {micro}", []
        log = open(folder / f"{kind}-{micro}.log", "w")  # noqa: SIM115  (lives as long as the child)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=surroundings())

    def step(self) -> None:
        """Let it make one step, and keep the report."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("STEP "):
                self.rows.append(json.loads(line[5:]))
                return
        raise RuntimeError(f"{self.name} ended after {len(self.rows)} steps; see its log.")

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def measure(case: str, steps: int, warmup: int, budget: int, keep: Path | None = None) -> list[dict[str, Any]]:
    """Alternate steps, and compare medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = keep or Path(name)
        settings = CASES[case]
        build(folder, settings["vocab"], settings["end_ids"])
        kinds = [("ours", budget), *(("trl", micro) for micro in settings["trl_micro"])]
        workers = [Worker(folder, kind, micro, steps + warmup) for kind, micro in kinds]
        try:
            for number in range(steps + warmup):
                for worker in workers:
                    worker.step()
                shown = ", ".join(f"{w.name}: {w.rows[-1]['cpu']:.2f} CPU s {w.rows[-1]['wall']:.2f} s" for w in workers)
                print(f"{case} step {number}: {shown}", flush=True)
        finally:
            for worker in workers:
                worker.close()
    return [compare(case, workers, warmup, what, unit) for what, unit in NUMBERS.items()]


def compare(case: str, workers: list[Worker], warmup: int, what: str, unit: str) -> dict[str, Any]:
    """Our median of a number beside that of TRL's fastest setting."""
    found = {worker.name: [row[what] for row in worker.rows[warmup:]] for worker in workers}
    ours, *peers = found
    medians = {name: statistics.median(values) for name, values in found.items()}
    fastest = min(workers[1:], key=lambda worker: statistics.median(row["cpu"] for row in worker.rows[warmup:])).name
    row = {"case": f"{case}: {what}", "ours": medians[ours], "peer": medians[fastest], "ratio": medians[fastest] / medians[ours]}
    row |= {"unit": unit, "n": len(found[ours]), "setting": fastest, "peers": {name: medians[name] for name in peers}}
    row["tokens"] = {worker.name: statistics.mean(row["tokens"] for row in worker.rows[warmup:]) for worker in workers}
    return row | {f"{side}_range": [min(found[name]), max(found[name])] for side, name in (("ours", ours), ("peer", fastest))}


def measure_floor(repeats: int) -> dict[str, Any]:
    """What a process holds that trains nothing, on either side's libraries."""
    found: dict[str, list[float]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as name:
        build(Path(name), CASES["uniform"]["vocab"], 1)
        for _ in range(repeats):
            for kind, values in found.items():
                command = [sys.executable, __file__, "--worker", f"floor-{kind}", "--folder", name]
                said = subprocess.run(command, env=surroundings(), capture_output=True, text=True, check=True).stdout
                values.append(float(next(line for line in said.splitlines() if line.startswith("FLOOR ")).split()[1]))
    ours, peer = (statistics.median(values) for values in found.values())
    row = {"case": "floor: peak_mib", "ours": ours, "peer": peer, "ratio": peer / ours, "unit": NUMBERS["peak_mib"], "n": repeats}
    return row | {f"{side}_range": [min(found[kind]), max(found[kind])] for side, kind in (("ours", "ours"), ("peer", "trl"))}


def main() -> None:
    """Measure the cases and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["floor", *CASES], choices=["floor", *CASES])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--micro", type=int, default=256, help="our token budget per microbatch")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=["ours", "trl", "floor-ours", "floor-trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker in ("floor-ours", "floor-trl"):
        run_floor(arguments.folder, arguments.worker.removeprefix("floor-"))
        return
    if arguments.worker:
        run = run_ours if arguments.worker == "ours" else run_trl
        run(arguments.folder, arguments.steps, arguments.micro)
        return
    results = [measure_floor(3)] if "floor" in arguments.cases else []
    for case in arguments.cases:
        if case != "floor":
            results += measure(case, arguments.steps, arguments.warmup, arguments.micro, arguments.folder)
    print(json.dumps(results, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
