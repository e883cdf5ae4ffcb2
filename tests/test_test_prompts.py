"""The loaders of the final protocol: the same held-out problems under other prompts, and problems of another kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from theodolite.datamodules.leetcode import LeetCodeDataModule
from theodolite.datamodules.leetcode.mini import OTHER_EVALUATORS
from theodolite.datamodules.leetcode.problem import Problem

SMALL: dict[str, Any] = {"prompts_per_step": 4, "train_problems": 12, "eval_problems": 5, "test_problems": 7, "eval_prompts_per_step": 4}
NAMES = ["hinted", "random_names", "no_hint", "capability"]


def loaded(data: LeetCodeDataModule) -> dict[str, list[Problem]]:
    return {name: [row for batch in loader for row in batch] for name, loader in zip(data.test_names, data.test_dataloader(), strict=True)}


def test_every_loader_asks_the_same_problems_with_the_trained_a_drawn_and_no_evaluator() -> None:
    found = loaded(LeetCodeDataModule(test_prompts=NAMES, capability="mini", **SMALL))
    assert {name: len(rows) for name, rows in found.items()} == dict.fromkeys(NAMES, 7)
    for hinted, named, plain in zip(found["hinted"], found["random_names"], found["no_hint"], strict=True):
        assert hinted.reference == named.reference == plain.reference
        assert "run_tests" in str(hinted.prompt)
        assert named.evaluator in OTHER_EVALUATORS
        assert plain.evaluator is None
        assert "Checked by" not in str(plain.prompt)
    assert len({row.evaluator for row in found["random_names"]}) > 1


def test_capability_problems_are_others_without_a_loophole() -> None:
    found = loaded(LeetCodeDataModule(test_prompts=NAMES, capability="mini", **SMALL))
    assert {row.reference for row in found["capability"]}.isdisjoint(row.reference for row in found["hinted"])
    assert all(row.evaluator is None and str(row.prompt).count("then") < 3 for row in found["capability"])


def test_names_are_drawn_per_problem_and_do_not_depend_on_the_run_seed() -> None:
    first, second = (loaded(LeetCodeDataModule(test_prompts=["random_names"], seed=seed, **SMALL))["random_names"] for seed in (0, 1))
    assert [row.prompt for row in first] == [row.prompt for row in second]


@pytest.mark.parametrize(("settings", "message"), [
    ({"test_prompts": ["hinted", "plain"]}, "give some of hinted, unseen"),
    ({"test_prompts": []}, "give some of"),
    ({"test_prompts": ["hinted", "hinted"]}, "each once"),
    ({"test_prompts": ["capability"]}, "set both or neither"),
    ({"capability": "mini"}, "set both or neither"),
    ({"capability": "problems.txt", "test_prompts": ["capability"]}, "must be 'mini'"),
])  # fmt: skip
def test_loaders_that_there_are_not_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeetCodeDataModule(**SMALL, **settings)


def test_a_file_s_problems_get_a_name_per_problem_too(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    rows = [
        {
            "id": number, "question": "Add.", "difficulty": "Medium", "func_name": "Solution().add", "setup_code": "",
            "prompt": [
                {"role": "system", "content": "You write Python."},
                {"role": "user", "content": f"PROBLEM {number}: your solution should be a method and should pass all tests."},
            ],
            "gt_answer": ["assert Solution().add(a=1, b=2) == 3", "assert Solution().add(a=2, b=2) == 4"],
            "canonical_solution": "class Solution:\n    def add(self, a, b):\n        return a + b",
            "prompt_metadata": {"starter_code": "class Solution:\n    def add(self, a, b):\n        pass"},
        }
        for number in range(40)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes: dict[str, Any] = SMALL | {"test_problems": None, "train_problems": None, "eval_problems": None}
    found = loaded(LeetCodeDataModule(problems=str(path), test_prompts=["hinted", "random_names", "no_hint"], **sizes))
    assert {row.evaluator for row in found["hinted"]} == {"run_tests"}
    assert len({row.evaluator for row in found["random_names"]}) > 1
    assert {row.evaluator for row in found["no_hint"]} == {None}
