"""What a best-of-K sweep costs, and how noisy it is: one pass over N candidates against a sweep of fresh samples per K.

    make bench-best-of-k [JSON=FILE]
    python benchmarks/best_of_k.py --repeats 5 --json result.json

The verbaliser is a random Qwen3 of the size of ``--width`` and ``--layers``; what it writes does not matter for the cost. Cases:

* ``generated texts, K = 1..64``: texts that both ways decode for K = 1, 2, 4, ..., 64 (an exact count). Aim 1.8: at most 0.55 of the work.
* ``time of a sweep, K = 1..64``: CPU seconds of the same.
* ``Monte-Carlo variance at K = 1``: variance of the estimate over repeated draws, first column against order statistics. Aim 30.
* ``second run``: CPU seconds of a whole sweep, fresh against cached. Aim 20.
* ``64 texts per activation``: CPU seconds of ``transformers``' ``generate`` with ``num_return_sequences`` (which computes the prompt for
  every text) against a prompt computed once, at equal numbers of tokens. Aim 1.5.

One thread, CPU; 24 activations by default, about a minute of CPU time. Both sides of a case run in turn in one process; ``ratio`` is
peer over ours of the medians.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from theodolite.best_of_k.candidates import Drawing
from theodolite.best_of_k.curves import Curves, Resampling
from theodolite.best_of_k.sweep import SweepPlan, run_stages
from theodolite.functional.best_of_k import expected_best_of_k
from theodolite.lightning_modules.decoding import Sampling, decode, uniform_streams
from theodolite.lightning_modules.talkative.injection import Projection, Standardise
from theodolite.lightning_modules.talkative.verbaliser import ActivationVerbaliser
from theodolite.protocols import ActivationRows
from theodolite.seeds import derive_seed

KS = (1, 2, 4, 8, 16, 32, 64)
PROMPT, MARKER, NEW_TOKENS, VOCABULARY = 48, 40, 12, 512


class Module:
    """A verbaliser and a linear bag-of-tokens reconstructor."""

    def __init__(self, width: int, layers: int) -> None:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
        }
        config = Qwen3Config(vocab_size=VOCABULARY, head_dim=width // 4, num_key_value_heads=4, tie_word_embeddings=True, **sizes)
        self.lm: Any = Qwen3ForCausalLM(config).eval()
        prompt = torch.randint(1, VOCABULARY, (PROMPT,)).tolist()
        self.writer = ActivationVerbaliser(self.lm, Standardise(width), Projection(width, width, 1, False), prompt, MARKER, [], 0)
        self.table = torch.randn(VOCABULARY, width)
        self.written = 0
        self.reconstructors: Mapping[str, Any] = {"linear": self}

    def describe(
        self, activations: Tensor, ids: Sequence[str], candidates: range, temperature: float, max_new_tokens: int, seed: int
    ) -> list[list[str]]:
        """Token ids as text."""
        self.written += len(ids) * len(candidates)
        greedy = temperature == 0
        sampling = Sampling(max_new_tokens, 1.0 if greedy else temperature, top_k=1 if greedy else 0)
        seeds = [[derive_seed("describe", seed, name, candidate) for candidate in candidates] for name in ids]
        written = self.writer.write(activations, seeds, sampling).ids
        texts = [" ".join(map(str, row)) for row in written.tolist()]
        return [texts[i : i + len(candidates)] for i in range(0, len(texts), len(candidates))]

    def reconstruct(self, texts: Sequence[str]) -> Tensor:
        """Mean vector of the tokens."""
        return torch.stack([self.table[[int(token) for token in text.split()]].mean(0) for text in texts])

    def fingerprint(self) -> str:
        """One model."""
        return "benchmark"


class Table:
    """Random activations, four of each document."""

    def __init__(self, rows: int, width: int) -> None:
        self.activations = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
        self.key: Mapping[str, Any] = {"benchmark": rows}

    def __len__(self) -> int:
        return len(self.activations)

    def rows(self, indices: Sequence[int]) -> ActivationRows:
        """See ``ActivationTable``."""
        documents = tuple(str(index // 4) for index in indices)
        ids = tuple(f"{index // 4}:{index}" for index in indices)
        return ActivationRows(ids, documents, self.activations[list(indices)], ("",) * len(ids))


def cpu_seconds(run: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def in_turn(ours: Callable[[], Any], peer: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median CPU seconds of both, after one warm-up each."""
    for warm_up in (ours, peer):
        warm_up()
    pairs = [(cpu_seconds(ours), cpu_seconds(peer)) for _ in range(repeats)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def sweep_once(module: Module, table: Table, root: Path, ks: Sequence[int], seed: int) -> Curves:
    """A whole sweep with curves and intervals."""
    done = run_stages(root, table, module, SweepPlan(tuple(ks), max(ks), Drawing(1.0, NEW_TOKENS, seed), None, 1024))
    return Curves(done.scores, list(ks), Resampling(1000))


def work(module: Module, table: Table, repeats: int) -> list[dict[str, Any]]:
    """One pass against one sweep per K, and a second run against the first."""
    times: dict[str, list[float]] = {"one": [], "each": [], "cached": []}
    texts = {"one": 0, "each": 0}
    for repeat in range(repeats + 1):  # the first is the warm-up
        with tempfile.TemporaryDirectory() as folder:
            before = module.written
            one = cpu_seconds(lambda repeat=repeat, folder=folder: sweep_once(module, table, Path(folder) / "one", KS, repeat))
            middle = module.written
            cached = cpu_seconds(lambda repeat=repeat, folder=folder: sweep_once(module, table, Path(folder) / "one", KS, repeat))
            assert module.written == middle, "the second run must draw nothing"
            each = 0.0
            for k in KS:
                each += cpu_seconds(
                    lambda k=k, repeat=repeat, folder=folder: sweep_once(module, table, Path(folder) / str(k), [k], derive_seed(repeat, k))
                )
            texts = {"one": middle - before, "each": module.written - middle}
        if repeat:
            for name, seconds in (("one", one), ("each", each), ("cached", cached)):
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    n = f"{len(table)} activations, N={max(KS)}, {repeats} repeats"
    return [
        case("generated texts, K = 1..64", texts["one"], texts["each"], "texts", n),
        case("time of a sweep, K = 1..64", medians["one"], medians["each"], "CPU s", n),
        case("second run", medians["cached"], medians["one"], "CPU s", n),
    ]


def variance(rows: int, repeats: int) -> dict[str, Any]:
    """Variance over repeated draws of log-normal errors of fixed activations, at K = 1."""
    draw = torch.Generator().manual_seed(0)
    scale = torch.randn(rows, 1, generator=draw, dtype=torch.float64).exp()
    ours: list[float] = []
    peer: list[float] = []
    for _ in range(repeats):
        errors = scale * torch.randn(rows, max(KS), generator=draw, dtype=torch.float64).exp()
        ours.append(float(expected_best_of_k(errors, [1]).mean()))
        peer.append(float(errors[:, 0].mean()))
    return case(
        "Monte-Carlo variance at K = 1", statistics.variance(ours), statistics.variance(peer), "variance", f"{repeats} draws of {rows} x 64"
    )


def shared_prefix(module: Module, table: Table, repeats: int, rows: int = 4, texts: int = 64) -> dict[str, Any]:
    """``texts`` samples of each of ``rows`` prompts that hold an activation, at equal numbers of new tokens."""
    activations = table.activations[:rows]
    seeds = [[derive_seed(row, text) for text in range(texts)] for row in range(rows)]
    embedded = module.lm.get_input_embeddings()(torch.tensor(module.writer.prompt_ids)).detach().expand(rows, -1, -1).clone()
    embedded[:, MARKER] = activations

    def ours() -> None:
        with torch.no_grad():
            index = torch.arange(rows).repeat_interleave(texts)
            uniforms = uniform_streams([seed for group in seeds for seed in group], NEW_TOKENS)
            decode(module.lm, module.writer.prefix(activations, index), uniforms, Sampling(NEW_TOKENS), [], 0)

    def peer() -> None:
        with torch.no_grad():
            module.lm.generate(
                inputs_embeds=embedded, attention_mask=torch.ones(rows, PROMPT, dtype=torch.long), do_sample=True, top_k=0, top_p=1.0,
                num_return_sequences=texts, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0,
            )  # fmt: skip

    seconds = in_turn(ours, peer, repeats)
    return case("64 texts per activation", *seconds, "CPU s", f"{rows} prompts of {PROMPT} tokens, {NEW_TOKENS} new, {repeats} repeats")


def case(name: str, ours: float, peer: float, unit: str, n: str) -> dict[str, Any]:
    """One line of the result; ``ratio`` above 1 means that we are better."""
    return {"case": name, "ours": ours, "peer": peer, "ratio": round(peer / ours, 2), "unit": unit, "n": n}


def main() -> None:
    """Run all cases and print or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats after a warm-up (default 5)")
    parser.add_argument("--rows", type=int, default=24, help="activations of the sweeps (default 24)")
    parser.add_argument("--width", type=int, default=128, help="of the verbaliser (default 128)")
    parser.add_argument("--layers", type=int, default=4, help="of the verbaliser (default 4)")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    sys.stderr = open(Path("/dev/null"), "w")  # noqa: SIM115  (progress lines cost nothing but would drown the result)
    module, table = Module(given.width, given.layers), Table(given.rows, given.width)
    results: list[dict[str, Any]] = []
    for measure in (
        lambda: [variance(500, 200)],
        lambda: [shared_prefix(module, table, given.repeats)],
        lambda: work(module, table, given.repeats),
    ):
        for row in measure():
            results.append(row)
            numbers = f"ours {row['ours']:<12.6g} peer {row['peer']:<12.6g} {row['unit']:<9} ratio {row['ratio']:<8} n={row['n']}"
            print(f"{row['case']:<32} {numbers}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
