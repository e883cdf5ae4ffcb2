"""A run's default folder, and how all ranks come to the same one before any process group exists."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from theodolite.config_layers import ConfigError, config_files

RUN_DIR_VARIABLE = "THEODOLITE_RUN_DIR"
"""Set by rank zero for the processes that Lightning starts, so that all agree on a default folder."""


def global_rank() -> int:
    """This process's rank before any process group exists; 0 where nothing was launched."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def agreed_run_dir(args: Sequence[str]) -> str:
    """The default folder, the same on all ranks.

    Rank zero chooses. Processes started by Lightning inherit its choice in the environment; those started by torchrun ask the store
    that torchrun keeps for them.

    Args:
        args: The command line, whose first config file names the folder.

    Raises:
        ConfigError: The launcher gives the ranks no way to agree.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise ConfigError("under this launcher the ranks cannot agree on a folder; pass --run_dir.")
        return _run_dir_by_store(args)
    if global_rank() > 0:
        inherited = os.environ.get(RUN_DIR_VARIABLE)
        if inherited is None:
            raise ConfigError("under this launcher the ranks cannot agree on a folder; pass --run_dir.")
        return inherited
    return _default_run_dir(args)


def _run_dir_by_store(args: Sequence[str]) -> str:
    # imported here: torch.distributed is missing from some builds, and only torchrun needs it
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=datetime.timedelta(seconds=120))
    key = f"theodolite/run_dir/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if global_rank() == 0:
        store.set(key, _default_run_dir(args))
    return store.get(key).decode()


def _default_run_dir(args: Sequence[str]) -> str:
    files = [name for name in config_files(args) if Path(name).is_file()]
    folder = Path("runs") / (Path(files[0]).stem if files else "run")
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    taken = 1
    while (folder / (stamp if taken == 1 else f"{stamp}-{taken}")).exists():
        taken += 1
    return str(folder / (stamp if taken == 1 else f"{stamp}-{taken}"))
