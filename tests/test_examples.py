"""The examples for a project of one's own do what they say; those for other people's trainers are in ``test_trainer_callback.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from example_files import example


def test_three_callbacks_work_on_a_module_that_knows_nothing_of_them() -> None:
    with torch.random.fork_rng(devices=[]):
        logged = example("callbacks_in_own_module").main(steps=15)
    assert abs(logged["along the direction"]) < 1e-5
    assert abs(logged["projection/projection/update_cos_before"]) > 1e-3
    assert logged["val/pgd_recon/joint_64/n20"] > logged["val/pgd_recon/joint_64/n0"]
    assert 0 < logged["val/fvu"] < 1.2


@pytest.mark.slow
def test_a_model_of_ones_own_is_decomposed_into_its_features() -> None:
    numbers = example("decompose_own_model").main()
    assert numbers["test/identity_ci_error/total"] == 0
    assert numbers["test/recovery/move/mmcs"] > 0.99
    assert numbers["test/pgd_recon/joint_64/n20"] >= numbers["test/pgd_recon/joint_64/n0"]
