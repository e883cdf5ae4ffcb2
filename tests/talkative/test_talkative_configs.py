"""The configs of real models, with tiny random models of the same architecture in their place, train and describe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_talkative import MODELS, data, save_target, tokenizer, trainer_of

from theodolite.lightning_modules.talkative import TalkativeGRPO, TalkativeModule, TalkativeSFT
from theodolite.lightning_modules.talkative.settings import ReconstructorSettings, VerbaliserSettings

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for m in messages %}the {{ m['content'] }} .{% endfor %} in"
TINY_PROMPTS = {"prompt": "the sea <act> in the", "marker": "<act>"}


def settings(files: list[str], target: str) -> dict[str, Any]:
    """The configs' model, its models, prompts and lengths made tiny and everything else as it stands."""
    merged: dict[str, Any] = {}
    for file in files:
        merged |= yaml.safe_load((ROOT / "configs" / "talkative" / file).read_text())["model"]["init_args"]
    verbaliser = merged["verbaliser"] | {"model": target} | TINY_PROMPTS
    verbaliser["layers"] = min(verbaliser.get("layers", 1), 3)
    readers = {
        name: ReconstructorSettings(**(merged[name] | {"model": target, "layers": 2, "prefix": "the", "suffix": "<read>"}))
        for name in ("reconstructor", "held_out")
        if name in merged
    }
    merged |= {"verbaliser": VerbaliserSettings(**verbaliser)} | readers
    return merged | {"max_new_tokens": 6, "dtype": "float32", "micro_batch_size": 4, "seed": 1, "weights": None}


@pytest.mark.parametrize(
    ("kind", "files", "architecture"),
    [
        (TalkativeSFT, ["qwen.yaml"], "qwen3"),
        (TalkativeGRPO, ["qwen.yaml", "qwen_grpo.yaml"], "qwen3"),
        (TalkativeSFT, ["gemma.yaml"], "gemma3_text"),
    ],
)
def test_settings_of_a_real_model_train_on_a_tiny_one(
    kind: type[TalkativeModule], files: list[str], architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert architecture in MODELS
    monkeypatch.setattr(tokenizer(), "chat_template", TEMPLATE)
    target = save_target(tmp_path / "target", architecture)
    module = kind(**settings(files, target))
    trainer_of(tmp_path, steps=2).fit(module, datamodule=data(target, tmp_path / "banks"))
    texts = module.describe(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)), ["1:2", "3:4"], range(3), 1.0, 6, 0)
    assert [len(row) for row in texts] == [3, 3]
    assert bool(module.in_loop.reconstruct(["the sea", "", "happy cow"]).isfinite().all())
