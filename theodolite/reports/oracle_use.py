"""Which arms were trained with the oracle's labels: read from what their runs wrote, not from what a study says of them."""

from __future__ import annotations

import re

from theodolite.reports.records import Run, Study

_SAID = re.compile(r"^uses_oracle: (.+) may see the oracle's labels", re.MULTILINE)
_NAMED = re.compile(r"\bclass_path: theodolite\.callbacks\.oracle\.(\w+)")


def oracle_users(run: Run) -> list[str]:
    """Class names of the run's callbacks that were handed the oracle's verdicts, by name.

    Those that the run named at its start, in ``log.txt``, whosever they are; and those of ``theodolite.callbacks.oracle`` in its resolved
    ``config.yaml``, which a run has that was started without a study.
    """
    log, config = run.directory / "log.txt", run.directory / "config.yaml"
    said = _SAID.search(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else None
    named = _NAMED.findall(config.read_text(encoding="utf-8")) if config.is_file() else []
    return sorted({*(said[1].split(", ") if said else ()), *named})


def oracle_arms(study: Study) -> dict[str, list[str]]:
    """Those callbacks by arm, for the arms that have any."""
    found = {arm: sorted({name for run in study.of(arm) for name in oracle_users(run)}) for arm in study.arms}
    return {arm: names for arm, names in found.items() if names}
