"""PGD reconstruction losses equal those that SPD's own code computed. Every setting and number comes from a fixture's ``expected.json``.

``SPD_GOLDEN_DIRS`` names other fixture folders, separated as in PATH.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from theodolite.evaluation_rows import RowStore
from theodolite.functional.pgd import is_shared
from theodolite.lightning_modules.decomposition.component_model import ComponentModel
from theodolite.lightning_modules.decomposition.decomposition import Decomposition
from theodolite.lightning_modules.decomposition.spd_config import importance_config
from theodolite.lightning_modules.decomposition.spd_import import llama_from_config, load_spd_state
from theodolite.reconstruction_attack import AttackSettings, attack_reconstruction

DEFAULT = Path(__file__).parents[3] / "shared" / "golden" / "spd_pgd"
FOLDERS = [Path(folder) for folder in os.environ.get("SPD_GOLDEN_DIRS", str(DEFAULT)).split(os.pathsep) if folder]
PRESENT = [folder for folder in FOLDERS if (folder / "expected.json").is_file()]
NAMED = "SPD_GOLDEN_DIRS" in os.environ


def test_every_folder_that_was_named_is_there() -> None:
    assert not NAMED or (PRESENT == FOLDERS and FOLDERS), f"no expected.json in {sorted(set(FOLDERS) - set(PRESENT))}"


class Fixture:
    """One folder: the decomposition, its batches and the expected losses."""

    def __init__(self, folder: Path) -> None:
        self.expected: dict[str, Any] = json.loads((folder / "expected.json").read_text())
        self.data = load_file(folder / "data.safetensors")
        settings = self.expected
        target = llama_from_config(settings["target_model"])
        self.parts = Decomposition(
            ComponentModel(target, settings["module_to_c"]),
            importance_config(settings["ci"]),
            settings["sigmoid_type"],
            use_delta=settings["use_delta_component"],
            output_loss=settings["output_loss_type"],
        )
        state = load_file(folder / "state_dict.safetensors")
        load_spd_state(self.parts, state | {name: state[source] for name, source in settings["tied"].items()})
        self.known: dict[Any, list[dict[str, Any]]] = {}
        self.batches = [self.data[f"batch.{i}"] for i in range(settings["n_eval_batches"])]

    def losses(self, scope: str, init: str, steps: tuple[int, ...]) -> dict[int, float]:
        """A case's curve, at several numbers of steps."""
        size = self.expected["batch_size"]
        assert all(len(batch) == size for batch in self.batches)
        simulated, separate = re.fullmatch(r"simulated_(\d+)_ranks", scope), re.fullmatch(r"separate_shards_of_(\d+)", scope)
        ranks = int(simulated[1]) if simulated else size // int(separate[1]) if separate else None
        kind = "averaged" if simulated else "separate" if separate else "joint" if is_shared(scope) else "unique"  # pyright: ignore[reportArgumentType]
        rows = self.attacked(scope if ranks is None else "shared_across_batch", init, steps, ranks)
        return {row["n_steps"]: row["loss"] for row in rows if row["attack"].startswith(kind)}

    def attacked(self, scope: Any, init: Any, steps: tuple[int, ...], ranks: int | None) -> list[dict[str, Any]]:
        """All numbers of one setting, in microbatches of about half a batch; computed once."""
        key = (scope, init, steps, ranks)
        if key not in self.known:
            size = self.expected["batch_size"]
            settings = AttackSettings(steps, self.expected["step_size"], init, scope, size, max(1, size // 2), legacy_ranks=ranks)
            store = RowStore()
            for batch in self.batches:
                store.add(batch, len(batch))
            outcomes, left_out = attack_reconstruction(self.parts, store, settings)
            assert left_out == 0
            self.known[key] = [outcome.row(label, n, settings) for label, outcome in outcomes.items() for n in steps]
        return self.known[key]


_FIXTURES: dict[Path, Fixture] = {}


def fixture(folder: Path) -> Fixture:
    if folder not in _FIXTURES:
        _FIXTURES[folder] = Fixture(folder)
    return _FIXTURES[folder]


def cases() -> list[Any]:
    found: dict[tuple[Path, str, str], None] = {}
    for folder in PRESENT:
        for case in json.loads((folder / "expected.json").read_text())["cases"]:
            found[folder, case["scope"], case["init"]] = None
    return [pytest.param(*key, id=f"{key[0].name}-{key[1]}-{key[2]}") for key in found]


@pytest.mark.parametrize("folder", [pytest.param(folder, id=folder.name) for folder in PRESENT])
def test_target_and_importances_equal_spds(folder: Path) -> None:
    case = fixture(folder)
    for index, batch in enumerate(case.batches):
        prepared = case.parts.prepare(batch)
        assert_close(prepared.target, case.data[f"target_logits.{index}"])
        for name, lower in prepared.lower.items():
            assert_close(lower, case.data[f"ci_lower.{index}.{name}"])


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("folder", "scope", "init"), cases())
def test_losses_equal_spds(folder: Path, scope: str, init: str) -> None:
    case = fixture(folder)
    wanted = {entry["n_steps"]: entry["loss"] for entry in case.expected["cases"] if (entry["scope"], entry["init"]) == (scope, init)}
    for n, loss in case.losses(scope, init, tuple(wanted)).items():
        # beyond a few steps a sign near zero may differ with the order of summation
        assert loss == pytest.approx(wanted[n], rel=1e-5 if n <= 5 else 2e-3), n
