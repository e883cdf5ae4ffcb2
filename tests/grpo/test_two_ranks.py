"""Two ranks: work dealt out evenly with the gradient it had, degenerate windows, and an environment that fails or hangs on one of them."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_policies import Row, TextGrader, TinyPrompts, callback, config, grpo

from theodolite.cli import main
from theodolite.lightning_modules.grpo.balance import Share, _put_together, _take, deal
from theodolite.lightning_modules.grpo.window import part_of
from theodolite.protocols import Grade, Reward, Rollout, TokenSequence, Verdict, Window

HERE = Path(__file__).resolve().parent

# -- dealing out ---------------------------------------------------------------------------------------------------------------------------


def heaviest(work: Sequence[int], owners: Sequence[int], ranks: int) -> int:
    return max(sum(w for w, owner in zip(work, owners, strict=True) if owner == rank) for rank in range(ranks))


def test_dealing_out_never_makes_the_heaviest_rank_heavier_and_moves_nothing_in_vain() -> None:
    rng = random.Random(0)
    gains = []
    for _ in range(300):
        ranks, groups = rng.choice([2, 3, 8]), rng.randint(1, 4)
        owners = [k % ranks for k in range(ranks * groups)]
        work = [rng.randint(1, 400) if rng.random() < 0.5 else 0 for _ in owners]
        dealt = deal(work, owners, ranks)
        before, after = heaviest(work, owners, ranks), heaviest(work, dealt, ranks)
        assert after <= before
        assert after < before or dealt == owners
        assert all(to == owner for to, owner, w in zip(dealt, owners, work, strict=True) if not w)
        assert after <= sum(work) / ranks + max(work), "what dealing the longest out first guarantees"
        gains.append(before / after if after else 1.0)
    assert sum(gains) / len(gains) > 1.2, "half of the groups without signal leave ranks idle that could help"
    assert deal([5, 5, 0, 0], [0, 0, 1, 1], 2) == [0, 1, 1, 1]
    assert deal([3, 3], [0, 1], 2) == [0, 1]


def share_of(slot: int, completion: int, **columns: Any) -> Share:
    """One group of two rollouts on one rank, with the columns that this rank's callbacks have set."""
    tokens = [TokenSequence((1, 2), (3,) * (completion - i)) for i in range(2)]
    rollouts = [Rollout(t, "", (-1.0,) * len(t.completion_ids), "stop", f"p{slot}", slot, i, 0) for i, t in enumerate(tokens)]
    rewards = [Reward(float(i), bool(i), True) for i in range(2)]
    numbers = torch.tensor([0.0, 1.0], dtype=torch.float64)
    fields: dict[str, Any] = {"advantages": numbers - 0.5} | columns
    window = Window(0, [f"row{slot}"], rollouts, rewards, 2, numbers, **fields)
    return Share(window, [Verdict(False, "incorrect", "ok", False)] * 2, torch.ones(2, dtype=torch.float64), None)


def test_groups_of_ranks_whose_callbacks_set_different_columns_keep_what_each_means() -> None:
    bare = share_of(0, completion=5)
    dressed = share_of(
        1,
        completion=3,
        advantages=torch.full((2, 3), 0.25, dtype=torch.float64),
        weights=torch.tensor([[0.5, 0.5, 0.5], [2.0, 2.0, 2.0]], dtype=torch.float64),
        parts=["a", "b"],
        features={"flagged": torch.tensor([1.0, 0.0])},
    )
    for shares in ((bare, dressed), (dressed, bare)):
        groups = sorted((_take(share, 0, share.window.rollouts[0].slot) for share in shares), key=lambda group: group.slot)
        window = _put_together(shares[0], groups, "cpu").window
        assert [part_of(window, i) for i in range(4)] == ["policy", "policy", "a", "b"]
        lengths = [len(rollout.tokens.completion_ids) for rollout in window.rollouts]
        assert lengths == [5, 4, 3, 2]
        weights, advantages = ([row[:n].tolist() for row, n in zip(c, lengths, strict=True)] for c in (window.weights, window.advantages))
        assert weights == [[1.0] * 5, [1.0] * 4, [0.5] * 3, [2.0] * 2]
        assert advantages == [[-0.5] * 5, [0.5] * 4, [0.25] * 3, [0.25] * 2]
        assert window.features["flagged"].isnan().tolist() == [True, True, False, False]
        assert window.features["flagged"][2:].tolist() == [1.0, 0.0]
    alone = _put_together(bare, [_take(bare, 0, 0)], "cpu").window
    assert (alone.weights.tolist(), alone.advantages.tolist(), alone.features) == ([1.0, 1.0], [-0.5, 0.5], {})


# -- in a run ------------------------------------------------------------------------------------------------------------------------------


class OneSided(TextGrader):
    """Only even problem numbers teach: with this data's order some ranks have more of them than others."""

    def one(self, row: Row, text: str) -> Grade:
        grade = super().one(row, text)
        if int(row.id.removeprefix("train").removeprefix("held-out")) % 2:
            self.rewards, kept = "constant", self.rewards
            grade = super().one(row, text)
            self.rewards = kept
        return grade


class OneSurvivor(TextGrader):
    """Of every four completions one can be scored."""

    def grade(self, rows: Sequence[Row], completions: Sequence[str]) -> list[Grade]:
        spoilt = TextGrader("all_nan")
        return [self.one(r, c) if i % 4 == 0 else spoilt.one(r, c) for i, (r, c) in enumerate(zip(rows, completions, strict=True))]


class Failing(TextGrader):
    """Raises, or hangs, on rank 1."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def grade(self, rows: Sequence[Row], completions: Sequence[str]) -> list[Grade]:
        if os.environ.get("LOCAL_RANK") == "1":
            if self.how == "raises":
                raise KeyError("tests")
            time.sleep(120)
        return super().grade(rows, completions)


GRADERS: dict[str, Any] = {
    "one_sided": OneSided,
    "one_survivor": OneSurvivor,
    "raises": lambda: Failing("raises"),
    "hangs": lambda: Failing("hangs"),
}


class OddPrompts(TinyPrompts):
    """Prompts with an environment of this file.

    Args:
        grader: A key of ``GRADERS``, or what :class:`TextGrader` takes.
    """

    def __init__(self, grader: str) -> None:
        super().__init__(prompts_per_step=8, rewards=grader)
        if grader in GRADERS:
            self.environment = GRADERS[grader]()


def written(folder: Path, name: str, grader: str, **model: Any) -> str:
    witness = callback("tiny_policies.Witness", folder=str(folder / f"witness-{name}"))
    own = grpo(**({"lr": 0.1, "export": False, "max_grad_norm": 0.0, "table_every": 0} | model)) | {"class_path": "grpo_fits.PlainDescent"}
    data = {"class_path": "test_two_ranks.OddPrompts", "grader": grader}
    limits = {"max_steps": 4, "limit_val_batches": 0, "num_sanity_val_steps": 0, "precision": "64-true", "enable_checkpointing": False}
    return config(folder, name, own, data, callbacks=[witness], **limits)


def command(folder: Path, config_file: str) -> list[str]:
    return ["fit", f"--config={config_file}", f"--run_dir={folder}/run-{Path(config_file).stem}"]


DDP = ("--trainer.strategy=ddp",)


def free_ports(n: int) -> list[int]:
    probes = [socket.socket() for _ in range(n)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def two_ranks(folder: Path, lines: list[list[str]], limit_s: float = 250.0, strategy: Sequence[str] = DDP) -> list[int]:
    """Exit codes of two processes that run command lines one after the other, each in a group of its own."""
    ports = free_ports(len(lines))
    runs = [[port, [*line, "--trainer.devices=2", *strategy]] for port, line in zip(ports, lines, strict=True)]
    (folder / "lines.json").write_text(json.dumps(runs))
    kept = {key: value for key, value in os.environ.items() if key not in ("PL_GLOBAL_SEED", "THEODOLITE_RUN_DIR")}
    path = os.pathsep.join([str(HERE), str(HERE.parent), kept.get("PYTHONPATH", "")])
    shared = {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = []
    try:
        for rank in range(2):
            with open(folder / f"log-{rank}.txt", "w") as log:
                environment = kept | shared | {"PYTHONPATH": path, "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
                line = [sys.executable, __file__, str(folder / "lines.json")]
                ranks.append(subprocess.Popen(line, env=environment, stdout=log, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + limit_s
        return [rank.wait(timeout=max(1.0, deadline - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def log_of(folder: Path, rank: int) -> str:
    return (folder / f"log-{rank}.txt").read_text()


def rows_of(folder: Path, name: str, file: str = "metrics.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / f"run-{name}" / file).read_text().splitlines()]


def difference(folder: Path, one: str, other: str) -> float:
    first, second = (load_file(folder / f"witness-{name}" / "weights-0.safetensors") for name in (one, other))
    scale = max(float(value.abs().max()) for value in first.values())
    return max(float((first[name] - second[name]).abs().max()) for name in first) / scale


SIGNALLESS: dict[str, tuple[str, dict[str, Any]]] = {
    "survivor": ("one_survivor", {}),
    "constant": ("constant", {}),
    "nan": ("nan", {"zero_variance": "drop"}),
    "all_nan": ("all_nan", {"split_backward": True}),
    "truncated": ("mixed", {"max_new_tokens": 1, "truncated": "exclude"}),
    "kl": ("constant", {"beta": 0.1}),
}


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_deal_out_the_same_gradient_and_pass_degenerate_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    several: dict[str, Any] = {"updates_per_window": 2, "beta": 0.1, "zero_variance": "drop", "overlap_grading": True}
    files = {
        "dealt": written(tmp_path, "dealt", "one_sided"),
        "stay": written(tmp_path, "stay", "one_sided", balance_ranks=False),
        "dealt-mu": written(tmp_path, "dealt-mu", "one_sided", **several),
        "stay-mu": written(tmp_path, "stay-mu", "one_sided", balance_ranks=False, **several),
        "refill": written(tmp_path, "refill", "one_sided", zero_variance="refill"),
    }
    files |= {name: written(tmp_path, name, grader, **model) for name, (grader, model) in SIGNALLESS.items()}
    assert two_ranks(tmp_path, [command(tmp_path, file) for file in files.values()]) == [0, 0], log_of(tmp_path, 0)[-3000:]
    loads = {"time/rank_load_sampled": 0.0, "time/rank_load_computed": 0.0}
    for dealt, stay in (("dealt", "stay"), ("dealt-mu", "stay-mu")):
        assert difference(tmp_path, dealt, stay) < 1e-6
        for row in rows_of(tmp_path, dealt, "timings.jsonl"):
            assert row.get("time/rank_load_computed", 1.0) <= row.get("time/rank_load_sampled", 1.0)
            loads = {name: total + row.get(name, 0.0) for name, total in loads.items()}
    print("load of the heaviest rank over the mean, added over windows:", loads)
    assert loads["time/rank_load_computed"] < loads["time/rank_load_sampled"], "with this order of the data there is something to gain"
    for name in SIGNALLESS:
        assert len([row for row in rows_of(tmp_path, name) if "train/loss" in row]) == 4
        weights = load_file(tmp_path / f"witness-{name}" / "weights-1.safetensors")
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    for name in ("refill", "dealt-mu", *SIGNALLESS):
        kind, model = SIGNALLESS.get(name, ("one_sided", {"zero_variance": "refill"} if name == "refill" else several))
        main(command(tmp_path, written(tmp_path, f"{name}-one", kind, **model)))
        assert difference(tmp_path, name, f"{name}-one") < 1e-6, name
        first, second = rows_of(tmp_path, name), rows_of(tmp_path, f"{name}-one")
        for a, b in zip(first, second, strict=True):
            assert a == {k: pytest.approx(v, rel=1e-5, abs=1e-6, nan_ok=True) if isinstance(v, float) else v for k, v in b.items()}, name


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("how", "said"), [("raises", "KeyError: 'tests'"), ("hangs", "TimeoutError: no grades after 5.0 s")])
def test_what_fails_or_hangs_on_one_rank_stops_both_with_the_reason(tmp_path: Path, how: str, said: str) -> None:
    codes = two_ranks(tmp_path, [command(tmp_path, written(tmp_path, how, how, grading_timeout_s=5.0))], limit_s=200.0)
    assert 0 not in codes
    for rank in range(2):
        assert f"Grading failed at step 0 on rank 1 ({said})" in log_of(tmp_path, rank)


if __name__ == "__main__":
    for master_port, arguments in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(master_port)
        main(arguments)
