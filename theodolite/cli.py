"""The command line: ``theodolite {fit,validate,test,predict} --config a.yaml --config b.yaml --model.lr=1e-4``.

A thin layer over LightningCLI. What it adds:

* every run has its own folder, ``--run_dir`` (default ``runs/<first config>/<UTC time>``), with the resolved ``config.yaml``,
  ``manifest.json``, ``metrics.jsonl`` and ``checkpoints/``;
* a class, key or value that cannot work is reported in one sentence before any model is built (exit code 2);
* ``--print_memory`` says what a GRPO run needs on one rank, and stops;
* on resuming with ``--ckpt_path``, the command line wins over the checkpoint's hyperparameters;
* Ctrl-C says where the run and its last checkpoint are (exit code 130).

Classes may be named in full (``theodolite.callbacks.X``) or, those of this package, by their own name (``X``). A later ``--config``
overrides an earlier one key by key; ``callbacks:`` replaces the list and ``callbacks+:`` appends to it.

One exception to the rule that ``theodolite`` does not import the three rooms: this file imports what a configuration names of them.
"""

# ruff: noqa: E402
from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from theodolite.light_torchmetrics import import_torchmetrics

import_torchmetrics()  # before Lightning does

from lightning.fabric.accelerators import ACCELERATOR_REGISTRY
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import StrategyRegistry

from theodolite.atomic_checkpoints import AtomicCheckpointIO
from theodolite.config_check import Checker, check_predicts
from theodolite.config_layers import ConfigError, Layer, closest, merged, read_layers, texts
from theodolite.distributed import leave_process_group
from theodolite.launched_ranks import end_with_this_process
from theodolite.lazy_names import class_index
from theodolite.run_folder import RUN_DIR_VARIABLE, agreed_run_dir, global_rank
from theodolite.run_logger import RunLogger
from theodolite.run_recorder import RunRecorder

ROOMS = ("callbacks", "datamodules", "lightning_modules")
SUBCOMMANDS = {
    "fit": "train, from the start or from --ckpt_path",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "write predictions",
}
DOCTOR = "look this machine over, and what a run would meet on it"
POLICIES = "theodolite.lightning_modules"


def main(args: list[str] | None = None) -> None:
    """Run one subcommand.

    Args:
        args: Command line without the program's name; ``None`` = ``sys.argv[1:]``. Only the latter works with several processes
            started by Lightning, since those run the same command again.

    Raises:
        SystemExit: 2 with one sentence on stderr if the configuration cannot work, 130 after Ctrl-C.
    """
    args = sys.argv[1:] if args is None else list(args)
    try:
        if "--print_memory" in args:
            _print_memory([arg for arg in args if arg != "--print_memory"])
            return
        if args[:1] == ["doctor"]:
            _doctor(args[1:])
        check_args(args)
        TheodoliteCLI(args)
    except ConfigError as error:
        _stop(2, f"theodolite: error: {error}")
    except KeyboardInterrupt:
        _stop(130, "theodolite: interrupted before the run started.")


def _doctor(args: list[str]) -> NoReturn:
    """Look the machine over, and the run that ``args`` describe; nothing is started."""
    from theodolite.doctor import examine  # here: it starts a sandbox, which no other command needs

    if args:
        check_args(["fit", *args])
    raise SystemExit(examine(args))


class TheodoliteCLI(LightningCLI):
    """LightningCLI with a folder per run; see the module's docstring."""

    def __init__(self, args: list[str]) -> None:
        self._args = args
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            parser_class=_Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--run_dir``."""
        parser.add_argument("--run_dir", type=str | None, default=None, help="The run's folder (default: runs/<config>/<UTC time>).")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the given arguments; Lightning's version warns whenever the process has others of its own."""
        self.config = parser.parse_args(self._args)
        self.run_dir = self._settled_run_dir(str(self.config["subcommand"]))

    def _parse_ckpt_path(self) -> None:
        """Do nothing: upstream lets the checkpoint's hyperparameters overrule the explicit command line."""

    def _settled_run_dir(self, subcommand: str) -> str:
        """The run's folder, settled before anything is seeded or built."""
        settings = self.config[subcommand]
        if settings.trainer.default_root_dir is not None:
            raise ConfigError("trainer.default_root_dir is the run's own folder here; set --run_dir instead.")
        ckpt_path = settings.get("ckpt_path")
        if ckpt_path and ckpt_path not in ("best", "last", "hpc") and not Path(ckpt_path).exists():
            raise ConfigError(f"ckpt_path: there is no checkpoint '{ckpt_path}'.")
        run_dir = settings.run_dir or agreed_run_dir(self._args)
        if subcommand == "fit" and global_rank() == 0 and not ckpt_path and (Path(run_dir) / "config.yaml").exists():
            resume = f"--ckpt_path={run_dir}/checkpoints/<file>.ckpt"
            raise ConfigError(f"{run_dir} already holds a run: continue it with {resume}, or choose another --run_dir.")
        os.environ[RUN_DIR_VARIABLE] = run_dir
        return run_dir

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; what a constructor refuses is a configuration error."""
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            raise ConfigError(f"building the run failed: {_root_cause(error)}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's, with the run's folder, its logger first and its recorder before the configured callbacks."""
        settings = self._get(self.config_init, "trainer", default={})
        self._dump_config()
        config = self.config_dump | {"run_dir": None}
        recorder = RunRecorder(self.run_dir, str(self.subcommand), config, self._config_text(), self._args)
        callbacks = settings.get("callbacks") or []
        callbacks = [recorder, *(callbacks if isinstance(callbacks, list) else [callbacks])]
        loggers = self._loggers(settings.get("logger"))
        try:
            trainer = super().instantiate_trainer(default_root_dir=self.run_dir, callbacks=callbacks, logger=loggers, **kwargs)
        except TypeError as error:
            raise ConfigError(f"trainer: {error}") from error
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _config_text(self) -> str:
        """The resolved config as ``--config`` reads it back, without folder and, of a fit, checkpoint: running it again is another run."""
        settings = self.config[str(self.subcommand)].clone()
        settings["run_dir"] = None
        if self.subcommand == "fit":
            settings["ckpt_path"] = None
        settings.pop("config", None)
        return self._parser(self.subcommand).dump(settings, skip_none=False)

    def _loggers(self, configured: Logger | list[Logger] | bool | None) -> list[Logger] | bool:
        if configured is False:
            return False
        others = [] if configured in (None, True) else configured if isinstance(configured, list) else [configured]
        return [RunLogger(self.run_dir), *(logger for logger in others if isinstance(logger, Logger))]

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it and leave the process group; say where things are after a failure or Ctrl-C."""
        try:
            super()._run_subcommand(subcommand)
            leave_process_group()
        except Exception as error:
            if subcommand == "fit" and global_rank() == 0:
                error.add_note(f"theodolite: stopped; the run is in {self.run_dir}, {self._continuation()}.")
            end_with_this_process(self.trainer.strategy.launcher)
            raise
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            _stop(130, f"theodolite: interrupted; the run is in {self.run_dir}, {self._continuation()}." if global_rank() == 0 else "")

    def _continuation(self) -> str:
        """How to go on with a run that has stopped."""
        saved = sorted(Path(self.run_dir, "checkpoints").glob("**/*.ckpt"), key=lambda path: path.stat().st_mtime)
        return f"continue with --ckpt_path={saved[-1]}" if saved else "no checkpoint was saved yet"


class _Parser(LightningArgumentParser):
    """Reports what :func:`check_args` did not foresee in one line, without a usage dump."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        text = " ".join(message.split())
        # of a union's members only the one that was meant matters: the class that was found and could not take its arguments
        inner = re.match(r'Parser key "(.+?)":.*?Problem with given class_path \'(.+?)\': (.+?)(?: - Not a valid| - Expected|$)', text)
        raise ConfigError(f"{inner[1]}: {inner[2]}: {inner[3]}." if inner else text) from ex


def import_named(layers: Sequence[Layer]) -> None:
    """Import the modules of the three rooms that define a class which some layer names; all others stay where they are."""
    named = {text for layer in layers for text in texts(layer.tree)}
    for room in ROOMS:
        for name, modules in class_index(importlib.import_module(f"theodolite.{room}")).items():
            for module in modules if name in named else ():
                importlib.import_module(module)


def import_rooms() -> None:
    """Import every module of the three rooms: what is closest to a wrong name, and what there is, can only be said of all."""
    for room in ROOMS:
        package = importlib.import_module(f"theodolite.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def check_args(args: Sequence[str]) -> None:
    """Check a whole command line without building anything.

    Raises:
        ConfigError: One sentence about the first thing that cannot work.
    """
    if not args:
        listing = "".join(f"\n  {name:<9} {what}" for name, what in {**SUBCOMMANDS, "doctor": DOCTOR}.items())
        raise ConfigError(f"say what to do, for example: theodolite fit --config configs/<study>/<file>.yaml{listing}")
    if args[0] in ("-h", "--help"):
        return
    if args[0] not in SUBCOMMANDS:
        if args[0].startswith("-"):
            raise ConfigError(f"{args[0].partition('=')[0]} comes after the subcommand: theodolite fit {' '.join(args[:2])} ...")
        raise ConfigError(f"there is no subcommand '{args[0]}'{closest(args[0], [*SUBCOMMANDS, 'doctor'])}.")
    if any(token in ("-h", "--help") or token.partition("=")[0].endswith(".help") for token in args[1:]):
        import_rooms()
        return
    layers = read_layers(args[1:])
    import_named(layers)
    checker = _checker(args[0])
    try:
        checker.check(layers)
    except ConfigError:
        import_rooms()
        checker = _checker(args[0])
        checker.check(layers)
    if "model" not in checker.classes:
        raise ConfigError(f"no model is given: theodolite {args[0]} needs --config <file>.yaml, or --model=<class>.")
    check_predicts(args[0], checker.classes["model"])


def _print_memory(args: list[str]) -> None:
    """Estimate what a GRPO run needs on one rank, from its layers alone."""
    from theodolite.doctor import ranks  # here: these need transformers and a sandbox, which no other command does
    from theodolite.policy_memory import estimate

    tree = merged(read_layers(args[1:]))
    try:
        print(estimate(tree, ranks(tree)))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _checker(subcommand: str) -> Checker:
    plain: dict[str, Any] = {"seed_everything": bool | int, "run_dir": str | None, "ckpt_path": str | None, "weights_only": bool | None}
    plain |= {"fit": {}, "validate": {"verbose": bool}, "test": {"verbose": bool}, "predict": {"return_predictions": bool | None}}[
        subcommand
    ]
    return Checker(
        roots={"model": LightningModule, "data": LightningDataModule},
        groups={"trainer": Trainer},
        plain=plain,
        bases={"trainer.callbacks": Callback, "trainer.logger": Logger},
        choices={
            "trainer.strategy": ["auto", *StrategyRegistry.available_strategies()],
            "trainer.accelerator": ["auto", "gpu", *ACCELERATOR_REGISTRY.available_accelerators()],
        },
        parts={(f"{POLICIES}.policy_module.PolicyModule", "rollout"): f"{POLICIES}.rollouts.RolloutEngine"},
    )


def _root_cause(error: BaseException) -> str:
    """What the constructor itself said, from under the parser's report about it."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__ or error
    return " ".join(str(error).split())


def _stop(code: int, line: str) -> NoReturn:
    if line:
        print(line, file=sys.stderr, flush=True)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
