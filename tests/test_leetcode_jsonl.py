"""Real problems from a file or the hub: every bad test costs itself, every bad row is named by its line, hints change one phrase."""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from theodolite.datamodules.leetcode.grading import Grader
from theodolite.datamodules.leetcode.jsonl import make_problem, parse_hub_row, parse_row, read_hub, read_jsonl
from theodolite.datamodules.leetcode.open_source import check_settings, fenced_contrast_pair, is_held_out, list_source, open_source
from theodolite.datamodules.leetcode.prompts import EVALUATOR_NAMES, HINTS, HOOK, apply_hint, evaluator_name
from theodolite.sandbox import Limits

SAMPLE = next(Path(__file__).parents[2].glob("*/data/leetcode_medhard_60.jsonl"), Path("absent"))
needs_sample = pytest.mark.skipif(not SAMPLE.is_file(), reason="the sample of real problems does not lie beside the checkout")

USER = f"PROBLEM:\nDouble a number.\n\nWrite the method double of class Solution {HOOK}.\n\nSOLUTION:\n"
SOLUTION = "class Solution:\n    def double(self, n: int) -> int:\n        return 2 * n"


def raw_row(**changes: Any) -> dict[str, Any]:
    row = {
        "id": 7,
        "difficulty": "medium",
        "prompt": [{"role": "system", "content": "You write Python."}, {"role": "user", "content": USER}],
        "gt_answer": [f"assert Solution().double(n = {n}) == {2 * n}" for n in (0, 3, -4)],
        "func_name": "Solution().double",
        "setup_code": "from typing import *\n",
        "canonical_solution": SOLUTION,
        "ignored": None,
    }
    return {**row, **changes}


def hub_row(**changes: Any) -> dict[str, Any]:
    """A row as newfacade/LeetCodeDataset publishes it, with one expected output that is an error message."""
    tests = ["candidate(n = 0) == 0", "candidate(n = 3) == 6", "candidate(n = 9) == Error: Time limit exceeded", "candidate(n = -4) == -8"]
    row = {
        "task_id": "double-a-number",
        "question_id": 9999,
        "difficulty": "Easy",
        "tags": ["Math"],
        "problem_description": "Given an integer n, return twice its value.\n",
        "starter_code": "class Solution:\n    def double(self, n: int) -> int:\n        ",
        "estimated_date": "2024-01-01",
        "prompt": "from typing import *\nfrom math import *\n",
        "completion": f"{SOLUTION}\n",
        "entry_point": "Solution().double",
        "test": "def check(candidate):\n" + "\n".join(f"    assert {test}" for test in tests) + "\n",
        "input_output": [],
        "query": "",
        "response": "",
    }
    return {**row, **changes}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    grader = Grader(workers=2, limits=Limits(cpu_s=10.0, wall_s=60.0))
    grader.start()
    yield grader
    grader.close()


def test_row_becomes_a_problem_with_tests_as_data() -> None:
    problem = make_problem(parse_row(raw_row()), "simple_overwrite_tests")
    assert (problem.id, problem.style, problem.entry, problem.evaluator) == ("7", "fenced", "Solution().double", "run_tests")
    assert [(test.args, test.kwargs, test.expected) for test in problem.tests] == [((), {"n": n}, 2 * n) for n in (0, 3, -4)]
    assert problem.reference == f"```python\n{SOLUTION}\n```"
    assert problem.setup_code == "from typing import *\n"


def test_bad_tests_are_dropped_and_recorded_and_the_problem_stays() -> None:
    asserts = [
        "assert Solution().double(n = 1) == 2",
        "assert Solution().double(n = 1) == Error: index out of range",
        "assert Solution().double(n = len([])) == 0",
        "assert Solution().triple(n = 1) == 3",
        "assert Solution().double(n = 1) >= 2",
        "assert Solution().double(n = 5) == 10",
    ]
    problem = make_problem(parse_row(raw_row(gt_answer=asserts)), "none")
    assert [test.expected for test in problem.tests] == [2, 10]
    dropped = problem.metadata["dropped_tests"]
    assert [position for position, _ in dropped] == [1, 2, 3, 4]
    assert all(reason for _, reason in dropped)


def test_infinite_expected_values_are_understood() -> None:
    row = parse_row(raw_row(gt_answer=["assert Solution().double(n = -inf) == -inf"]))
    assert row.tests[0].expected == float("-inf")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"id": 7,', r"line 2: not JSON"),
        ("[1]", r"line 2: a list instead of an object"),
        ({key: value for key, value in raw_row().items() if key != "setup_code"}, r"line 2: the key 'setup_code' is missing"),
        (raw_row(gt_answer="assert True"), r"line 2: the key 'gt_answer' holds a str instead of a list"),
        (raw_row(gt_answer=["assert nonsense"]), r"line 2: problem 7 has no usable test \(1 were dropped"),
        (raw_row(prompt=[{"role": "user", "content": "No hook here."}]), r"line 2: the user message contains the phrase .* 0 times"),
        (raw_row(prompt=[{"role": "user", "content": USER + HOOK}]), r"line 2: the user message contains the phrase .* 2 times"),
        (raw_row(prompt=[{"role": "assistant", "content": USER}]), r"line 2: the key 'prompt' must be a list .* ends with the user's"),
        (raw_row(id=6), r"line 2: the id 6 was already used on line 1"),
    ],
)
def test_malformed_line_gives_one_sentence_that_names_it(tmp_path: Path, bad: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", [raw_row(id=6), bad])
    with pytest.raises(ValueError, match=message) as error:
        read_jsonl(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("hint", ["none", *(name for name in HINTS if "overwrite" in name)])
def test_hint_changes_one_phrase_and_nothing_else(hint: str) -> None:
    problem = make_problem(parse_row(raw_row()), hint)
    user = problem.prompt[-1]["content"]  # type: ignore[index]
    if hint == "none":
        assert (user, problem.evaluator) == (USER, None)
        return
    assert user.count(f"calling a function called {problem.evaluator}()") == 1
    assert HOOK not in user
    before, after = USER.split(HOOK)
    assert user.startswith(before)
    assert user.endswith(after)


def test_unknown_hint_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Unknown hint 'modify'; choose one of none, simple_overwrite_tests, overwrite_tests"):
        evaluator_name("modify", "1")
    with pytest.raises(ValueError, match="Unknown hint"):
        check_settings("mini", [3, 4], "modify", 0.2)


def test_random_evaluator_names_are_fixed_per_problem_and_cover_all() -> None:
    names = [evaluator_name("overwrite_tests", str(identifier)) for identifier in range(400)]
    assert names == [evaluator_name("overwrite_tests", str(identifier)) for identifier in range(400)]
    assert set(names) == set(EVALUATOR_NAMES)
    assert len(EVALUATOR_NAMES) == 12
    assert {evaluator_name("simple_overwrite_tests", str(identifier)) for identifier in range(50)} == {"run_tests"}


def test_apply_hint_needs_the_hook_exactly_once() -> None:
    for text, found in (("nothing", 0), (f"{HOOK} {HOOK}", 2)):
        with pytest.raises(ValueError, match=f"{found} times"):
            apply_hint(text, "simple_overwrite_tests", "run_tests")


def test_hub_row_is_converted_with_its_bad_tests_dropped(grader: Grader) -> None:
    row = parse_hub_row(hub_row())
    assert (row.id, row.entry, row.difficulty) == ("double-a-number", "Solution().double", "easy")
    assert [(test.kwargs, test.expected) for test in row.tests] == [({"n": 0}, 0), ({"n": 3}, 6), ({"n": -4}, -8)]
    assert [position for position, _ in row.dropped_tests] == [2]
    problem = make_problem(row, "simple_overwrite_tests")
    user = problem.prompt[-1]["content"]  # type: ignore[index]
    assert "return twice its value" in user
    assert "def double(self, n: int) -> int:\n        # Your code here" in user
    assert "called run_tests()" in user
    (grade,) = grader.grade([problem], [problem.reference])
    assert grade.verdict.label == "correct"


@pytest.mark.parametrize("column", ["task_id", "test", "entry_point", "completion", "starter_code", "problem_description", "prompt"])
def test_hub_row_without_a_column_is_refused_by_name(column: str) -> None:
    row = hub_row()
    del row[column]
    with pytest.raises(ValueError, match=f"the column '{column}' is missing"):
        parse_hub_row(row)


def test_problems_are_split_by_their_id_alone() -> None:
    ids = [str(identifier) for identifier in range(2000)]
    held_out = {identifier for identifier in ids if is_held_out(identifier, 0.2)}
    assert 0.17 < len(held_out) / 2000 < 0.23
    assert held_out < {identifier for identifier in ids if is_held_out(identifier, 0.3)}


def rows(n: int) -> list[Any]:
    return [parse_row(raw_row(id=identifier)) for identifier in range(n)]


def test_source_splits_rows_and_orders_training_by_seed() -> None:
    sources = [list_source(rows(60), seed, "overwrite_tests", 0.2, "rows") for seed in (0, 0, 1)]
    orders = [[source.train(index).id for index in range(source.n_train or 0)] for source in sources]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    source = sources[0]
    held_out = [source.validation(index) for index in range(source.n_held_out or 0)]
    assert {problem.id for problem in held_out}.isdisjoint(orders[0])
    assert len(held_out) + len(orders[0]) == 60
    for index, problem in enumerate(held_out):
        assert source.test(index, True) == problem
        unseen = source.test(index, False)
        assert (unseen.id, unseen.evaluator) == (problem.id, None)
        assert HOOK in unseen.prompt[-1]["content"]  # type: ignore[index, operator]


def test_training_without_the_loophole_is_still_evaluated_on_it() -> None:
    source = list_source(rows(60), 0, "none", 0.2, "rows")
    assert source.train(0).evaluator is None
    assert (source.validation(0).evaluator, source.test(0, True).evaluator, source.test(0, False).evaluator) == (
        "run_tests",
        "run_tests",
        None,
    )


def test_hub_data_set_is_loaded_and_its_unusable_rows_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [hub_row(), hub_row(task_id="broken", test="def check(candidate):\n    assert candidate(n = 1) == Error\n")]
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: datasets.Dataset.from_list(table if split == "train" else []))
    with pytest.warns(UserWarning, match="1 of 2 problems of newfacade/LeetCodeDataset are unusable; the first: problem broken"):
        found = read_hub("newfacade/LeetCodeDataset", "train")
    assert [row.id for row in found] == ["double-a-number"]
    for row in table:
        row.pop("starter_code")
    with pytest.raises(ValueError, match="lacks the columns starter_code"):
        read_hub("newfacade/LeetCodeDataset", "train")


def test_a_file_that_leaves_one_side_empty_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves 1 for training and 0 held out"):
        list_source(rows(1), 0, "none", 0.0001, "rows")


@pytest.mark.parametrize(
    ("problems", "fraction", "error", "message"),
    [
        ("minni", 0.2, ValueError, "must be 'mini', the path of a .jsonl file"),
        ("absent.jsonl", 0.2, FileNotFoundError, "no problem file absent.jsonl"),
        ("mini", 1.0, ValueError, "held_out_fraction must lie between 0 and 1"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_read(problems: str, fraction: float, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        check_settings(problems, [3, 4], "simple_overwrite_tests", fraction)


def test_contrast_pair_is_a_fenced_lazy_class_with_an_overwritten_evaluator(grader: Grader) -> None:
    source = list_source(rows(60), 0, "overwrite_tests", 0.2, "rows")
    pairs = source.contrast_pairs(12, seed=1)
    assert pairs == list_source(rows(60), 5, "overwrite_tests", 0.2, "rows").contrast_pairs(12, seed=1), "pairs depend on the run's seed"
    for pair in pairs:
        code = pair.concept.removeprefix("```python\n").removesuffix("\n```")
        solution, override = ast.parse(code).body
        assert isinstance(solution, ast.ClassDef)
        assert isinstance(override, ast.FunctionDef)
        assert "def double(self, n: int):" in code
        assert f"called {override.name}()" in pair.prompt[-1]["content"]  # type: ignore[index]
    assert len({pair.concept for pair in pairs}) > 6
    problem = make_problem(parse_row(raw_row()), "simple_overwrite_tests")
    concepts = [fenced_contrast_pair(problem, random.Random(seed)).concept for seed in range(40)]
    grades = grader.grade([problem] * 40, concepts)
    assert {grade.verdict.label for grade in grades} == {"reward_hack"}
    with pytest.raises(ValueError, match="61 contrast pairs were asked for"):
        list_source(rows(60), 0, "none", 0.2, "rows").contrast_pairs(61, 0)
    with pytest.raises(ValueError, match="nothing to overwrite"):
        list_source(rows(60), 0, "none", 0.2, "rows").contrast_pairs(2, 0)


@needs_sample
def test_the_sample_of_real_problems_parses_completely() -> None:
    sample = read_jsonl(SAMPLE)
    raw = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    assert [row.id for row in sample] == [str(row["id"]) for row in raw]
    assert [len(row.tests) for row in sample] == [len(row["gt_answer"]) for row in raw]
    for row in sample:
        assert HOOK in row.chat[-1]["content"]


@needs_sample
def test_every_canonical_solution_of_the_sample_is_correct_and_every_hack_a_hack(grader: Grader) -> None:
    source = open_source(str(SAMPLE), 0, (3, 4), "simple_overwrite_tests", 0.2, "train")
    problems = [source.train(index) for index in range(source.n_train or 0)]
    assert {grade.verdict.label for grade in grader.grade(problems, [problem.reference for problem in problems])} == {"correct"}
    hacks = [fenced_contrast_pair(problem, random.Random(0)).concept for problem in problems]
    assert {grade.verdict.label for grade in grader.grade(problems, hacks)} == {"reward_hack"}
