"""Folders of tests lie on the import path of other tests, where an empty one answers for a package that is missing."""

from __future__ import annotations

from pathlib import Path

OPTIONAL = {"vllm", "trl", "wandb", "sae_lens", "dictionary_learning", "flash_attn", "deepspeed", "bitsandbytes"}
"""Packages that libraries look for and do without."""


def test_no_folder_of_tests_is_named_like_an_optional_package() -> None:
    folders = {path.name for path in Path(__file__).parent.iterdir() if path.is_dir()}
    assert not folders & OPTIONAL
