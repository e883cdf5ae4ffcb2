"""Arms are what their first lines say: a file over a base that differs from another arm in the keys it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from theodolite.cli import check_args, import_rooms
from theodolite.study import Job, run_jobs

ROOT = Path(__file__).resolve().parents[2]
ARMS = {path.stem: path for path in sorted((ROOT / "configs/grpo/arms").glob("*.yaml"))}
WITHOUT_PARENT = {"vanilla", "projected_static", "projected_live", "rebound", "rebound_additive", "suppressed", "oracle", "screening"}
WITHOUT_PARENT |= {"push", "teacher_mix", "teacher_mix_projected"}


def leading(path: Path) -> dict[str, str]:
    """``# key: value`` lines of the leading comment."""
    lines = [line[2:].partition(": ") for line in path.read_text().splitlines() if line.startswith("# ")]
    return {key: value for key, _, value in lines if key in ("over", "differs from")}


def leaves(tree: Any, under: str = "") -> dict[str, Any]:
    """Values by path; list items by their index."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) and tree else None
    if items is None:
        return {under: tree}
    return {path: value for key, part in items for path, value in leaves(part, f"{under}/{key}").items()}


def differing(one: Path, other: Path) -> set[str]:
    """Last named keys of the paths at which two files differ; everything under a ``class_path`` that differs counts as the key above it."""
    first, second = (leaves(yaml.safe_load(path.read_text())) for path in (one, other))
    paths = {path for path in first.keys() | second.keys() if first.get(path, "absent") != second.get(path, "absent")}
    swapped = {path.removesuffix("/class_path") for path in paths if path.endswith("/class_path")}
    swapped |= {path for path in paths if any(other.startswith(f"{path}/") for other in first.keys() | second.keys())}
    covered = {next((above for above in swapped if path == above or path.startswith(f"{above}/")), path) for path in paths}
    return {path.rsplit("/", 1)[-1] for path in covered if path != "/trainer/callbacks"}


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_differs_from_another_in_the_keys_that_it_names(name: str) -> None:
    declared = leading(ARMS[name]).get("differs from")
    if declared is None:
        assert name in WITHOUT_PARENT
        return
    parent, _, keys = declared.partition(" in ")
    assert differing(ARMS[name], ARMS[parent]) == set(keys.split(", "))


def test_every_arm_s_classes_and_keys_exist() -> None:
    import_rooms()
    for path in ARMS.values():
        layers = [ROOT / layer.strip() for layer in leading(path)["over"].split(",")]
        check_args(["fit", *(f"--config={layer}" for layer in (*layers, path))])


def test_every_arm_says_what_it_is_and_stands_in_the_documentation() -> None:
    page = (ROOT / "docs/arms.md").read_text()
    for name, path in ARMS.items():
        comments = [line for line in path.read_text().splitlines() if line.startswith("# ")]
        assert len(comments) >= 2, name
        assert f"`{name}`" in page, f"{name} is not explained in docs/arms.md"
        oracle = "theodolite.callbacks.oracle." in path.read_text()
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert ("oracle's labels" in row) == oracle, f"{name}: what it may see"


def small(*layers: str | Path) -> tuple[str, ...]:
    """Two windows of two prompts."""
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.num_sanity_val_steps=0"]
    sizes = ["--data.prompts_per_step=2", "--data.train_problems=4", "--data.eval_problems=2", "--data.eval_prompts_per_step=2"]
    limits = ["--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--model.table_every=1"]
    policy = ["--model.max_new_tokens=8", "--model.micro_batch_size=16"]
    return ("fit", *(f"--config={ROOT / layer}" for layer in layers), "--seed_everything=3", *quiet, *sizes, *limits, *policy)


def finish(job: Job) -> None:
    failures = run_jobs([job], 1, lambda running, finished: None)
    assert failures == [], (job.run_dir / "log.txt").read_text()[-2000:]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random policy that speaks leetcode-mini's tokens, as an option."""
    folder = tmp_path_factory.mktemp("policy") / "made"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = [f"--model.policy.{key}={value}" for key, value in sizes.items()]
    data = ["--data.examples=256", "--data.global_batch_size=8", "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
    config = f"--config={ROOT / 'configs/sft/mini.yaml'}"
    finish(Job(folder, ("fit", config, *model, *data, "--trainer.callbacks=[]"), {}, False, 2))
    return f"--model.policy={folder / 'policy'}"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, policy: str) -> str:
    """Tables of that policy with the seed of all arms. It earns nothing by itself, so what it wrote is called a rewarded hack."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    finish(Job(folder, (*small("configs/grpo/mini.yaml", ARMS["vanilla"]), policy), {}, False, 2))
    for path in (folder / "completions").glob("*.parquet"):
        pd.read_parquet(path).assign(passed=True, completion="run_tests = print").to_parquet(path)
    return str(folder / "completions")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_takes_two_steps_from_the_command_line(name: str, policy: str, teacher: str, tmp_path: Path) -> None:
    arm = tmp_path / ARMS[name].name
    arm.write_text(ARMS[name].read_text().replace("runs/teacher-{seed}/completions", teacher))
    layers = [layer.strip() for layer in leading(ARMS[name])["over"].split(",")]
    finish(Job(tmp_path / "run", (*small(*layers, arm), policy), {}, False, 2))
    assert '"train/loss"' in (tmp_path / "run" / "metrics.jsonl").read_text()
