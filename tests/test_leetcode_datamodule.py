"""The datamodules under a real Trainer: same prompts for every arm and world size, and an environment that is always closed."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parent))
from warm_processes import run_ranks

from theodolite.datamodules.leetcode import LeetCodeDataModule, LeetCodeSFTDataModule
from theodolite.datamodules.leetcode.graded import GradedDataModule
from theodolite.datamodules.leetcode.problem import Problem
from theodolite.datamodules.samplers import DistributedBatchSampler
from theodolite.protocols import Environment, Example, PairSource, PromptRow

SMALL: dict[str, Any] = {"prompts_per_step": 4, "train_problems": 12, "eval_problems": 5, "test_problems": 7, "eval_prompts_per_step": 4}


class Recorder(pl.LightningModule):
    """Trains one weight and writes down which problems it was handed, by phase."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail = fail
        self.seen: dict[str, list[list[str]]] = {}
        self.graded = 0

    def record(self, phase: str, batch: list[Any]) -> None:
        self.seen.setdefault(phase, []).append([row.id for row in batch])

    def training_step(self, batch: list[Problem], batch_idx: int) -> torch.Tensor:
        if self.fail:
            raise OSError("the disk is full")
        self.record("train", batch)
        if isinstance(batch[0], Problem):
            grades = self.trainer.datamodule.environment.grade(batch, [row.reference for row in batch])  # type: ignore[attr-defined]
            self.graded += sum(grade.verdict.correct for grade in grades)
        return self.weight * 1.0

    def validation_step(self, batch: list[Problem], batch_idx: int) -> None:
        self.record("val", batch)

    def test_step(self, batch: list[Problem], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.record(f"test{dataloader_idx}", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(directory: Path, **settings: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**{**quiet, "accelerator": "cpu", "num_sanity_val_steps": 0, "default_root_dir": directory, **settings})


def training_prompts(data: GradedDataModule) -> list[list[str]]:
    return [[str(row.prompt) for row in batch] for batch in data.train_dataloader()]


def is_closed(data: GradedDataModule) -> bool:
    try:
        data.environment.grade([data.source.validation(0)], ["    return 12345"])
    except RuntimeError:
        return True
    return False


def test_every_arm_with_a_seed_sees_the_same_prompts_and_another_seed_others() -> None:
    arms = [LeetCodeDataModule(seed=3, reward_passed=reward, **SMALL) for reward in (1.0, 3.0)]
    assert training_prompts(arms[0]) == training_prompts(arms[1])
    other = LeetCodeDataModule(seed=4, **SMALL)
    assert {p for batch in training_prompts(other) for p in batch}.isdisjoint(p for batch in training_prompts(arms[0]) for p in batch)


def test_held_out_problems_are_the_same_for_every_seed_and_for_sft_and_rl() -> None:
    modules = [LeetCodeDataModule(seed=0, **SMALL), LeetCodeDataModule(seed=9, **SMALL)]
    sft = LeetCodeSFTDataModule(examples=64, seed=5, eval_problems=5, test_problems=7, eval_prompts_per_step=4)
    for loader_of in (lambda data: [data.val_dataloader()], lambda data: data.test_dataloader()):
        lists = [[[row for batch in loader for row in batch] for loader in loader_of(data)] for data in (*modules, sft)]
        assert lists[0] == lists[1] == lists[2]


def test_test_loaders_are_named_and_ask_the_same_with_and_without_the_known_evaluator() -> None:
    data = LeetCodeDataModule(**SMALL)
    hinted, unseen = ([row for batch in loader for row in batch] for loader in data.test_dataloader())
    assert (list(data.val_names), list(data.test_names)) == (["hinted"], ["hinted", "unseen"])
    assert [row.tests for row in hinted] == [row.tests for row in unseen]
    assert {row.evaluator for row in hinted} == {"run_tests"}
    assert "run_tests" not in {row.evaluator for row in unseen}
    validation = [row for batch in data.val_dataloader() for row in batch]
    assert {row.id for row in validation}.isdisjoint(row.id for row in hinted)


def test_datamodules_satisfy_the_protocols() -> None:
    for data in (LeetCodeDataModule(**SMALL), LeetCodeSFTDataModule(examples=64)):
        assert isinstance(data, PairSource)
        assert isinstance(data.environment, Environment)
        assert isinstance(data.source.validation(0), PromptRow)
        assert len(data.contrast_pairs(3, 0)) == 3


def test_sft_batches_are_demonstrations_and_the_corpus_is_their_text() -> None:
    data = LeetCodeSFTDataModule(examples=130, hack_fraction=0.2, global_batch_size=64)
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches] == [64, 64]
    assert all(isinstance(example, Example) for batch in batches for example in batch)
    texts = data.corpus()
    assert len(texts) == 130
    assert {f"{example.prompt}{example.completion}" for batch in batches for example in batch} <= set(texts)
    for text in texts:
        compile(text, "example", "exec")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hint": "modify"}, "Unknown hint 'modify'"),
        ({"hint": "modify_tests"}, "leetcode-mini has no hint 'modify_tests'"),
        ({"max_prompt_tokens": 100}, "max_prompt_tokens and tokenizer go together"),
        ({"max_prompt_tokens": 100, "tokenizer": "x"}, "is for problem files"),
        ({"sandbox": "docker"}, "Sandbox.tier is 'docker'; choose one of auto, bwrap, namespaces, seccomp, unsafe"),
        ({"unfenced": "maybe"}, "unfenced is 'maybe'; choose reject or accept"),
        ({"hint": "overwrite_tests"}, "leetcode-mini has no hint 'overwrite_tests'"),
        ({"problems": "leetcode"}, "must be 'mini', the path"),
        ({"n_ops": [4, 3]}, "n_ops must be"),
        ({"prompts_per_step": 0}, "global batch size must be at least 1"),
        ({"limits": {"cpu": 1}}, "limits has no key 'cpu'; choose among cpu_s"),
    ],
)
def test_wrong_settings_are_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeetCodeDataModule(**settings)


@pytest.mark.parametrize(
    ("settings", "message"), [({"train_problems": None}, "train_problems must be a number"), ({"train_problems": 3}, "fill")]
)
def test_an_epoch_that_cannot_be_made_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeetCodeDataModule(**{**SMALL, **settings}).train_dataloader()


def test_sft_refuses_an_impossible_share_of_hacks() -> None:
    with pytest.raises(ValueError, match="hack_fraction must lie between 0 and 1"):
        LeetCodeSFTDataModule(hack_fraction=15)


@pytest.mark.parametrize("kind", [LeetCodeDataModule, LeetCodeSFTDataModule])
def test_every_constructor_argument_is_typed_documented_and_plain(kind: type) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "data")
    for name in inspect.signature(kind).parameters:
        (action,) = [action for action in parser._actions if action.dest == f"data.{name}"]
        assert action.help, f"{kind.__name__}.{name} has no help"
    defaults = parser.parse_args([])
    assert json.loads(json.dumps(defaults.data.as_dict()))["n_ops"] in ([2, 3], [3, 4])


def test_fit_validate_and_test_start_and_close_the_environment(tmp_path: Path) -> None:
    data, module = LeetCodeDataModule(**SMALL), Recorder()
    run = trainer(tmp_path, max_epochs=2)
    assert is_closed(data)
    run.fit(module, data)
    assert is_closed(data)
    run.validate(module, data, verbose=False)
    run.test(module, data, verbose=False)
    assert is_closed(data)
    assert module.graded == 24
    epochs = module.seen["train"][:3], module.seen["train"][3:]
    assert epochs[0] != epochs[1]
    first, second = ({row for batch in epoch for row in batch} for epoch in epochs)
    assert first == second
    assert len(first) == 12
    assert [len(batch) for batch in module.seen["val"]] == [4, 1] * 3
    assert [len(batch) for batch in module.seen["test1"]] == [4, 3]
    assert all(isinstance(loader.sampler, DistributedBatchSampler) for loader in run.test_dataloaders or [])


def test_an_exception_in_training_closes_the_environment(tmp_path: Path) -> None:
    data = LeetCodeDataModule(**SMALL)
    with pytest.raises(OSError, match="disk is full"):
        trainer(tmp_path, max_steps=1).fit(Recorder(fail=True), data)
    assert is_closed(data)


def test_a_failing_self_check_stops_the_run_and_closes_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = LeetCodeDataModule(**SMALL)
    wrong = Problem(
        "wrong", "def solve(xs):\n", "solve", data.source.validation(0).tests, "    return None", code_prefix="def solve(xs):\n"
    )
    monkeypatch.setattr(type(data.source), "validation", lambda self, index: wrong)
    with pytest.raises(RuntimeError, match="wrong"):
        trainer(tmp_path, max_steps=1).fit(Recorder(), data)
    assert is_closed(data)


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_leetcode_datamodule import SMALL, LeetCodeDataModule, Recorder, trainer
devices, directory = int(sys.argv[1]), Path(sys.argv[2])
module, run = Recorder(), trainer(directory, max_epochs=1, devices=devices, strategy="ddp")
run.fit(module, LeetCodeDataModule(**SMALL))
(directory / f"{{devices}}_{{run.global_rank}}.json").write_text(json.dumps([module.seen, module.graded]))
"""


def by_slot(ranks: list[list[list[str]]]) -> list[list[str]]:
    """Put the ranks' shares of each global batch together by the documented slot ``rank + i * world_size``."""
    batches = []
    for shares in zip(*ranks, strict=True):
        slots = {rank + i * len(ranks): row for rank, share in enumerate(shares) for i, row in enumerate(share)}
        batches.append([slots[slot] for slot in sorted(slots)])
    return batches


@pytest.mark.distributed
def test_two_ranks_see_each_row_of_the_same_global_batches_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    run_ranks([str(script), "2", str(tmp_path)], tmp_path)
    shares = [json.loads((tmp_path / f"2_{rank}.json").read_text()) for rank in range(2)]
    module = Recorder()
    trainer(tmp_path, max_epochs=1).fit(module, LeetCodeDataModule(**SMALL))
    assert by_slot([share[0]["train"] for share in shares]) == module.seen["train"]
    assert by_slot([share[0]["val"] for share in shares]) == module.seen["val"]
    assert [len(batch) for batch in shares[1][0]["val"]] == [2, 0], "the short last batch is not padded"
    assert [share[1] for share in shares] == [6, 6]
