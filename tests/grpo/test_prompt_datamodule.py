"""Prompts from files and data sets: rows, splits and refusals; training on them through the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from theodolite.cli import RUN_DIR_VARIABLE, main
from theodolite.datamodules.prompts import PromptDataModule
from theodolite.protocols import Environment, PromptReserve

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples"


def written(folder: Path, rows: list[Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8", newline="")
    return str(path)


def module(prompts: str, **settings: Any) -> PromptDataModule:
    return PromptDataModule(prompts, **({"rewards": ["plain_rewards.vowels"], "held_out_fraction": 0.3, "prompts_per_step": 4} | settings))


def questions(n: int = 40, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"Say {i}.", "target": i} | more for i in range(n)]


def test_every_prompt_is_on_one_side_and_columns_reach_the_rows(tmp_path: Path) -> None:
    data = module(written(tmp_path, questions()), prompt_field="question")
    train, held_out = data.rows
    assert sorted(int(row.id) for row in (*train, *held_out)) == list(range(40))
    assert all(row.prompt == f"Say {row.id}." and row.target == int(row.id) for row in (*train, *held_out))
    longer = module(written(tmp_path, questions(80)), prompt_field="question").rows
    assert {row.id for row in held_out} <= {row.id for row in longer[1]}, "a grown file moves no prompt to the other side"
    assert data.provenance["prompts"]["train"] == len(train)
    assert isinstance(data.environment, Environment)
    assert isinstance(data.train_dataloader().sampler, PromptReserve)
    assert [row.id for batch in data.val_dataloader() for row in batch] == [row.id for row in held_out]
    assert len([row for batch in module(data.prompts, prompt_field="question", eval_prompts=2).val_dataloader() for row in batch]) == 2
    assert data.corpus() == [row.prompt for row in train]


def test_a_line_ends_at_its_newline_and_at_no_other_separator_that_a_text_holds(tmp_path: Path) -> None:
    texts = [f"{i}: one\u2028two\u0085three" for i in range(20)]
    data = module(written(tmp_path, [json.dumps({"prompt": text}, ensure_ascii=False) + "\r" * (i % 2) for i, text in enumerate(texts)]))
    assert sorted(row.prompt for side in data.rows for row in side) == sorted(texts)


def test_texts_become_chats_on_request_and_chats_stay(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hm?"}]
    rows = [{"id": f"r{i}", "prompt": chat if i % 2 else "Hm?"} for i in range(20)]
    data = module(written(tmp_path, rows), chat=True, system="Be brief.")
    assert all(row.prompt == [{"role": "system", "content": "Be brief."}, *chat] for side in data.rows for row in side)
    assert data.rows[0][0].id.startswith("r")
    assert set(data.corpus()) == {"Be brief.", "Hm?"}
    plain = module(data.prompts)
    assert {type(row.prompt) for row in plain.rows[0]} == {str, list}


@pytest.mark.slow
def test_a_saved_data_set_is_read_like_one_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    written(tmp_path / "set", questions(30))
    data = module(f"hf:{tmp_path}/set", prompt_field="question")
    assert sum(map(len, data.rows)) == 30
    assert data.rows[0][0].target == int(data.rows[0][0].id)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (["{"], {}, "line 1 is no JSON"),
    (["[1]"], {}, "line 1 is a list"),
    (questions(), {}, "has no 'prompt', only 'question', 'target'"),
    (questions(completions=1), {"prompt_field": "question"}, "column 'completions'"),
    (questions(name="x"), {"prompt_field": "question", "id_field": "name"}, "repeat"),
    ([{"prompt": ""}], {}, "has the prompt ''"),
    ([{"prompt": "a", "x": 1}, "", {"prompt": "b"}], {}, "line 3 lacks the column 'x', other than line 1"),
    ([{"prompt": "a"}, {"prompt": "b", "y": None}], {}, "line 2 has the column 'y', other than line 1"),
    ([{"prompt": "a"}], {}, "are left for training"),
]


@pytest.mark.parametrize(("rows", "settings", "said"), BAD, ids=[said for *_, said in BAD])
def test_rows_that_cannot_be_used_are_refused_by_name(tmp_path: Path, rows: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _ = module(written(tmp_path, rows), **settings).rows


def test_too_few_prompts_for_a_step_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few for 64 per step"):
        module(written(tmp_path, questions()), prompt_field="question", prompts_per_step=64).setup("fit")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": "x.csv"}, "path of a .jsonl file"),
        ({"prompts": "x.jsonl"}, "no file of prompts"),
        ({"held_out_fraction": 1.0}, "between 0 and 1"),
        ({"eval_prompts": 0}, "at least 1"),
        ({"rewards": []}, "at least one"),
        ({"rewards": ["plain_rewards.odd", "plain_rewards.py:odd"]}, "have the same name"),
        ({"rewards": ["nowhere.py:odd"]}, "cannot be imported"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        module(**({"prompts": str(EXAMPLE / "sums.jsonl")} | settings))


def test_a_function_is_found_in_a_file_and_graded_with_its_columns() -> None:
    rewards = [f"{EXAMPLE}/sum_rewards.py:exact", f"{EXAMPLE}/sum_rewards.py:digits"]
    data = module(str(EXAMPLE / "sums.jsonl"), prompt_field="question", rewards=rewards, weights=[1.0, 0.5])
    rows = data.rows[0][:2]
    try:
        grades = data.environment.grade(rows, [f" {rows[0].answer}", "1x"])
    finally:
        data.teardown("fit")
    assert [dict(grade.reward.parts) for grade in grades] == [
        {"exact": 1.0, "digits": pytest.approx(0.5, abs=0.2)},
        {"exact": 0.0, "digits": 0.5},
    ]
    assert [grade.verdict.label for grade in grades] == ["correct", "incorrect"]
    assert isinstance(rows[0], SimpleNamespace)


@pytest.mark.slow
def test_a_random_policy_learns_to_answer_in_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    monkeypatch.chdir(ROOT)
    main(["fit", "--config=configs/grpo/reward_functions.yaml", f"--run_dir={tmp_path}/run", "--trainer.enable_progress_bar=false"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    digits = [row["train/reward/digits"] for row in rows if "train/reward/digits" in row]
    assert len(digits) == 30
    assert sum(digits[-5:]) > 2 * sum(digits[:5])
    assert any("val/n" in row for row in rows)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert "exact" in str(manifest["rewards"]["functions"])
