"""The command line: one sentence per mistake, a folder per run, the command line over the checkpoint, a resume that leaves no seam."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))  # so that configs can name tiny_modules, here and in child processes
from warm_processes import run  # noqa: E402

from theodolite import cli as cli_module  # noqa: E402
from theodolite.cli import SUBCOMMANDS, TheodoliteCLI, main  # noqa: E402
from theodolite.config_layers import ConfigError  # noqa: E402
from theodolite.provenance import content_hash  # noqa: E402
from theodolite.run_logger import RunLogger, encode_row  # noqa: E402
from theodolite.run_recorder import hashed_config  # noqa: E402

BASE: dict[str, Any] = {
    "model": {"class_path": "tiny_modules.TinyModel", "init_args": {"lr": 0.1}},
    "data": {"class_path": "tiny_modules.TinyData"},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "tiny_modules.TinyCallback"}],
    },
}
EVERY_THREE = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"},
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with ``tiny.yaml``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli_module.RUN_DIR_VARIABLE, raising=False)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "every_three.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [EVERY_THREE]}}))
    return tmp_path


@pytest.fixture
def refusal(project: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that must be refused before anything is built; its one line on stderr."""

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(args))
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert "Traceback" not in error
        assert "usage" not in error
        assert not (project / "out").exists()
        return error.strip()

    return run


def child(*args: str, timeout: float = 120, script: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, *(script or ["-m", "theodolite"]), *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# -- one sentence per mistake ------------------------------------------------------------------------------------------------------------

OPTIONS = [
    ("--model.lrr=3", ["TinyModel", "'lrr'", "'lr'"]),
    ("--model.lr=abc", ["model.lr", '"abc"', "a number"]),
    ("--model.init_args.width=1.5", ["width", "whole number"]),
    ("--model.reduction=men", ["reduction", "'mean'"]),
    ("--model=TinyModl", ["TinyModl", "tiny_modules.TinyModel"]),
    ("--data=tiny_modules.TinyModel", ["not a LightningDataModule", "TinyData"]),
    ("--trainer.max_epoch=3", ["'max_epoch'", "'max_epochs'"]),
    ("--trainer.max_epochs=three", ["max_epochs", '"three"', "whole number or null"]),
    ("--trainer.strategy=ddpp", ["strategy", "'ddp'"]),
    ("--trainer.accelerator=gpuu", ["accelerator", "'gpu'"]),
    ("--trainer.precision=bf16mixed", ["precision", "'bf16-mixed'"]),
    ("--trainer.callbacks+=TinyCalback", ["TinyCalback", "TinyCallback"]),
    ("--trainer.callbacks.strenght=3", ["TinyCallback", "'strenght'", "'strength'"]),
    ("--trainer.callbacks=[{init_args: {a: 1}}]", ["trainer.callbacks[0]", "class_path"]),
    ("--trainer.logger=CSVLoger", ["CSVLoger", "CSVLogger"]),
    ("--trainer.default_root_dir=x", ["default_root_dir", "--run_dir"]),
    ("--seed_everything=abc", ["seed_everything", "abc"]),
    ("--ckpt_path=nowhere.ckpt", ["nowhere.ckpt"]),
    ("--run_dr=x", ["'run_dr'", "'run_dir'"]),
    ("--model.width=0", ["width must be at least 1, got 0."]),
    ("stray", ["'stray'", "--key=value"]),
]


@pytest.mark.parametrize(("option", "parts"), OPTIONS, ids=[option for option, _ in OPTIONS])
def test_wrong_option_is_one_sentence_with_what_would_work(option: str, parts: list[str], refusal: Callable[..., str]) -> None:
    error = refusal("fit", "--config", "tiny.yaml", option, "--run_dir=out")
    last = error.splitlines()[-1]
    assert all(part in last for part in parts), last


FILES = [
    ("modle: {}", ["bad.yaml", "'modle'", "'model'"]),
    ("model: {class_path: tiny_modules.TinyModl}", ["bad.yaml", "model.class_path", "TinyModl", "TinyModel"]),
    ("model: {class_path: tiny_module.TinyModel}", ["no module 'tiny_module'", "tiny_modules.TinyModel"]),
    ("model: {class_path: broken_import.Model}", ["importing 'broken_import' failed", "No module named 'absent_library'"]),
    ("model: {class_path: tiny_modules.TinyModel, lr: 3}", ["'lr'", "model.init_args"]),
    ("model: {class_path: tiny_modules.TinyModel, init_args: {wdth: 3}}", ["'wdth'", "'width'"]),
    ("model: {init_args: {lr: 3}}", ["no layer up to here gives model.class_path"]),
    ("trainer:\n  max_epochs: [\nmodel: {}", ["bad.yaml line", "not YAML"]),
    ("- 1", ["bad.yaml", "mapping"]),
]


@pytest.mark.parametrize(("text", "parts"), FILES, ids=[text.splitlines()[0] for text, _ in FILES])
def test_wrong_file_is_one_sentence_with_where_it_is(text: str, parts: list[str], refusal: Callable[..., str], project: Path) -> None:
    (project / "bad.yaml").write_text(text)
    (project / "broken_import.py").write_text("import absent_library\n")
    sys.path.insert(0, str(project))
    try:
        error = refusal("fit", "--config=bad.yaml", "--run_dir=out")
    finally:
        sys.path.remove(str(project))
    assert len(error.splitlines()) == 1
    assert all(part in error for part in parts), error


def test_wrong_command_is_one_sentence(refusal: Callable[..., str]) -> None:
    assert all(name in refusal() for name in SUBCOMMANDS)
    assert "'fit'" in refusal("fitt")
    assert "comes after the subcommand" in refusal("--config", "tiny.yaml", "fit")
    assert "'tiny.yaml'" in refusal("fit", "--config", "tinny.yaml")
    assert "no model is given" in refusal("fit")
    assert "SFTModule predicts nothing" in refusal("predict", "--model=SFTModule", "--model.policy=nowhere")


def test_required_argument_that_no_layer_sets_is_named(refusal: Callable[..., str]) -> None:
    assert "model.init_args.needed" in refusal("fit", "--config=tiny.yaml", "--model=tiny_modules.NeedsOne")
    assert "trainer.callbacks[1].init_args.batch" in refusal("fit", "--config=tiny.yaml", "--trainer.callbacks+=tiny_modules.SignalAt")


def test_a_replaced_list_is_forgotten_and_an_appended_entry_is_edited(project: Path) -> None:
    (project / "first.yaml").write_text("trainer: {callbacks: [{class_path: tiny_modules.SignalAt}]}")
    cli_module.check_args(["fit", "--config=first.yaml", "--config=tiny.yaml"])
    cli_module.check_args(["fit", "--config=tiny.yaml", "--config=first.yaml", "--trainer.callbacks.batch=3"])
    with pytest.raises(ConfigError, match="SignalAt has no default"):
        cli_module.check_args(["fit", "--config=tiny.yaml", "--config=first.yaml"])
    with pytest.raises(ConfigError, match="'strength'"):
        cli_module.check_args(["fit", "--config=tiny.yaml", "--config=first.yaml", "--trainer.callbacks.strength=3"])


def test_a_start_that_failed_leaves_the_folder_free(project: Path) -> None:
    for _ in range(2):
        with pytest.raises(OSError, match="no such data"):
            main(["fit", "--config=tiny.yaml", "--model=tiny_modules.FailsInSetup", "--run_dir=out"])
    main(["fit", "--config=tiny.yaml", "--run_dir=out"])


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_checker_knows_exactly_the_options_that_the_parser_has(subcommand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line is frozen here: an option that an upgrade adds or removes is noticed."""
    seen: list[LightningCLI] = []

    def stop(self: LightningCLI, parser: Any, args: Any) -> None:
        seen.append(self)
        raise RuntimeError("seen")

    monkeypatch.setattr(TheodoliteCLI, "parse_arguments", stop)
    with pytest.raises(RuntimeError, match="seen"):
        TheodoliteCLI([])
    actions = seen[0]._subcommand_parsers[subcommand]._actions
    keys = {action.dest.split(".")[0] for action in actions} - {"help", "config", "print_config"}
    checker = cli_module._checker(subcommand)
    assert keys == {*checker.roots, *checker.groups, *checker.plain}


# -- the run's folder --------------------------------------------------------------------------------------------------------------------


def test_fit_leaves_config_manifest_metrics_and_checkpoint_in_the_run_dir(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config=tiny.yaml", "--run_dir=out", "--model.width=4"])
    assert "global batch 4 = 1 ranks x 4 micro x 1 accumulation" in capsys.readouterr().out
    made = json.loads((project / "out" / "manifest.json").read_text())
    config = yaml.safe_load((project / "out" / "config.yaml").read_text())
    assert made["batch_arithmetic"]["global_batch"] == 4
    assert made["seeds"] == {"seed_everything": 0, "data.init_args.seed": 0}
    assert made["config_hash"] == content_hash(hashed_config(config))
    assert [row["step"] for row in rows(project / "out") if "loss" in row] == list(range(8))
    assert len(list((project / "out" / "checkpoints").glob("*.ckpt"))) == 1
    assert sorted(path.name for path in project.iterdir()) == ["every_three.yaml", "out", "tiny.yaml"]


def test_saved_config_runs_again_to_the_same_numbers_in_a_folder_of_its_own(project: Path) -> None:
    main(["fit", "--config=tiny.yaml", "--run_dir=first"])
    main(["fit", "--config=first/config.yaml"])
    again = next((project / "runs" / "config").iterdir())
    assert (again / "metrics.jsonl").read_bytes() == (project / "first" / "metrics.jsonl").read_bytes()
    hashes = {json.loads((folder / "manifest.json").read_text())["config_hash"] for folder in (project / "first", again)}
    assert len(hashes) == 1


def test_a_second_run_in_the_same_folder_is_refused_and_both_remedies_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config=tiny.yaml", "--run_dir=out"])
    before = (project / "out" / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config=tiny.yaml", "--run_dir=out"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--ckpt_path" in error
    assert "--run_dir" in error
    assert (project / "out" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_evaluation_writes_under_its_own_name_beside_the_run(subcommand: str, project: Path) -> None:
    TheodoliteCLI([subcommand, "--config=tiny.yaml", "--run_dir=out"])
    assert (project / "out" / f"config.{subcommand}.yaml").is_file()
    assert json.loads((project / "out" / f"manifest.{subcommand}.json").read_text())["subcommand"] == subcommand
    assert not (project / "out" / "config.yaml").exists()


def test_fast_dev_run_writes_nothing(project: Path) -> None:
    main(["fit", "--config=tiny.yaml", "--run_dir=out", "--trainer.fast_dev_run=true"])
    assert not (project / "out").exists()


def test_logger_false_is_respected_and_other_loggers_come_after_ours(project: Path) -> None:
    assert TheodoliteCLI(["fit", "--config=tiny.yaml", "--run_dir=a", "--trainer.logger=false"]).trainer.loggers == []
    cli = TheodoliteCLI(["fit", "--config=tiny.yaml", "--run_dir=b", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=b"])
    assert [type(logger).__name__ for logger in cli.trainer.loggers] == ["RunLogger", "CSVLogger"]


def test_layers_append_callbacks_and_later_values_win(project: Path) -> None:
    extra = "--trainer.callbacks+=tiny_modules.TinyCallback"
    cli = TheodoliteCLI(
        [
            "fit",
            "--config=tiny.yaml",
            "--config=every_three.yaml",
            extra,
            "--trainer.callbacks.strength=9",
            "--run_dir=out",
            "--model.lr=1e-3",
        ]
    )
    callbacks: list[Any] = getattr(cli.trainer, "callbacks")  # noqa: B009  Lightning declares it where pyright does not look
    assert [callback.strength for callback in callbacks if type(callback).__name__ == "TinyCallback"] == [1.0, 9.0]
    assert sum(type(callback).__name__ == "ModelCheckpoint" for callback in callbacks) == 1
    assert cli.model.lr == 1e-3


# -- resuming ----------------------------------------------------------------------------------------------------------------------------


def test_upstream_still_has_the_method_that_is_overridden() -> None:
    assert hasattr(LightningCLI, "_parse_ckpt_path")


def test_explicit_command_line_beats_the_checkpoint_in_model_and_optimizer(project: Path) -> None:
    main(["fit", "--config=tiny.yaml", "--run_dir=out", "--trainer.max_epochs=1"])
    saved = next((project / "out" / "checkpoints").glob("*.ckpt"))
    cli = TheodoliteCLI(["fit", "--config=tiny.yaml", "--run_dir=out", f"--ckpt_path={saved}", "--model.lr=0.5", "--model.note=new"])
    assert cli.model.lr == 0.5
    assert cli.model.hparams["note"] == "new"
    assert [group["lr"] for group in cli.trainer.optimizers[0].param_groups] == [0.5]
    assert cli.trainer.global_step == 8


def test_changed_rate_under_a_schedule_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config=tiny.yaml", "--model=tiny_modules.ScheduledModel", "--run_dir=out", "--trainer.max_epochs=1"])
    saved = next((project / "out" / "checkpoints").glob("*.ckpt"))
    args = ["fit", "--config=tiny.yaml", "--model=tiny_modules.ScheduledModel", "--run_dir=out", f"--ckpt_path={saved}"]
    with pytest.raises(SystemExit, match="2"):
        main([*args, "--model.lr=0.5"])
    assert "keep 0.1" in capsys.readouterr().err.splitlines()[-1]
    main(args)


def test_changed_rate_scales_a_schedule_of_factors(project: Path) -> None:
    """With lr(t) = lr / (1 + t), resuming at t = 4 with five times the rate must go on at 5 x lr / (1 + t)."""
    args = ["fit", "--config=tiny.yaml", "--model=tiny_modules.DecayingModel", "--run_dir=out"]
    main([*args, "--trainer.max_epochs=1"])
    saved = next((project / "out" / "checkpoints").glob("*.ckpt"))
    cli = TheodoliteCLI([*args, f"--ckpt_path={saved}", "--model.lr=0.5"])
    (group,) = cli.trainer.optimizers[0].param_groups
    assert group["lr"] == pytest.approx(0.5 / (1 + cli.trainer.global_step))


@pytest.fixture
def uninterrupted(project: Path) -> Path:
    main(["fit", "--config=tiny.yaml", "--config=every_three.yaml", "--run_dir=whole"])
    return project / "whole"


def test_resuming_a_run_that_went_on_leaves_the_uninterrupted_file(uninterrupted: Path) -> None:
    """All but the training means over a whole epoch: Lightning starts those anew on resuming inside an epoch."""
    whole = (uninterrupted / "metrics.jsonl").read_bytes()
    args = ["fit", "--config=tiny.yaml", "--config=every_three.yaml", "--run_dir=whole"]
    main([*args, f"--ckpt_path={uninterrupted}/checkpoints/step=6.ckpt"])
    assert without_epoch_means((uninterrupted / "metrics.jsonl").read_bytes()) == without_epoch_means(whole)
    assert len((uninterrupted / "timings.jsonl").read_text().splitlines()) == len(rows(uninterrupted))


def without_epoch_means(text: bytes) -> list[bytes]:
    return [line for line in text.splitlines() if b"epoch_loss" not in line]


def test_kill_between_checkpoint_and_row_loses_nothing(uninterrupted: Path, project: Path) -> None:
    args = ["fit", "--config=tiny.yaml", "--config=every_three.yaml", "--run_dir=killed"]
    log = project / "log.txt"
    code = run(["-m", "theodolite", *args, "--trainer.logger=tiny_modules.KillAfterSave", "--trainer.logger.step=6"], log)
    assert code == -signal.SIGKILL, log.read_text()[-8000:]
    assert max(row["step"] for row in rows(project / "killed")) == 4
    main([*args, "--ckpt_path=killed/checkpoints/step=6.ckpt"])
    killed, whole = ((folder / "metrics.jsonl").read_bytes() for folder in (project / "killed", uninterrupted))
    assert without_epoch_means(killed) == without_epoch_means(whole)
    ends = [
        torch.load(next((folder / "checkpoints").glob("*step=6.ckpt")), weights_only=True) for folder in (project / "killed", uninterrupted)
    ]
    assert ends[0]["theodolite_metrics"] == ends[1]["theodolite_metrics"]


def test_resuming_from_the_end_of_an_epoch_is_byte_for_byte(project: Path) -> None:
    main(["fit", "--config=tiny.yaml", "--run_dir=whole"])
    main(["fit", "--config=tiny.yaml", "--run_dir=parts", "--trainer.max_epochs=1"])
    saved = next((project / "parts" / "checkpoints").glob("*.ckpt"))
    main(["fit", "--config=tiny.yaml", "--run_dir=parts", f"--ckpt_path={saved}"])
    assert (project / "parts" / "metrics.jsonl").read_bytes() == (project / "whole" / "metrics.jsonl").read_bytes()


def test_interrupt_exits_with_130_and_says_where_the_checkpoint_is(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config=tiny.yaml", "--config=every_three.yaml", "--run_dir=out", "--trainer.callbacks+=tiny_modules.SignalAt"]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    try:
        with pytest.raises(SystemExit, match="130"):
            main([*args, "--trainer.callbacks.batch=5", "--trainer.callbacks.name=SIGINT"])
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the run is in out" in last
    assert "--ckpt_path=out/checkpoints/step=3.ckpt" in last


# -- several processes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["module", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_ranks_share_one_default_folder(launcher: str, project: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", str(TESTS.parent / "train.py")]
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2", "--trainer.max_epochs=1"]
    done = child("fit", "--config=tiny.yaml", *options, script=torchrun if launcher == "torchrun" else None)
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stdout.count("global batch 4 = 2 ranks x 2 micro x 1 accumulation") == 1
    (folder,) = (project / "runs" / "tiny").iterdir()
    assert json.loads((folder / "manifest.json").read_text())["ranks"] == 2
    main(["fit", "--config=tiny.yaml", "--run_dir=one", "--trainer.max_epochs=1"])
    for two, one in zip(rows(folder), rows(project / "one"), strict=True):
        assert two == pytest.approx(one, abs=1e-6)


def test_train_py_without_the_package_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text((TESTS.parent / "train.py").read_text())
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(tmp_path / "train.py"), "fit"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "make setup" in done.stderr
    assert "Traceback" not in done.stderr


# -- rows --------------------------------------------------------------------------------------------------------------------------------


def test_values_that_json_lacks_are_null_and_named() -> None:
    row = encode_row(3, {"a": math.nan, "b": -math.inf, "c": 0.1, "d": torch.tensor(2.0), "n": 3})
    assert row == {"step": 3, "a": None, "b": None, "c": 0.1, "d": 2.0, "n": 3, "nonfinite": {"a": "nan", "b": "-inf"}}
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_logger_keeps_clocks_apart_and_cuts_torn_and_later_rows(tmp_path: Path) -> None:
    logger = RunLogger(str(tmp_path))
    for step in range(4):
        logger.log_metrics({"loss": 1 / (step + 1), "time/step_s": 0.5}, step=step)
    with open(logger.metrics_path, "a") as file:
        file.write('{"step": 4, "lo')
    assert all(set(row) == {"step", "loss"} for row in map(json.loads, logger.metrics_path.read_text().splitlines()[:4]))
    logger.truncate_after(2)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    assert [set(json.loads(line)) for line in logger.timings_path.read_text().splitlines()] == [{"step", "time_s", "time/step_s"}] * 3
    logger.keep_rows(1)
    assert logger.row_count() == 1
