"""Every study on 1, 2 and 4 gloo ranks through the real command line: the same metrics and the same weights.

Global sizes stay, held-out sets divide by neither 2 nor 4, and no rank is privileged. The K-sweep on 4, 2 and 1 ranks is in
``talkative/test_best_of_k_sweep.py``, where its files are equal byte for byte. Run as a script, this is one rank.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parent
for place in ("", "grpo", "transcoder", "decomposition", "talkative"):
    sys.path.insert(0, str(TESTS / place))

import tiny_talkative  # noqa: E402
from test_activations_distributed import DATA as ACTIVATIONS  # noqa: E402
from test_decomposition_processes import written as decomposition  # noqa: E402
from test_grpo_distributed import PROJECTION  # noqa: E402
from test_talkative_distributed import STAGES  # noqa: E402
from test_transcoder_distributed import CONFIG as TRANSCODER  # noqa: E402
from tiny_policies import callback, config, grpo, prompts, sft  # noqa: E402
from warm_processes import run_ranks  # noqa: E402

from theodolite.cli import RUN_DIR_VARIABLE, main  # noqa: E402

WORLDS = (1, 2, 4)
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1800)]


def witness(folder: Path, name: str) -> dict[str, Any]:
    return callback("tiny_policies.Witness", folder=str(folder / name))


def recording(folder: Path, replay: str | None) -> str:
    """GRPO whose rollouts are recorded, or replayed: every rank then learns from the very same tokens, whoever sampled them."""
    source = "theodolite.lightning_modules.replayed.ReplayRollout"
    rollout = None if replay is None else {"class_path": source, "init_args": {"folder": replay}}
    model = grpo(rollout=rollout, table_every=1, beta=0.05, advantage_scale="batch", micro_batch_size=4, split_backward=True, export=False)
    model |= {"class_path": "grpo_fits.PlainDescent", "lr": 0.1}
    data = prompts(rewards="nan", prompts_per_step=8, rows=30)  # of an epoch's 30 rows 24 make three windows
    limits = {"max_steps": 5, "limit_val_batches": 0, "num_sanity_val_steps": 0, "precision": "64-true"}
    return config(folder, "grpo_replayed", model, data, callbacks=[witness(folder, "grpo_replayed")], **limits)


def sampling(folder: Path) -> str:
    """GRPO that samples itself, projects its gradients and is evaluated on seven problems."""
    model = grpo(micro_batch_size=4, warmup_steps=2, lr=1.5e-4, export=False)
    callbacks = [PROJECTION, witness(folder, "grpo")]
    data = prompts(prompts_per_step=4)
    return config(folder, "grpo", model, data, max_steps=4, val_check_interval=2, callbacks=callbacks, precision="64-true")


def tuning(folder: Path) -> str:
    model, data = sft(prompt_weight=0.2, export=False), prompts(examples=True, prompts_per_step=8)
    return config(folder, "sft", model, data, max_steps=4, val_check_interval=2, callbacks=[witness(folder, "sft")], precision="64-true")


def transcoder(folder: Path) -> str:
    """450 held-out rows in batches of 64: the last one has two, so that two of four ranks have none."""
    own = [callback("tiny_features.Witness", folder=str(folder / "transcoder")), callback("FVUCallback", forward=True, name="again")]
    content = TRANSCODER | {"trainer": TRANSCODER["trainer"] | {"callbacks": own}}
    content["data"] = {"class_path": "tiny_features.FeatureData", "init_args": {"tokens": 450, "d_out": 12, "global_batch_size": 64}}
    return dumped(folder / "transcoder.json", content)


def activations(folder: Path) -> str:
    """Activations of a language model, gathered on the fly and measured by FVUCallback, with seven held-out sequences."""
    own = [callback("FVUCallback", forward=True, name="again"), callback("tiny_features.Witness", folder=str(folder / "activations"))]
    trainer: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": 6, "log_every_n_steps": 2, "check_val_every_n_epoch": None, "val_check_interval": 3,
        "num_sanity_val_steps": 0, "callbacks": own, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    model = {"class_path": "TranscoderModule", "init_args": {"latents": 64, "k": 4, "warmup_steps": 2}}
    data = {"class_path": "ActivationDataModule", "init_args": ACTIVATIONS | {"repeat": True}}
    return dumped(folder / "activations.json", {"seed_everything": 2, "model": model, "data": data, "trainer": trainer})


def dumped(path: Path, content: dict[str, Any]) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def attacked(folder: Path) -> str:
    """A decomposition under persistent and fresh adversaries, attacked by PGDReconLossCallback at every evaluation."""
    return str(decomposition(folder / "decomposition.yaml", witness(folder, "decomposition")))


def talkative(stage: str) -> Callable[[Path], str]:
    def written(folder: Path) -> str:
        kind, settings = STAGES[stage]
        target, seen = str(folder.parent / "target"), [callback("tiny_talkative.WeightWitness", folder=str(folder / f"talkative_{stage}"))]
        path = folder / f"{stage}.json"
        return tiny_talkative.config(path, kind, target, folder / "banks", seen, settings, max_steps=3, num_sanity_val_steps=0)

    return written


STUDIES: dict[str, tuple[Callable[[Path], str], float]] = {
    "grpo_replayed": (lambda folder: recording(folder, str(folder.parent / "recorded" / "run-grpo_replayed" / "completions")), 1e-6),
    "grpo": (sampling, 1e-6),
    "sft": (tuning, 1e-8),
    "transcoder": (transcoder, 1e-5),
    "activations": (activations, 1e-5),
    "decomposition": (attacked, 1e-8),
    "talkative_sft": (talkative("sft"), 1e-5),
    "talkative_grpo": (talkative("grpo"), 1e-5),
    "talkative_gumbel": (talkative("gumbel"), 1e-5),
}
"""How to write a study's config, and how far metrics and weights may be apart (absolutely, or relatively where they are large)."""

MEASURED = {
    "grpo_replayed": "train/mismatch_weight",
    "grpo": "projection/projection/cos_after",
    "sft": "val/pass_rate",
    "transcoder": "val/again_median",
    "activations": "val/again_median",
    "decomposition": "val/pgd_recon/joint_16/n5",
    "talkative_sft": "val/fve_held_out",
    "talkative_grpo": "val/fve_held_out",
    "talkative_gumbel": "val/fve_held_out",
}
"""What must be among the numbers: replayed rollouts, projection, FVUCallback, PGDReconLossCallback, held-out reconstruction."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All studies in each world, in one group of processes per world: importing takes longer than a study."""
    root = tmp_path_factory.mktemp("worlds")
    patch = pytest.MonkeyPatch()
    for name in (RUN_DIR_VARIABLE, "PL_GLOBAL_SEED"):
        patch.delenv(name, raising=False)
    tiny_talkative.save_target(root / "target")
    (root / "recorded").mkdir()
    launch(root / "recorded", 1, [line(root / "recorded", "grpo_replayed", recording(root / "recorded", None))])
    for world in WORLDS:
        folder = root / str(world)
        folder.mkdir()
        lines = [line(folder, name, write(folder)) for name, (write, _) in STUDIES.items()]
        launch(folder, world, lines)
    patch.undo()
    return root


def launch(folder: Path, world: int, lines: list[list[str]]) -> None:
    run_ranks([__file__, str(world), json.dumps(lines)], folder, world, seconds=600)


def line(folder: Path, name: str, config_file: str) -> list[str]:
    precise = ["--trainer.precision=64-true"] if name == "decomposition" else []
    return ["fit", f"--config={config_file}", f"--run_dir={folder}/run-{name}", *precise]


def metrics(runs: Path, world: int | str, name: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (runs / str(world) / f"run-{name}" / "metrics.jsonl").read_text().splitlines()]


def apart(one: float, other: float) -> float:
    """Absolute difference, relative where the numbers are large; both may be NaN."""
    if math.isnan(one) or math.isnan(other):
        return 0.0 if math.isnan(one) and math.isnan(other) else math.inf
    return abs(one - other) / max(1.0, abs(one))


@pytest.mark.parametrize("name", STUDIES)
def test_two_and_four_ranks_log_and_learn_what_one_does(runs: Path, name: str) -> None:
    tolerance = STUDIES[name][1]
    one, expected = metrics(runs, 1, name), load_file(runs / "1" / name / "weights-0.safetensors")
    assert MEASURED[name] in {key for row in one for key in row}
    for world in WORLDS[1:]:
        found = metrics(runs, world, name)
        assert [row.keys() for row in found] == [row.keys() for row in one]
        differences: dict[str, float] = {}
        for row, other in zip(one, found, strict=True):
            differences |= {key: max(differences.get(key, 0.0), apart(value, other[key])) for key, value in row.items()}
        ranks = [load_file(runs / str(world) / name / f"weights-{rank}.safetensors") for rank in range(world)]
        moved = max(float((ranks[0][k].double() - v.double()).nan_to_num().abs().max()) for k, v in expected.items() if v.numel())
        worst = max(differences, key=lambda key: differences[key])
        print(f"{name}, {world} ranks: {len(one)} rows, {len(differences)} numbers, furthest {worst} by {differences[worst]:.1e}; "
              f"weights by {moved:.1e}")  # fmt: skip
        assert differences[worst] <= tolerance, worst
        assert moved <= tolerance
        for rank in ranks[1:]:
            assert all(bool((rank[k] == v).logical_or(v.isnan()).all()) for k, v in ranks[0].items()), "ranks end with the same weights"


def test_what_was_replayed_is_what_was_recorded(runs: Path) -> None:
    recorded, replayed = metrics(runs, "recorded", "grpo_replayed"), metrics(runs, 4, "grpo_replayed")
    assert len(recorded) == len(replayed) == 5
    for first, second in zip(recorded, replayed, strict=True):
        for key in ("train/reward_mean", "train/completion_tokens", "train/entropy_estimate", "train/groups_with_signal"):
            assert second[key] == pytest.approx(first[key], rel=1e-12)


if __name__ == "__main__":
    for arguments in json.loads(sys.argv[2]):
        world = int(sys.argv[1])
        main([*arguments, f"--trainer.devices={world}", *(["--trainer.strategy=ddp"] if world > 1 else [])])
