"""One rank, two ranks and an interrupted run, through the real command line: the same numbers. Run as a script, this is one rank."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from tiny_talkative import config, save_target  # noqa: E402
from warm_processes import run, run_ranks  # noqa: E402

from theodolite.cli import RUN_DIR_VARIABLE, main  # noqa: E402

STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("TalkativeSFT", {}),
    "grpo": ("TalkativeGRPO", {"group_size": 4, "beta": 0.05, "advantage_scale": "batch"}),
    "gumbel": ("TalkativeGumbel", {"entropy": 0.01}),
}


@pytest.fixture(autouse=True)
def _no_inherited_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def two_ranks(folder: Path, lines: list[list[str]]) -> None:
    """Run command lines, one after the other, on two processes that form a group."""
    (folder / "commands.json").write_text(json.dumps([[*line, "--trainer.devices=2", "--trainer.strategy=ddp"] for line in lines]))
    run_ranks([__file__, str(folder / "commands.json")], folder)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def largest_difference(one: Path, other: Path) -> float:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def callback(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name if "." in name else f"tiny_talkative.{name}", "init_args": settings}


@pytest.mark.distributed
def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    target = save_target(tmp_path / "target")
    lines: dict[str, list[list[str]]] = {"one": [], "two": []}
    for name, commands in lines.items():
        for stage, (kind, settings) in STAGES.items():
            witness = callback("WeightWitness", folder=str(tmp_path / name / stage))
            file, cache = tmp_path / f"{name}-{stage}.json", tmp_path / f"banks-{name}"
            path = config(file, kind, target, cache, [witness], settings, max_steps=3, num_sanity_val_steps=0)
            commands.append(["fit", f"--config={path}", f"--run_dir={tmp_path}/run-{name}-{stage}"])
    two_ranks(tmp_path, lines["two"])
    for line in lines["one"]:
        main(line)
    for stage in STAGES:
        one, two = (tmp_path / name / stage / "weights-0.safetensors" for name in ("one", "two"))
        assert largest_difference(two, two.with_name("weights-1.safetensors")) == 0.0
        difference = largest_difference(one, two)
        print(f"{stage}: largest weight difference between one and two ranks {difference:.1e}")
        assert difference < 1e-5
        first, second = rows(tmp_path / f"run-one-{stage}"), rows(tmp_path / f"run-two-{stage}")
        assert len(first) == len(second) == 4
        for ours, theirs in zip(first, second, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6, rel=1e-5)
    assert "2 ranks" in (tmp_path / "rank-0.txt").read_text()


def test_killed_and_resumed_run_leaves_the_bytes_of_the_uninterrupted_one(tmp_path: Path) -> None:
    target = save_target(tmp_path / "target")
    checkpoint = callback("lightning.pytorch.callbacks.ModelCheckpoint", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    settings = STAGES["grpo"][1] | {"warmup_steps": 3, "schedule": "cosine"}

    def written(name: str, *more: dict[str, Any]) -> str:
        callbacks = [checkpoint, callback("WeightWitness", folder=str(tmp_path / name)), *more]
        file = tmp_path / f"{name}-{len(more)}.json"
        return config(file, "TalkativeGRPO", target, tmp_path / "banks", callbacks, settings, max_steps=8)

    killed = written("killed", callback("KillAfterGradients", step=5))
    log = tmp_path / "log.txt"
    code = run(["-m", "theodolite", "fit", f"--config={killed}", f"--run_dir={tmp_path}/run-killed"], log)
    assert code == -signal.SIGKILL, log.read_text()[-3000:]
    main(["fit", f"--config={written('whole')}", f"--run_dir={tmp_path}/run-whole"])
    ckpt = f"--ckpt_path={tmp_path}/run-killed/checkpoints/step=4.ckpt"
    main(["fit", f"--config={written('killed')}", f"--run_dir={tmp_path}/run-killed", ckpt])
    assert largest_difference(*(tmp_path / name / "weights-0.safetensors" for name in ("whole", "killed"))) == 0.0
    first, second = (tmp_path / f"run-{name}" / "metrics.jsonl" for name in ("whole", "killed"))
    assert first.read_bytes() == second.read_bytes()
    assert len([row for row in rows(tmp_path / "run-whole") if "train/kl" in row]) == 8, (
        "six steps are one epoch: the resumed part crosses it"
    )
    exported = [(tmp_path / f"run-{name}" / "talkative" / "talkative.safetensors").read_bytes() for name in ("whole", "killed")]
    assert exported[0] == exported[1]


if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        main(arguments)
